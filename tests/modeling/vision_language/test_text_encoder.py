"""Text embeddings: templates, synonyms, and a cache that is never wrong."""

import copy
import hashlib
import subprocess

import clip
import pytest
import torch
from clip.model import convert_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from regionspot.checkpoint.formats import fingerprint
from regionspot.modeling.vision_language import text_cache, text_encoder
from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.vocabulary import load_vocabulary

from ...helpers import NAMES, tiny_model


@pytest.fixture(scope="module")
def vision():
    return tiny_model(names=None).recognizer.vision_language


@pytest.mark.parametrize(("templates", "number"), [("all", 81), ("one", 1), ("none", 1)])
def test_embedding_is_the_normalized_mean(vision, templates, number):
    encoder = TextEncoder(vision, templates, batch_size=7)
    assert len(encoder.templates) == number
    names = ["zebra", "arctic_(type_of_shoe)", "cup"]
    with torch.no_grad():
        expected = [
            F.normalize(
                vision.clip_model.encode_text(clip.tokenize([t.format(name) for t in encoder.templates])).mean(dim=0),
                dim=0,
            )
            for name in names
        ]
    torch.testing.assert_close(encoder(names), torch.stack(expected), atol=1e-5, rtol=0)


def test_tokens_are_those_of_whole_prompts(vision):
    """Names that split at the prompt's symbols or not, that end in symbols, digits, accents, entities."""
    encoder = TextEncoder(vision, "all")
    names = ["cup", "arctic (type of shoe)", "first-aid kit", "o'clock", "U.S.", "10", "#2", "caf\u00e9", "tea & jam"]
    names += ["dog's", "a/c", "what?", "3d", "_x_", "black_(sheep)", "it's", "R&amp;B", "\U0001f600", "a  b", "s", "ll"]
    tokens, lengths = vision.tokenize(names, encoder.templates)
    expected = torch.cat([clip.tokenize([x.format(name) for x in encoder.templates]) for name in names])
    assert torch.equal(tokens.long(), expected) and torch.equal(lengths, expected.argmax(dim=1) + 1)


def test_second_call_reads_the_cache(vision, monkeypatch):
    first = TextEncoder(vision, "one")(NAMES)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(TextEncoder(vision, "one")(NAMES), first)


@pytest.mark.parametrize("templates", ["all", "one"])
def test_many_prompts_name_the_shorter_way(vision, templates, monkeypatch, caplog):
    """Once, before the work; not with one template, nor from the cache."""
    monkeypatch.setattr(text_encoder, "MANY_PROMPTS", 162)
    TextEncoder(vision, templates)(["cup"])
    assert not caplog.text
    for _ in range(2):
        TextEncoder(vision, templates)(["saucer", "spoon"])
    text = "encoding 2 names in 81 templates, 162 prompts; MODEL.REGIONSPOT.CLIP.TEMPLATES one or none needs 81 times"
    assert caplog.text.count(text) == (templates == "all")


@pytest.mark.parametrize("change", ["templates", "names", "style", "weights", "synonyms"])
def test_cache_key_covers_all_inputs(vision, change, cache_directory):
    TextEncoder(vision, "one")(["a_b"])
    names, templates, style, model = ["a_b"], "one", "dataset", vision
    if change == "templates":
        templates = "none"
    elif change == "names":
        names = ["a_c"]
    elif change == "style":
        style = "readable"
    elif change == "synonyms":
        names = load_vocabulary({"a_b": ["a_b", "c"]})
    else:
        model = tiny_model("MODEL.REGIONSPOT.CLIP.CUSTOM.TEXT_LAYERS", 1, names=None).recognizer.vision_language
    TextEncoder(model, templates, style)(names)
    assert len(list(cache_directory.glob("text/*/*.safetensors"))) == 2


def test_cache_key_covers_the_precision(vision, cache_directory):
    """The same numbers in half precision give other embeddings than in single precision."""
    single, half = copy.deepcopy(vision), copy.deepcopy(vision)
    convert_weights(half.clip_model)
    single.clip_model.load_state_dict(half.clip_model.state_dict())  # what half precision can hold
    values = [TextEncoder(model, "one")(NAMES) for model in (single, half)]
    assert len(list(cache_directory.glob("text/*/*.safetensors"))) == 2
    assert not torch.equal(*values)


def test_one_more_name_is_encoded_alone(vision, cache_directory, monkeypatch):
    """In any order, and after so many additions that files are merged."""
    encoded, original = [], TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, names: encoded.append(names) or original(self, names))
    monkeypatch.setattr(text_cache, "MAX_FILES", 3)
    names, expected = [], original(TextEncoder(vision, "one"), [*"abcdefg"])
    for name in "abcdefg":
        names.insert(0, name)
        embeddings = TextEncoder(vision, "one")(names)
        torch.testing.assert_close(embeddings.flip(0), expected[: len(names)], atol=1e-6, rtol=0)
    assert encoded == [[name] for name in "abcdefg"]
    assert len(list(cache_directory.glob("text/*/*.safetensors"))) == 1
    assert len(TextEncoder(vision, "one")(["c", "a", "c"])) == 3 and len(encoded) == 7


def other_bytes(path):
    path.write_bytes(b"damaged")


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def rewritten(change):
    """Return what writes changed embeddings, with a digest that fits them."""

    def damage(path):
        with safe_open(path, "pt") as file:
            embeddings, metadata = change(file.get_tensor("embeddings")).contiguous(), file.metadata()
        digest = hashlib.sha256(embeddings.numpy().data).hexdigest()
        save_file({"embeddings": embeddings}, path, {**metadata, "sha256": digest})

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        other_bytes,
        one_bit,
        rewritten(lambda x: x[:3]),
        rewritten(lambda x: x[:, :16]),
        rewritten(lambda x: x.double()),
        rewritten(lambda x: x * 1.01),
        rewritten(lambda x: x.index_fill(0, torch.tensor([2]), float("nan"))),
    ],
)
def test_damaged_cache_is_encoded_again(vision, cache_directory, damage, caplog):
    first = TextEncoder(vision, "one")(NAMES)
    [path] = cache_directory.glob("text/*/*.safetensors")
    damage(path)
    assert torch.equal(TextEncoder(vision, "one")(NAMES), first) and "are damaged" in caplog.text
    caplog.clear()
    assert torch.equal(TextEncoder(vision, "one")(NAMES), first) and not caplog.text


def test_weights_are_hashed_once_per_change(vision, monkeypatch):
    vision, hashed = copy.deepcopy(vision), []
    monkeypatch.setattr(text_encoder, "fingerprint", lambda *args: hashed.append(0) or fingerprint(*args))
    encoder = TextEncoder(vision, "one")
    before = encoder(["cup"])
    assert torch.equal(encoder(["cup"]), before) and len(encoder(["a", "b"])) == 2 and len(hashed) == 1
    with torch.no_grad():
        vision.clip_model.text_projection.mul_(-1)
    torch.testing.assert_close(encoder(["cup"]), -before)
    assert len(hashed) == 2
    clip_model = vision.clip_model
    clip_model.load_state_dict({**clip_model.state_dict(), "text_projection": -clip_model.text_projection.clone()})
    torch.testing.assert_close(encoder(["cup"]), before)
    assert len(hashed) == 3
    convert_weights(clip_model)
    encoder(["cup"])
    assert len(hashed) == 4


def test_synonyms_are_averaged(vision):
    encoder = TextEncoder(vision, "one")
    cup, mug, table = encoder(["cup", "mug", "table"])
    encoded = encoder(load_vocabulary({"vessel": ["cup", "mug"], "cup": ["cup"], "other": "table"}))
    torch.testing.assert_close(encoded, torch.stack([F.normalize(cup + mug, dim=0), cup, table]))
    again = TextEncoder(vision, "one")(load_vocabulary({"vessel": ["mug", "cup"], "cup": ["cup"], "other": "table"}))
    torch.testing.assert_close(again, encoded)  # from another file


def test_stuck_lock_is_reported_and_ignored(vision, cache_directory, monkeypatch, caplog):
    expected = TextEncoder(vision, "one")(NAMES)
    [path] = cache_directory.glob("text/*/*.safetensors")
    path.unlink()
    monkeypatch.setattr(text_cache, "LOCK_TIMEOUTS", (0.1, 0.1))
    held = subprocess.Popen(
        ["flock", path.parent / "lock", "sh", "-c", "echo held; exec sleep 60"], stdout=subprocess.PIPE
    )
    try:
        assert held.stdout.readline() == b"held\n"
        assert torch.equal(TextEncoder(vision, "one")(NAMES), expected)
    finally:
        held.kill()
    assert "another process has held" in caplog.text and path.parent.name in caplog.text and path.is_file()


def test_non_finite_embeddings_are_refused(vision, cache_directory):
    vision = copy.deepcopy(vision)
    torch.nn.init.constant_(vision.clip_model.text_projection, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        TextEncoder(vision, "one")(NAMES)
    assert not list(cache_directory.glob("text/*/*.safetensors"))


def test_autocast_and_inference_mode_change_nothing(vision):
    plain = TextEncoder(vision, "one").encode(NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        inside = TextEncoder(vision, "one")(NAMES)
    assert torch.equal(plain, inside) and not inside.is_inference()


def test_unwritable_cache_is_ignored(vision, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path / "file" / "below"))
    assert TextEncoder(vision, "one")(NAMES).shape == (4, 32)


def test_too_long_name_is_refused(vision):
    with pytest.raises(ValueError, match="'endless .* too long"):
        TextEncoder(vision, "one")(["cup", "endless " * 80])
