import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from regionspot import RegionSpotPredictor
from regionspot.modeling.entry_embeddings import EntryEncoder, embed_vocabulary
from regionspot.vocabulary import load_vocabulary
from regionspot.vocabulary_entries import EmbeddedVocabulary, save_embedded

from ..helpers import NAMES, as_inputs, draw_scene, spread_tokens, tiny_config


@pytest.fixture(scope="module")
def predictor():
    predictor = RegionSpotPredictor(tiny_config())
    spread_tokens(predictor.recognizer, as_inputs(0))
    return predictor


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    directory = tmp_path_factory.mktemp("examples")
    for number in range(4):
        Image.fromarray(draw_scene(number)[0]).save(directory / f"{number}.png")
    return directory


def example(images, number, row=0):
    return {"image": str(images / f"{number}.png"), "box": draw_scene(number)[1][row].tolist()}


def region_of(predictor, content):
    """Return the (1, D) embedding that the predictor has for an example's region."""
    features = predictor.encode(content["image"])
    return torch.from_numpy(predictor.predict([content["box"]], features=features, vocabulary=["a"]).embeddings)


def embed(predictor, *entries):
    return predictor.recognizer.encode_vocabulary(list(entries))[1]


def test_plain_entries_have_the_embeddings_of_names(predictor):
    recognizer = predictor.recognizer
    names, embeddings = recognizer.encode_vocabulary(["cup", {"name": "b", "synonyms": ["disc", "circle"]}])
    expected = recognizer.classifier.text_encoder(load_vocabulary({"cup": "cup", "b": ["disc", "circle"]}))
    assert names == ["cup", "b"]
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


def test_prompts_are_taken_as_they_are(predictor):
    text = predictor.recognizer.classifier.text_encoder
    assert text.templates == ("a photo of a {}.",)
    [embedding] = embed(predictor, {"name": "x", "prompts": ["a photo of a cup."]})
    torch.testing.assert_close(embedding, text(["cup"])[0], atol=1e-5, rtol=0)
    two = embed(predictor, {"name": "x", "prompts": ["a photo of a cup."], "synonyms": ["spoon"]})[0]
    torch.testing.assert_close(two, F.normalize(text(["cup", "spoon"]).mean(dim=0), dim=0), atol=1e-5, rtol=0)


def test_example_is_what_it_shows(predictor, images):
    entries = [{"name": str(i), "examples": [example(images, i, 1)]} for i in range(4)]
    vocabulary = load_vocabulary(entries, with_examples=True)
    regions = torch.cat([region_of(predictor, example(images, i, 1)) for i in range(4)])
    encoder = EntryEncoder(predictor.recognizer, vocabulary.entries, regions)
    similarities = regions @ encoder().t()  # (region, class)
    assert (similarities.diag() > similarities.mean(dim=0)).all()
    embedded = torch.stack([encoder._regions[entry.concept.examples[0]] for entry in vocabulary.entries])
    torch.testing.assert_close(embedded, regions, atol=1e-5, rtol=0)


def test_examples_score_as_names_do(predictor, images):
    entries = [*NAMES, {"name": "x", "examples": [example(images, 0)]}]
    vocabulary = load_vocabulary(entries, with_examples=True)
    generator = torch.Generator().manual_seed(0)
    references = F.normalize(torch.randn(200, 32, generator=generator) + 1, dim=1)
    encoder = EntryEncoder(predictor.recognizer, vocabulary.entries, references)
    similarities = references @ encoder().t()
    texts = references @ predictor.recognizer.classifier.text_encoder([*NAMES, "x"]).t()
    assert similarities[:, -1].mean() == pytest.approx(float(texts.mean()), abs=1e-4)
    assert similarities[:, -1].std() == pytest.approx(float(texts.std(dim=0).mean()), rel=0.2)
    torch.testing.assert_close(similarities[:, :4], texts[:, :4], atol=1e-5, rtol=0)


def test_weight_is_the_share_of_the_examples(predictor, images):
    entry = {"name": "x", "synonyms": ["cup"], "examples": [example(images, 0)]}
    only_examples = embed(predictor, {"name": "cup", "examples": [example(images, 0)]})
    torch.testing.assert_close(embed(predictor, {**entry, "weight": 1}), only_examples, atol=1e-5, rtol=0)
    both, text = embed(predictor, entry), embed(predictor, {**entry, "weight": 0})
    similarity = F.cosine_similarity(torch.cat([only_examples, text]), both)
    assert similarity[0] > F.cosine_similarity(only_examples, text) < similarity[1]


def test_negatives_push_away(predictor, images):
    entry = {"name": "x", "synonyms": ["cup"], "examples": [example(images, 0)]}
    negative = example(images, 1)
    [region] = region_of(predictor, negative)
    without, with_negative = embed(predictor, entry)[0], embed(predictor, {**entry, "negatives": [negative]})[0]
    assert float(with_negative @ region) < float(without @ region) - 1e-3
    text, other = embed(predictor, "cup")[0], embed(predictor, "spoon")[0]
    [pushed] = embed(predictor, {"name": "cup", "negatives": ["spoon"]})
    assert float(pushed @ other) < float(text @ other) and float(pushed.norm()) == pytest.approx(1, abs=1e-5)


def test_examples_do_not_depend_on_each_other(predictor, images):
    alone = load_vocabulary([{"name": "x", "examples": [example(images, 0, 0)]}], with_examples=True)
    together = [{"name": "x", "examples": [example(images, 0, 0)]}, {"name": "y", "examples": [example(images, 0, 1)]}]
    many = load_vocabulary(together, with_examples=True)
    first, second = (EntryEncoder(predictor.recognizer, x.entries)._regions for x in (alone, many))
    key = next(iter(first))
    torch.testing.assert_close(first[key], second[key], atol=1e-5, rtol=0)


def test_deep_example_is_scaled_as_images_are(images):
    content, cfg = example(images, 0), tiny_config()
    dark = np.asarray(Image.open(content["image"]).convert("L")).astype(np.uint16) * 20
    content["image"] = str(images / "deep.png")
    Image.fromarray(dark).save(content["image"])
    cfg.INPUT.DEEP_RANGE = (0, 65535)
    predictor = RegionSpotPredictor(cfg)
    encoder = EntryEncoder(predictor.recognizer, load_vocabulary([{"name": "x", "examples": [content]}], True).entries)
    torch.testing.assert_close(*encoder._regions.values(), region_of(predictor, content)[0], atol=1e-5, rtol=0)


def test_embedded_file_equals_its_entries(predictor, images, tmp_path):
    entries = ["cup", {"name": "x", "examples": [example(images, 0)]}]
    vocabulary = embed_vocabulary(predictor.recognizer, load_vocabulary(entries, with_examples=True))
    save_embedded(tmp_path / "names.safetensors", vocabulary)
    names, embeddings = predictor.recognizer.encode_vocabulary(f"@{tmp_path}/names.safetensors")
    assert names == ["cup", "x"] and torch.equal(embeddings, embed(predictor, *entries))
    predictor.set_vocabulary(f"@{tmp_path}/names.safetensors")
    result = predictor.predict([[5, 5, 20, 20]], features=predictor.encode(draw_scene(0)[0]))
    assert result.vocabulary == ["cup", "x"] and np.isfinite(result.logits).all()
    other = RegionSpotPredictor(tiny_config())  # without the moved bias
    with pytest.raises(ValueError, match="the vocabulary was embedded with another attention module"):
        other.set_vocabulary(f"@{tmp_path}/names.safetensors")
    assert isinstance(vocabulary, EmbeddedVocabulary) and set(vocabulary.made_by) >= {"SAM", "CLIP", "text encoder"}


def test_invalid_examples_are_refused(predictor, images):
    with pytest.raises(FileNotFoundError, match=r"none.png: no such file"):
        embed(predictor, {"name": "x", "examples": [{"image": str(images / "none.png")}]})
    with pytest.raises(ValueError, match=r"examples in .*0.png: number 0, .* lies outside the image"):
        embed(predictor, {"name": "x", "examples": [{"image": str(images / "0.png"), "box": [500, 0, 600, 20]}]})
