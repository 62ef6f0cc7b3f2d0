"""Localizers and vision-language models are chosen by name, also those that a user registers."""

import pytest
import torch

from regionspot.modeling.localizers import LOCALIZER_REGISTRY, SamLocalizer
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.vision_language import VISION_LANGUAGE_REGISTRY, ClipVisionLanguageModel

from ..helpers import NAMES, as_inputs, tiny_config, tiny_model

LOCALIZER, VISION_LANGUAGE = "MODEL.REGIONSPOT.LOCALIZER.NAME", "MODEL.REGIONSPOT.VISION_LANGUAGE.NAME"


class OtherLocalizer(SamLocalizer):
    """A user's localizer."""


class BiasedModel(ClipVisionLanguageModel):
    """A vision-language model whose logits have a bias, as SigLIP's."""

    @property
    def logit_bias(self):
        return torch.tensor(-3.0)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for registry, kind in ((LOCALIZER_REGISTRY, OtherLocalizer), (VISION_LANGUAGE_REGISTRY, BiasedModel)):
        monkeypatch.setattr(registry, "_obj_map", {**registry._obj_map, kind.__name__: kind})


def test_models_are_chosen_by_name():
    assert type(RegionRecognizer(tiny_config()).localizer) is SamLocalizer
    recognizer = RegionRecognizer(tiny_config(LOCALIZER, "OtherLocalizer", VISION_LANGUAGE, "BiasedModel"))
    assert type(recognizer.localizer) is OtherLocalizer and type(recognizer.vision_language) is BiasedModel


def test_logit_bias_is_added_once():
    plain, biased = tiny_model(), tiny_model(VISION_LANGUAGE, "BiasedModel", names=NAMES)
    biased.recognizer.load_state_dict(plain.recognizer.state_dict())
    tokens = torch.randn(3, 32)
    torch.testing.assert_close(biased.recognizer.score(tokens), plain.recognizer.score(tokens) - 3)
    [output], [expected] = biased([as_inputs(0)]), plain([as_inputs(0)])
    # softmax does not see a bias
    torch.testing.assert_close(output["regions"].top_scores, expected["regions"].top_scores)


@pytest.mark.parametrize(("key", "known"), [(LOCALIZER, "SamLocalizer"), (VISION_LANGUAGE, "ClipVisionLanguageModel")])
def test_unknown_names_are_refused(key, known):
    with pytest.raises(ValueError, match=f"{key}: expected one of {known}.*; got 'Sam9'"):
        RegionRecognizer(tiny_config(key, "Sam9"))
