"""RegionSpot on one's own images: ``set_image`` once, ``predict`` as often as wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from numpy.typing import ArrayLike

from regionspot.checkpoint import load_model
from regionspot.modeling.localizer import LocalizerOutput
from regionspot.modeling.recognizer import ImageFeatures, RegionRecognizer
from regionspot.structures import Prompts, check_boxes

UNKNOWN = "unknown"


@dataclass
class RegionPredictions:
    """What RegionSpot says of N regions of an image, in the order of the prompts.

    Attributes:
        boxes: (N, 4) float32, XYXY, original pixels: the given boxes, or those around the masks.
        classes: (N,) int64, index of the best class in ``vocabulary``.
        labels: N names of the best classes, "unknown" for unknown regions.
        scores: (N,) float32, probability of the best class.
        top_classes: (N, k) int64, the k best classes, best first.
        top_scores: (N, k) float32, their probabilities.
        logits: (N, K) float32.
        iou: (N,) float32, SAM's own estimate of the mask's IoU.
        masks: (N, H, W) bool, original pixels; None when not asked for.
        vocabulary: K class names.
        unknown: (N,) bool, regions of no class (``MODEL.REGIONSPOT.UNKNOWN``).
    """

    boxes: np.ndarray
    classes: np.ndarray
    labels: list[str]
    scores: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    logits: np.ndarray
    iou: np.ndarray
    masks: np.ndarray | None
    vocabulary: list[str]
    unknown: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class RegionSpotPredictor:
    """Recognises regions of single images; the image encoders run once an image."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build the model of ``cfg`` and load its weights (``MODEL.WEIGHTS``, SAM's and CLIP's)."""
        self.model, checkpointer = load_model(cfg)
        # Parts without weights from any file: "trained", "sam", "clip_model". What they say means nothing.
        self.random_parts = sorted({"trained", "sam", "clip_model"} - checkpointer.loaded)
        self._features: ImageFeatures | None = None

    @property
    def recognizer(self) -> RegionRecognizer:
        return self.model.recognizer

    @property
    def vocabulary(self) -> list[str]:
        """Class names in use."""
        return self.recognizer.vocabulary

    def set_vocabulary(self, names: str | Sequence[str]) -> None:
        """Recognise ``names`` from now on: a list, "a,b,c" or "@file" (see ``load_vocabulary``)."""
        self.recognizer.set_vocabulary(names)

    @torch.no_grad()
    def set_image(self, image: np.ndarray) -> None:
        """Encode an image.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            ValueError: another shape or dtype.
        """
        self._features = None  # an image that is refused must not leave the one before in place
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got shape {image.shape} and dtype {image.dtype}")
        tensor = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
        self._features = self.recognizer.encode_images([tensor])

    @torch.no_grad()
    def predict(
        self,
        boxes: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        vocabulary: str | Sequence[str] | None = None,
        top_k: int = 5,
        with_masks: bool = True,
    ) -> RegionPredictions:
        """Recognise N regions of the image that was set.

        A region is given by a box, by points, by a mask, or by several of them together.

        Args:
            boxes: (N, 4), XYXY, original pixels.
            points: (N, P, 2), XY, original pixels.
            labels: (N, P): 1 foreground, 0 background, -1 padding; all 1 by default.
            masks: (N, H, W) bool (or 0 and 1, or 0 and 255), original pixels. Alone, a mask also prompts with the box
                around it.
            vocabulary: class names from now on, see ``set_vocabulary``.
            top_k: how many best classes to give.
            with_masks: whether to compute masks.

        Raises:
            RuntimeError: no image was set.
            ValueError: a prompt of wrong shape or outside the image, or no vocabulary.
        """
        if self._features is None:
            raise RuntimeError("no image is set: call set_image(image) first")
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        prompts = self._prompts(boxes, points, labels, masks)
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        [output] = self.recognizer.locate(self._features, [prompts], with_masks or prompts.boxes is None)
        [logits] = self.recognizer.classify([output.tokens], self._features.feature_map, with_background=True)
        return self._predictions(prompts, output, logits, top_k, with_masks)

    def _prompts(
        self, boxes: ArrayLike | None, points: ArrayLike | None, labels: ArrayLike | None, masks: ArrayLike | None
    ) -> Prompts:
        assert self._features is not None
        size = self._features.sizes[0]
        given = {}
        if masks is not None:
            given["masks"], around = self._mask_prompts(np.asarray(masks), size)
            if boxes is None and points is None:
                boxes = around
        if boxes is not None:
            given["boxes"] = _float_tensor(boxes, "boxes", "(N, 4)")
            if given["boxes"].numel() == 0:
                given["boxes"] = given["boxes"].reshape(0, 4)
            check_boxes(given["boxes"], size)
        if labels is not None and points is None:
            raise ValueError("labels are given without points")
        if points is not None:
            given["points"] = _float_tensor(points, "points", "(N, P, 2)")
            given["point_labels"] = self._point_labels(given["points"], labels, size)
        return Prompts(**given)

    def _mask_prompts(self, masks: np.ndarray, size: tuple[int, int]) -> tuple[torch.Tensor, np.ndarray]:
        if masks.ndim != 3 or masks.shape[1:] != size:
            raise ValueError(f"masks: expected shape (N, {size[0]}, {size[1]}), the image's size, got {masks.shape}")
        if masks.dtype != bool and not (np.issubdtype(masks.dtype, np.integer) and np.isin(masks, (0, 1, 255)).all()):
            raise ValueError(
                f"masks: expected bool, or integers 0 and 1 (or 255), got {masks.dtype}; cut logits at 0 first"
            )
        binary = torch.from_numpy(masks.astype(bool))
        if not binary.flatten(1).any(dim=1).all():
            raise ValueError(f"masks: number {int((~binary.flatten(1).any(dim=1)).nonzero()[0])} is empty")
        prompts = self.recognizer.localizer.mask_prompts(binary.to(self.model.device), size)
        return prompts, boxes_of_masks(binary.numpy())

    @staticmethod
    def _point_labels(points: torch.Tensor, labels: ArrayLike | None, size: tuple[int, int]) -> torch.Tensor:
        if points.dim() != 3 or points.shape[2] != 2 or 0 in points.shape[1:]:
            raise ValueError(f"points: expected shape (N, P, 2), XY in pixels, got {tuple(points.shape)}")
        given = torch.ones(points.shape[:2]) if labels is None else _float_tensor(labels, "labels", "(N, P)")
        if given.shape != points.shape[:2]:
            raise ValueError(
                f"labels: expected shape {tuple(points.shape[:2])}, one for each point, got {tuple(given.shape)}"
            )
        if not torch.isin(given, torch.tensor([-1.0, 0.0, 1.0])).all():
            raise ValueError("labels: expected 1 (foreground), 0 (background) or -1 (padding)")
        if (given == -1).all(dim=1).any():
            raise ValueError("labels: a region has padding (-1) only; expected at least one point")
        inside = (points >= 0).all(dim=2) & (points[..., 0] < size[1]) & (points[..., 1] < size[0])  # NaN is outside
        if not (inside | (given == -1)).all():
            index = (~(inside | (given == -1))).nonzero()[0].tolist()
            raise ValueError(
                f"points: {points[tuple(index)].tolist()} lies outside the image "
                f"of height {size[0]} and width {size[1]}"
            )
        return given.long()

    def _predictions(
        self, prompts: Prompts, output: LocalizerOutput, logits: torch.Tensor, top_k: int, with_masks: bool
    ) -> RegionPredictions:
        assert self._features is not None
        size = self._features.sizes[0]
        masks = (
            None
            if output.masks is None
            else self.recognizer.localizer.upsample_masks(output.masks, size, size).cpu().numpy()
        )
        names = self.vocabulary
        probabilities = self.recognizer.probabilities(logits)
        unknown = self.recognizer.rule.is_unknown(probabilities)
        top_scores, top_classes = probabilities[:, : len(names)].topk(min(top_k, len(names)), dim=1)
        boxes = prompts.clip(size).boxes
        if boxes is None:
            assert masks is not None
            boxes = torch.from_numpy(boxes_of_masks(masks))
        return RegionPredictions(
            boxes=boxes.cpu().numpy(),
            classes=top_classes[:, 0].cpu().numpy(),
            labels=[UNKNOWN if u else names[i] for i, u in zip(top_classes[:, 0].tolist(), unknown.tolist())],
            scores=top_scores[:, 0].cpu().numpy(),
            top_classes=top_classes.cpu().numpy(),
            top_scores=top_scores.cpu().numpy(),
            logits=logits[:, : len(names)].cpu().numpy(),
            iou=output.iou.cpu().numpy(),
            masks=masks if with_masks else None,
            vocabulary=names,
            unknown=unknown.cpu().numpy(),
        )


def _float_tensor(value: ArrayLike, what: str, shape: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected numbers of shape {shape}, got {str(value)[:80]}") from error


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Return the (N, 4) float32 boxes, XYXY, around (N, H, W) bool masks; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
