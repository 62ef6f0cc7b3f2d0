"""The recognizer as ``torch.export`` programs, with any numbers of regions, points and names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from regionspot.export.modules import ImageEncoders, RegionClassifier, RegionDecoder, parts_of
from regionspot.export.onnx_predictor import OnnxRegionPredictor
from regionspot.modeling.recognizer import RegionRecognizer

Shape = tuple[int | str, ...]  # of an input; a dynamic dimension has its name
PRECISIONS = {"float32": torch.float32, "fp16": torch.float16}
# Programs of an export, in the order in which they run.
MODELS = ("image_encoders", "region_decoder", "region_classifier")
# The most regions, points of a region, and names that a program takes.
DIMS = {
    "regions": Dim("regions", max=1 << 20),
    "points": Dim("points", max=1 << 10),
    "names": Dim("names", max=1 << 20),
}


@dataclass(frozen=True)
class Traced:
    """A program with the names of its inputs and outputs.

    Attributes:
        program: takes the inputs in their order.
        inputs: name and shape of each.
        outputs: names.
    """

    program: ExportedProgram
    inputs: dict[str, Shape]
    outputs: tuple[str, ...]


def trace(
    recognizer: RegionRecognizer, precision: str = "float32", models: Sequence[str] = MODELS
) -> dict[str, Traced]:
    """Return programs of a recognizer, which stays as it is.

    Args:
        recognizer: with SAM and CLIP; with ``CLIP.FEATURES`` none there are no inputs for CLIP's image and feature map.
        precision: of weights and arithmetic, "float32" or "fp16"; inputs and outputs are float32.
        models: which of ``MODELS``.

    Raises:
        ValueError: an unknown precision, or parts other than SAM and CLIP.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    parts_of(recognizer)
    kinds = {"image_encoders": ImageEncoders, "region_decoder": RegionDecoder, "region_classifier": RegionClassifier}
    inputs, outputs = describe_inputs(recognizer), describe_outputs(recognizer)
    return {
        name: _trace(kinds[name](recognizer, PRECISIONS[precision]), inputs[name], outputs[name]) for name in models
    }


def describe_inputs(recognizer: RegionRecognizer) -> dict[str, dict[str, Shape]]:
    """Return the shape of each input of each model."""
    localizer, vision_language = parts_of(recognizer)
    side, prompt_encoder = localizer.image_size, localizer.sam.prompt_encoder
    images: dict[str, Shape] = {"sam_image": (1, 3, side, side)}
    features: dict[str, Shape] = {}
    if vision_language.features != "none":
        visual = vision_language.clip_model.visual
        length, width = visual.positional_embedding.shape
        images["clip_image"] = (1, 3, visual.input_resolution, visual.input_resolution)
        features["feature_map"] = (1, length - (vision_language.features == "feature_map"), width)
    return {
        "image_encoders": images,
        "region_decoder": {
            "image_embeddings": (1, prompt_encoder.embed_dim, *prompt_encoder.image_embedding_size),
            "point_coords": ("regions", "points", 2),
            "point_labels": ("regions", "points"),
        },
        "region_classifier": {
            "tokens": ("regions", localizer.token_dim),
            "text_embeddings": ("names", vision_language.text_dim),
            **features,
        },
    }


def describe_outputs(recognizer: RegionRecognizer) -> dict[str, tuple[str, ...]]:
    """Return the names of the outputs of each model."""
    features = () if recognizer.vision_language.features == "none" else ("feature_map",)
    return {
        "image_encoders": ("image_embeddings", *features),
        "region_decoder": ("tokens", "predicted_ious", "masks"),
        "region_classifier": ("logits", "semantic_embeddings"),
    }


@torch.no_grad()
def _trace(module: nn.Module, inputs: dict[str, Shape], outputs: tuple[str, ...]) -> Traced:
    # Different numbers, none of them 1, so that no dimension is taken for another, or for a constant.
    sizes = {"regions": 5, "points": 3, "names": 7}
    example = {}
    for name, shape in inputs.items():
        dtype = torch.int64 if name == "point_labels" else torch.float32
        example[name] = torch.ones([sizes[x] if isinstance(x, str) else x for x in shape], dtype=dtype)
    dynamic = {name: {i: DIMS[x] for i, x in enumerate(shape) if isinstance(x, str)} for name, shape in inputs.items()}
    program = torch.export.export(module.eval(), (), example, dynamic_shapes=dynamic, strict=False)
    return Traced(program, inputs, outputs)


def save_program(traced: Traced, path: Path) -> None:
    """Write a program as a ``.pt2`` file, for ``torch.export.load``."""
    for node in traced.program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    torch.export.save(traced.program, path)


class TorchRegionPredictor(OnnxRegionPredictor):
    """``OnnxRegionPredictor`` over ``torch.export`` programs, on the CPU."""

    def _load(self, providers: list[str] | None) -> dict[str, Any]:
        files = {name: self.directory / model["file"] for name, model in self.description["models"].items()}
        return {name: torch.export.load(file).module() for name, file in files.items()}

    @torch.no_grad()
    def _run(self, model: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs = self._models[model](**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return [output.numpy() for output in outputs]
