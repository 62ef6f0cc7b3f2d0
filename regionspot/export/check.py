"""Whether an export gives what PyTorch gives: from the image's pixels to logits and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes

from regionspot.export.onnx_predictor import OnnxRegionPredictor, RegionPredictions
from regionspot.export.torch_export import TorchRegionPredictor
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import ImageFeatures, Prompts

NUM_BOXES = (1, 7, 100)
OTHER_NAMES = ("person", "dog", "bicycle", "cup", "traffic light")
# Of an output's greatest difference, relative to its greatest value where that is above 1.
TOLERANCES = {"float32": 1e-3, "fp16": 5e-2}


@dataclass(frozen=True)
class Difference:
    """The greatest difference of an output over all numbers of boxes and vocabularies.

    Attributes:
        absolute: of any of its numbers.
        relative: ``absolute``, divided by the output's greatest absolute value if that is above 1.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def update(self, expected: np.ndarray, actual: np.ndarray) -> "Difference":
        """Return the greater of this and the difference of two arrays; NaN is infinitely different."""
        difference = np.nan_to_num(np.abs(expected.astype(np.float64) - actual).max(initial=0), nan=np.inf)
        scale = max(np.abs(expected).max(initial=0), 1.0)
        return Difference(max(self.absolute, float(difference)), max(self.relative, float(difference / scale)))


@torch.no_grad()
def check_export(
    recognizer: RegionRecognizer,
    directory: Path,
    file_format: str,
    precision: str,
    num_boxes: Sequence[int] = NUM_BOXES,
) -> dict[str, Any]:
    """Compare an export with the recognizer in float32, on one drawn image, two vocabularies and numbers of boxes.

    Args:
        recognizer: what was exported.
        directory: the export.
        file_format, precision: the export's.
        num_boxes: numbers of boxes to try.

    Returns:
        The tolerance, the numbers of boxes and of names, and each output's greatest ``Difference``.

    Raises:
        ValueError: an output that differs by more than the tolerance.
    """
    predictor = {"onnx": OnnxRegionPredictor, "torch": TorchRegionPredictor}[file_format](directory)
    image, boxes = draw_check(recognizer, max(num_boxes))
    features = recognizer.encode_images([torch.from_numpy(image).permute(2, 0, 1)])
    predictor.set_image(image)
    vocabularies: dict[tuple[str, ...], torch.Tensor] = {tuple(recognizer.vocabulary): recognizer.classifier.embeddings}
    vocabularies[OTHER_NAMES] = recognizer.encode_vocabulary(list(OTHER_NAMES))[1]
    differences: dict[str, Difference] = {}
    for count in num_boxes:
        for names, embeddings in vocabularies.items():
            expected = _predict(recognizer, features, boxes[:count], embeddings)
            predictor.set_vocabulary(list(names), embeddings.cpu().numpy())
            actual = _outputs(predictor.predict(boxes=boxes[:count], top_k=len(names)))
            for output, value in expected.items():
                differences[output] = differences.get(output, Difference()).update(value, actual[output])
    tolerance = TOLERANCES[precision]
    for output, difference in differences.items():
        if not difference.relative <= tolerance:
            raise ValueError(
                f"export: {output} differs from PyTorch's by {difference.absolute:.2g}, {difference.relative:.2g} of "
                f"its greatest value, in {precision}; the tolerance is {tolerance:g}"
            )
    return {
        "tolerance": tolerance,
        "num_boxes": list(num_boxes),
        "num_names": [len(names) for names in vocabularies],
        "differences": {output: vars(difference) for output, difference in differences.items()},
    }


def draw_check(recognizer: RegionRecognizer, num_boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a (H, W, 3) uint8 image of colored noise, wider than high, and (N, 4) float32 boxes in it, XYXY."""
    side = recognizer.localizer.input_size((1, 1))[0]  # the longer side of SAM's input
    height, width = side * 5 // 8, side * 5 // 4
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((1, 3, 6, 9), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0).numpy()
    noise = generator.normal(0, 8, smooth.shape)
    image = (255 * smooth + noise).clip(0, 255).astype(np.uint8)
    first = generator.random((num_boxes, 2)) * 0.7
    last = first + 0.1 + generator.random((num_boxes, 2)) * 0.3  # some end outside the image, where they are clipped
    scale = np.array([width, height])
    return image, np.concatenate([first * scale, last * scale], axis=1).astype(np.float32)


def _predict(
    recognizer: RegionRecognizer, features: ImageFeatures, boxes: np.ndarray, embeddings: torch.Tensor
) -> dict[str, np.ndarray]:
    [output] = recognizer.locate(features, [Prompts(boxes=Boxes(boxes).tensor)], with_masks=True, with_iou=True)
    [logits] = recognizer.classify([output.tokens], features.feature_map, [embeddings], with_background=True)
    assert output.iou is not None and output.masks is not None
    outputs = {
        "logits": logits[:, : len(embeddings)],
        "probabilities": recognizer.rule.probabilities(logits)[:, : len(embeddings)],
        "predicted_ious": output.iou,
        "mask_logits": output.masks,
    }
    return {name: value.float().cpu().numpy() for name, value in outputs.items()}


def _outputs(predictions: RegionPredictions) -> dict[str, np.ndarray]:
    assert predictions.mask_logits is not None
    order = np.argsort(predictions.top_classes, axis=1)
    return {
        "logits": predictions.logits,
        "probabilities": np.take_along_axis(predictions.top_scores, order, axis=1),
        "predicted_ious": predictions.predicted_ious,
        "mask_logits": predictions.mask_logits,
    }
