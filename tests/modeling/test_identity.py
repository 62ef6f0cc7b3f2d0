"""What tells that features were made by another model: weights, and settings that change no shape."""

import copy

import pytest

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.modeling.identity import describe_model, fingerprints

from ..helpers import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(names=None)


def same_weights(model, *overrides):
    other = tiny_model(*overrides, names=None)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


MODULE = [
    ("INTEGRATION.REGION_ATTENTION", False),
    ("INTEGRATION.PRE_NORM", True),
    ("INTEGRATION.NUM_HEADS", 2),
    ("TOKEN_STAGE", "prompt_encoder"),
    ("CLIP.FEATURES", "feature_map"),
]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *MODULE,
        ("SAM.MULTIMASK", True),
        ("SAM.CUSTOM.DECODER_NUM_HEADS", 1),
        ("CLIP.TEMPLATES", "none"),
        ("CLIP.NAME_STYLE", "readable"),
    ],
)
def test_settings_are_part_of_the_identity(model, key, value):
    one_template = ("MODEL.REGIONSPOT.CLIP.TEMPLATES", "one")
    one, same = (same_weights(model, *one_template) for _ in range(2))
    other = same_weights(model, *one_template, f"MODEL.REGIONSPOT.{key}", value)
    for describe in (describe_model, lambda recognizer: fingerprints(recognizer, with_regions=True)):
        assert describe(one.recognizer) == describe(same.recognizer) != describe(other.recognizer)


@pytest.mark.parametrize(("key", "value"), MODULE)
def test_checkpoint_of_other_settings_is_refused(model, tmp_path, key, value):
    RegionSpotCheckpointer(model, str(tmp_path)).save("mine", is_last=False)
    other = tiny_model(f"MODEL.REGIONSPOT.{key}", value, names=None)
    name = key.rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"trained with MODEL.REGIONSPOT's {name} .*; the config has {name} {value}"):
        RegionSpotCheckpointer(other).load(str(tmp_path / "mine.pth"))
