"""Models of the library open_clip by name: their configs, and the models with random weights."""

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from regionspot.utils.files import expand_user, read_json

NAME, WEIGHTS = "MODEL.REGIONSPOT.CLIP.NAME", "MODEL.REGIONSPOT.CLIP.WEIGHTS"
# OpenAI's files by the names that `ClipVisionLanguageModel` has for them.
OPENAI_TAGS = {
    "ViT-B/32": "ViT-B-32/openai",
    "ViT-B/16": "ViT-B-16/openai",
    "ViT-L/14": "ViT-L-14/openai",
    "ViT-L/14@336px": "ViT-L-14-336/openai",
}
QUICK = "-quickgelu"  # names of open_clip's configs that differ in the activation alone
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenClipConfig:
    """What distinguishes one model of open_clip from another.

    Attributes:
        name: of the model, or the path of its JSON file.
        model: open_clip's own config, with ``embed_dim``, ``vision_cfg`` and ``text_cfg``.
        mean, std: of the input, RGB in [0, 1].
    """

    name: str
    model: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def tokenizer(self) -> str:
        """A directory or a repository of the Hugging Face hub with ``tokenizer.json``; "" for CLIP's own tokenizer."""
        source = self.model["text_cfg"].get("hf_tokenizer_name") or ""
        beside = expand_user(self.name).parent / source
        return str(beside) if source and self.name.endswith(".json") and beside.is_dir() else source

    def describe(self, part: str) -> str:
        """Return the settings of "vision_cfg" or "text_cfg" that its outputs depend on beside weights."""
        # where the tokenizer's files come from does not matter, what is in them does
        settings = {key: value for key, value in self.model[part].items() if key != "hf_tokenizer_name"}
        return json.dumps([settings, self.model.get("quick_gelu", False)], sort_keys=True)


def import_open_clip(name: str) -> ModuleType:
    """Return the library, which is optional; ``name`` is the model that needs it."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"the model {name} needs open_clip: pip install 'regionspot[models]'") from error
    return open_clip


def read_open_clip_config(name: str, weights: str = "") -> OpenClipConfig:
    """Return the config of a model.

    Args:
        name: one of ``open_clip.list_models()``, or the path of a JSON file: a config as open_clip's own, or an
            ``open_clip_config.json`` with ``model_cfg`` and ``preprocess_cfg``. A directory that its
            ``hf_tokenizer_name`` names is relative to the file.
        weights: ``CLIP.WEIGHTS``. For ``<model>/<tag>`` of ``open_clip.list_pretrained()``, mean, std and activation
            are those of the tag.

    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError, ValueError: no such model, a damaged file, weights of another model, or a model without what
            is needed here.
    """
    open_clip = import_open_clip(name)
    if name.endswith(".json"):
        content = _read_json_config(name)
        model, pixels = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    elif name in open_clip.list_models():
        model, pixels = open_clip.get_model_config(name), _read_tag(open_clip, name, weights)
        if "quick_gelu" in pixels:
            model["quick_gelu"] = pixels["quick_gelu"]
    else:
        near = difflib.get_close_matches(name.replace("/", "-"), open_clip.list_models(), 5, 0.4) or ["ViT-B-16"]
        known = f"a model of open_clip.list_models(), such as {', '.join(near)}, or a JSON file"
        raise ValueError(f"{NAME}: expected {known}; got {name!r}")
    if reason := _find_unsupported(model):
        raise ValueError(f"{NAME}: {name} {reason}")
    mean = pixels.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = pixels.get("std") or open_clip.OPENAI_DATASET_STD
    return OpenClipConfig(name, model, tuple(mean), tuple(std))


def _read_json_config(path: str) -> dict[str, Any]:
    content = read_json(expand_user(path), NAME)
    model = content.get("model_cfg", content) if isinstance(content, dict) else {}
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
        raise ValueError(f"{NAME} {path}: expected embed_dim, vision_cfg and text_cfg as in open_clip's configs")
    return content


def _read_tag(open_clip: ModuleType, name: str, weights: str) -> dict[str, Any]:
    """Return open_clip's settings for known weights, or those that all known weights of a model have in common."""
    model, _, tag = OPENAI_TAGS.get(weights, weights).partition("/")
    if open_clip.is_pretrained_cfg(model, tag):
        if model.removesuffix(QUICK) != name.removesuffix(QUICK):
            raise ValueError(f"{WEIGHTS}: expected weights of {name}, the model of {NAME}; got {weights!r}")
        return {"quick_gelu": False, **open_clip.get_pretrained_cfg(model, tag)}
    tags = open_clip.list_pretrained_tags_by_model(name)
    common = [{key: open_clip.get_pretrained_cfg(name, tag)[key] for key in ("mean", "std")} for tag in tags]
    if any(settings != common[0] for settings in common):
        logger.warning(
            "%s: weights of %s have different means and standard deviations, and %s does not tell which; using those "
            "of %s. Give <model>/<tag>, or a JSON file with preprocess_cfg",
            NAME, name, WEIGHTS, tags[0],
        )  # fmt: skip
    activations = {open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False) for tag in tags}
    if weights and len(activations) > 1:
        logger.warning(
            "%s: some weights of %s need QuickGELU, and %s does not tell whether these do; using the activation of %s. "
            "Give <model>/<tag>, or the name with %s",
            NAME, name, WEIGHTS, NAME, QUICK,
        )  # fmt: skip
    return common[0] if common else {}


def _find_unsupported(model: dict[str, Any]) -> str:
    """Return why a model cannot be used, "" if it can."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    options = text.get("tokenizer_kwargs") or {}
    if "multimodal_cfg" in model or text.get("embed_cls"):
        return "is a CoCa, whose text encoder is not supported"
    if text.get("hf_model_name"):
        return f"has the text encoder {text['hf_model_name']} of transformers, which is not supported"
    if isinstance(vision.get("layers"), Sequence):
        return "has a ResNet, expected an image encoder with patch tokens: a vision transformer"
    is_plain = set(options) <= {"clean"} and (text.get("hf_tokenizer_name") or not options)
    if text.get("tokenizer_mode") or not is_plain:
        return f"has a tokenizer with options that are not supported: {text.get('tokenizer_mode') or options}"
    return ""


def build_open_clip(config: OpenClipConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model of open_clip with random weights, in float32; its layer norms fit ``dtype``.

    Raises:
        ValueError: open_clip refuses the config, or the image encoder has no patch tokens.
    """
    open_clip = import_open_clip(config.name)
    import timm
    from timm.models import Eva
    from timm.models import VisionTransformer as TimmVisionTransformer

    model = dict(config.model)
    vision = {**model.pop("vision_cfg"), "timm_model_pretrained": False}
    trunk = vision.get("timm_model_name")
    if trunk and not timm.is_model(trunk):  # "hf-hub:..." would fetch it
        raise ValueError(f"{NAME}: {config.name} has the image encoder {trunk!r}, which is none of timm's models")
    kind = open_clip.CustomTextCLIP if model.pop("custom_text", False) else open_clip.CLIP
    try:
        clip_model = kind(vision_cfg=vision, cast_dtype=dtype, **model)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{NAME}: open_clip cannot build {config.name} ({error})") from error
    visual = clip_model.visual
    encoder = visual.trunk if trunk else visual
    if not isinstance(encoder, (open_clip.transformer.VisionTransformer, TimmVisionTransformer, Eva)):
        raise ValueError(
            f"{NAME}: {config.name} has the image encoder {type(encoder).__name__}, expected one with patch tokens: "
            "a vision transformer"
        )
    if visual.image_size[0] != visual.image_size[1]:
        raise ValueError(f"{NAME}: {config.name} has an input of {visual.image_size}, expected a square")
    return clip_model
