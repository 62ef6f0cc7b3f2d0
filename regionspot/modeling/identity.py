"""What features were made by: fingerprints of the parts of a recognizer."""

import json
from typing import Any

import torch

from regionspot.checkpoint.formats import fingerprint
from regionspot.utils.files import short_hash


def describe_sam(recognizer: Any) -> dict[str, Any]:
    """Return what tokens depend on: the localizer, its weights and their source, and which of its masks is taken."""
    return {
        "source": _describe_source(recognizer.weight_sources["sam"], recognizer.localizer.dtype),
        "fingerprint": fingerprint(recognizer.localizer.sam.state_dict(), recognizer.localizer.setup),
        "multimask": recognizer.localizer.multimask,
        "localizer": type(recognizer.localizer).__name__,
        "variant": recognizer.localizer.variant,
    }


def describe_clip(recognizer: Any) -> dict[str, Any]:
    """Return what feature maps depend on: CLIP's image encoder, and which of its outputs are taken."""
    vision = recognizer.vision_language
    return {
        "source": _describe_source(recognizer.weight_sources["clip_model"], vision.dtype),
        "fingerprint": fingerprint(vision.image_weights(), vision.image_setup),
        "part": vision.features,
    }


def describe_trained(recognizer: Any) -> dict[str, Any]:
    """Return what semantic tokens depend on beside SAM and CLIP: the trained module."""
    return {
        "source": recognizer.weight_sources["trained"],
        "fingerprint": fingerprint(
            recognizer.knowledge_integration.state_dict(), json.dumps(recognizer.settings, sort_keys=True)
        ),
    }


def describe_text(recognizer: Any) -> dict[str, Any]:
    """Return what text embeddings depend on: CLIP's text encoder, templates, and how names are cleaned."""
    text, vision = recognizer.classifier.text_encoder, recognizer.vision_language
    return {
        "source": recognizer.weight_sources["clip_model"],
        "fingerprint": fingerprint(vision.text_weights(), vision.text_setup),
        "templates": f"{len(text.templates)} {short_hash(repr(list(text.templates)))}",
        "name_style": text.name_style,
    }


def describe_model(recognizer: Any) -> dict[str, dict[str, Any]]:
    """Return what embeddings of regions depend on, and the texts that are compared with them."""
    return {
        "sam": describe_sam(recognizer),
        "clip": describe_clip(recognizer),
        "trained": describe_trained(recognizer),
        "text": describe_text(recognizer),
    }


def fingerprints(recognizer: Any, with_regions: bool) -> dict[str, str]:
    """Return a fingerprint of each part that embeddings of texts depend on, and with those of regions."""
    parts = {"text encoder": describe_text}
    if with_regions:
        parts |= {"SAM": describe_sam, "CLIP": describe_clip, "attention module": describe_trained}
    return {name: _summarize(describe(recognizer)) for name, describe in parts.items()}


def _summarize(part: dict[str, Any]) -> str:
    others = [str(value) for key, value in part.items() if key not in ("source", "fingerprint", "variant")]
    return " ".join([part["fingerprint"][:32], *others])


def _describe_source(source: str, dtype: torch.dtype) -> str:
    return source if dtype == torch.float32 else f"{source} in {str(dtype).removeprefix('torch.')}"
