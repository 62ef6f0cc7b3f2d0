import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regionspot.vocabulary import load_vocabulary
from regionspot.vocabulary_entries import Concept, EmbeddedVocabulary, Entry, EntryVocabulary, Example, save_embedded

from .helpers import tiny_model

MUG = {
    "name": "my mug",
    "synonyms": ["mug"],
    "prompts": ["a photo of my mug"],
    "examples": [{"image": "a.png", "box": [1, 2, 30, 40.5]}, {"image": "/b.png"}],
    "negatives": ["cup", {"prompts": ["a glass"]}, {"image": "c.png", "box": [0, 0, 5, 5]}],
    "weight": 0.7,
}


def write(path, content):
    path.write_text(json.dumps(content))
    return f"@{path}"


def test_entries_of_a_json_file(tmp_path):
    source = write(tmp_path / "names.json", ["spoon", MUG])
    vocabulary = load_vocabulary(source, with_examples=True)
    assert isinstance(vocabulary, EntryVocabulary) and list(vocabulary) == ["spoon", "my mug"]
    plain, mug = vocabulary.entries
    assert plain == Entry("spoon", Concept(("spoon",))) and plain.is_plain and not plain.has_regions
    examples = (Example(tmp_path / "a.png", (1, 2, 30, 40.5)), Example(Path("/b.png")))
    assert mug.concept == Concept(("mug",), ("a photo of my mug",), examples)
    assert mug.negatives == (
        Concept(("cup",)),
        Concept(prompts=("a glass",)),
        Concept(examples=(Example(tmp_path / "c.png", (0, 0, 5, 5)),)),
    )
    assert mug.weight == 0.7 and mug.has_regions and not mug.is_plain


def test_entries_of_an_object(tmp_path):
    source = write(
        tmp_path / "names.json", {"cup": ["cup", "mug"], "logo": {"examples": [{"image": "a.png"}]}, "x": {}}
    )
    cup, logo, x = load_vocabulary(source, with_examples=True).entries
    assert cup.concept.synonyms == ("cup", "mug") and cup.is_plain
    assert not logo.concept.has_text and logo.has_regions  # its name is only a label
    assert x.concept.synonyms == ("x",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "exmaples": []}, "'a': unknown key 'exmaples'; expected some of name, synonyms"),
        ({"prompts": ["a"]}, "entry number 0 has no name"),
        ({"name": "a", "prompts": [""]}, "'a': prompts: expected a list of non-empty strings"),
        ({"name": "a", "examples": [{"box": [1, 2, 3, 4]}]}, r"'a': examples\[0\]: expected an object with image and"),
        ({"name": "a", "examples": [{"image": "a.png", "box": [1, 2, 3]}]}, r"examples\[0\]: expected a path and four"),
        ({"name": "a", "negatives": [{"synonyms": []}]}, r"negatives\[0\]: expected a name, an object with prompts"),
        ({"name": "a", "negatives": [3]}, r"'a': negatives\[0\]: expected a name, an object with prompts, or an image"),
        ({"name": "a", "weight": 2}, r"'a': weight: expected a number in \[0, 1\], got 2"),
    ],
)
def test_invalid_entry_is_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        load_vocabulary(write(tmp_path / "names.json", [entry]), with_examples=True)


def test_training_refuses_entries(tmp_path):
    source = write(tmp_path / "names.json", [MUG])
    message = r"names.json: its entries are more than names, but training and evaluation use names alone"
    with pytest.raises(ValueError, match=message):
        load_vocabulary(source)
    with pytest.raises(ValueError, match=message):
        tiny_model("MODEL.REGIONSPOT.VOCABULARY", source, names=None)


def test_embedded_vocabulary_round_trip(tmp_path):
    path = tmp_path / "names.safetensors"
    embeddings = torch.nn.functional.normalize(torch.randn(2, 32), dim=1)
    save_embedded(path, EmbeddedVocabulary(["ä", "b"], embeddings, {"SAM": "1"}))
    loaded = load_vocabulary(f"@{path}", with_examples=True)
    assert list(loaded) == ["ä", "b"] and torch.equal(loaded.embeddings, embeddings) and loaded.made_by == {"SAM": "1"}
    loaded.check({"SAM": "1", "CLIP": "2"})
    with pytest.raises(ValueError, match="embedded with another SAM: expected 2, got 1; embed it again"):
        loaded.check({"SAM": "2"})


@pytest.mark.parametrize("damage", ["truncated", "format", "infinite", "names"])
def test_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "names.safetensors"
    metadata = {"format": "regionspot-vocabulary-1", "names": '["a", "b"]', "made_by": "{}"}
    embeddings = torch.eye(4)[:2].contiguous()
    if damage == "format":
        metadata["format"] = "other"
    if damage == "names":
        metadata["names"] = '["a"]'
    save_file({"embeddings": embeddings / 0 if damage == "infinite" else embeddings}, path, metadata)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="names.safetensors: expected regionspot-vocabulary-1, as regionspot"):
        load_vocabulary(f"@{path}", with_examples=True)
