"""The recognizer as ``torch.export`` programs, with any numbers of regions, points and names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from regionspot.export.modules import ImageEncoders, RegionClassifier, RegionDecoder
from regionspot.export.onnx_predictor import OnnxRegionPredictor
from regionspot.modeling.recognizer import RegionRecognizer

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
        inputs: name and shape of each; a dynamic dimension has its name.
        outputs: names.
    """

    program: ExportedProgram
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]


def trace(recognizer: RegionRecognizer, precision: str = "float32") -> dict[str, Traced]:
    """Return the programs of ``MODELS``; the recognizer stays as it is.

    Args:
        recognizer: with SAM and CLIP; with ``CLIP.FEATURES`` none there are no inputs for CLIP's image and feature map.
        precision: of weights and arithmetic, "float32" or "fp16"; inputs and outputs are float32.

    Raises:
        ValueError: an unknown precision, or parts other than SAM and CLIP.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    dtype = PRECISIONS[precision]
    encoders, decoder = ImageEncoders(recognizer, dtype), RegionDecoder(recognizer, dtype)
    grid, channels = decoder.position.shape[-1], decoder.position.shape[1]
    sam_image = (1, 3, decoder.image_size, decoder.image_size)
    images: dict[str, tuple[int | str, ...]] = {"sam_image": sam_image}
    encoded, features = ("image_embeddings",), {}
    if encoders.visual is not None:
        side = encoders.visual.input_resolution
        length, width = encoders.visual.positional_embedding.shape
        images["clip_image"] = (1, 3, side, side)
        encoded = ("image_embeddings", "feature_map")
        features = {"feature_map": (1, length - (encoders.features == "feature_map"), width)}
    prompts = {
        "image_embeddings": (1, channels, grid, grid),
        "point_coords": ("regions", "points", 2),
        "point_labels": ("regions", "points"),
    }
    tokens = {
        "tokens": ("regions", recognizer.localizer.token_dim),
        "text_embeddings": ("names", recognizer.vision_language.text_dim),
        **features,
    }
    return {
        "image_encoders": _trace(encoders, images, encoded),
        "region_decoder": _trace(decoder, prompts, ("tokens", "predicted_ious", "masks")),
        "region_classifier": _trace(RegionClassifier(recognizer, dtype), tokens, ("logits", "semantic_embeddings")),
    }


@torch.no_grad()
def _trace(module: nn.Module, inputs: dict[str, tuple[int | str, ...]], outputs: tuple[str, ...]) -> Traced:
    # Different numbers, none of them 1, so that no dimension is taken for another, or for a constant.
    sizes = {"regions": 5, "points": 3, "names": 7}
    example = {}
    for name, shape in inputs.items():
        dtype = torch.int64 if name == "point_labels" else torch.float32
        example[name] = torch.ones([sizes.get(x, x) for x in shape], dtype=dtype)
    dynamic = {name: {i: DIMS[x] for i, x in enumerate(shape) if isinstance(x, str)} for name, shape in inputs.items()}
    # strict takes longer, but knows that len(tensor) in SAM's decoder is no constant
    strict = isinstance(module, RegionDecoder)
    program = torch.export.export(module.eval(), (), example, dynamic_shapes=dynamic, strict=strict)
    return Traced(program, inputs, outputs)


def save_program(traced: Traced, path: Path) -> None:
    """Write a program as a ``.pt2`` file, for ``torch.export.load``."""
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
