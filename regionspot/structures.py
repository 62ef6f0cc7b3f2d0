"""Images and their regions: features, prompts, valid boxes, regions in Detectron2's proposals and annotations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import ArrayLike
from torchvision.ops import nms

MIN_SIDE = 1e-5  # pixels; Detectron2's filter of empty boxes drops smaller ones


@dataclass
class Prompts:
    """N regions of one image, each described by a box, points, a mask, or several of them.

    Attributes:
        boxes: (N, 4) float, XYXY pixels.
        points: (N, P, 2) float, XY pixels.
        point_labels: (N, P) int: 1 foreground, 0 background, -1 padding.
        masks: (N, 1, h, w) float mask logits at SAM's low resolution (256 x 256 at full size), over the padded
            square input.

    Boxes and points are in the same frame, which depends on the caller.
    """

    boxes: torch.Tensor | None = None
    points: torch.Tensor | None = None
    point_labels: torch.Tensor | None = None
    masks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.point_labels is None):
            raise ValueError("points and point labels go together: got one without the other")
        lengths = {name: len(value) for name, value in self._tensors().items()}
        if not lengths:
            raise ValueError("no prompts: expected boxes, points with labels, or masks")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected as many boxes, points and masks as regions, got {lengths}")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __len__(self) -> int:
        return len(next(iter(self._tensors().values())))

    def __getitem__(self, index: slice) -> "Prompts":
        return Prompts(**{name: value[index] for name, value in self._tensors().items()})

    @staticmethod
    def cat(prompts: Sequence["Prompts"]) -> "Prompts":
        """Join prompts that have the same parts, in their order."""
        if len(prompts) == 1:
            return prompts[0]
        parts = [x._tensors() for x in prompts]
        return Prompts(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def to(self, device: torch.device) -> "Prompts":
        return Prompts(**{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def clip(self, image_size: tuple[int, int]) -> "Prompts":
        """Return the prompts, in the frame of an image of (height, width), with their boxes clipped to it."""
        if self.boxes is None:
            return self
        height, width = image_size
        limit = torch.tensor([width, height, width, height]).to(self.boxes, non_blocking=True)
        return replace(self, boxes=self.boxes.clamp(min=torch.zeros_like(limit), max=limit))

    def scale(self, scale_x: float, scale_y: float) -> "Prompts":
        """Return the prompts with boxes and points multiplied by the factors."""
        # Masks are logits at SAM's low resolution over its input, whatever the size of the image.
        factors = torch.tensor([scale_x, scale_y])
        scaled = {}
        if self.boxes is not None:
            scaled["boxes"] = self.boxes * factors.repeat(2).to(self.boxes, non_blocking=True)
        if self.points is not None:
            scaled["points"] = self.points * factors.to(self.points, non_blocking=True)
        return replace(self, **scaled)


@dataclass
class ImageFeatures:
    """What the frozen encoders give for B images.

    Attributes:
        embeddings: (B, C, h, w) float, SAM's image embeddings; None where SAM is not run.
        feature_map: (B, L, width) float, CLIP's semantic feature map, or None without CLIP's features.
        sizes: (height, width) of each image as it was given.
        images: the images themselves where crops of them are recognized (``CropBaseline``), else None.
        dense_features: (B, grid^2, text_dim) float, CLIP's patches in the space of text embeddings, for a
            ``GeometricEnsemble``, else None.
    """

    embeddings: torch.Tensor | None
    feature_map: torch.Tensor | None
    sizes: list[tuple[int, int]]
    images: list[torch.Tensor] | None = None
    dense_features: torch.Tensor | None = None


def check_image_format(image_format: str, option: str = "INPUT.FORMAT") -> str:
    """Return ``image_format`` if it is valid, or raise a ValueError that names the option."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"{option}: expected RGB or BGR, got {image_format!r}")
    return image_format


def to_rgb(image: torch.Tensor, image_format: str) -> torch.Tensor:
    """Return a (3, H, W) image of ``image_format`` in RGB."""
    return image if image_format == "RGB" else image.flip(0)


def check_boxes(boxes: torch.Tensor, image_size: tuple[int, int], what: str = "boxes") -> None:
    """Refuse invalid boxes: of wrong shape, with NaN or infinity, without area, or wholly outside the image.

    Args:
        boxes: (N, 4) float, XYXY pixels.
        image_size: (height, width) of the image whose frame the boxes are in.
        what: name of the boxes in the message.

    Raises:
        ValueError: the first invalid box.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{what}: expected shape (N, 4), XYXY in pixels, got {tuple(boxes.shape)}")
    height, width = image_size
    x0, y0, x1, y1 = boxes.unbind(1)
    # Boxes that are partly outside are valid: they are clipped later.
    is_outside = (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0)
    for problem, is_invalid in (
        ("holds NaN or infinity", ~torch.isfinite(boxes).all(dim=1)),
        ("has no area (expected x0 < x1 and y0 < y1, XYXY)", (x1 <= x0) | (y1 <= y0)),
        (f"lies outside the image of height {height} and width {width}", is_outside),
    ):
        if is_invalid.any():
            index = int(is_invalid.nonzero()[0])
            raise ValueError(f"{what}: number {index}, {boxes[index].tolist()}, {problem}")


def check_points(points: torch.Tensor, labels: ArrayLike | None, size: tuple[int, int]) -> torch.Tensor:
    """Return the (N, P) int64 labels of (N, P, 2) points in an image of (height, width); all 1 by default.

    Raises:
        ValueError: points of wrong shape or outside the image, or labels that are not 1, 0 or -1.
    """
    if points.dim() != 3 or points.shape[2] != 2 or 0 in points.shape[1:]:
        raise ValueError(f"points: expected shape (N, P, 2), XY in pixels, got {tuple(points.shape)}")
    checked = torch.ones(points.shape[:2]) if labels is None else float_tensor(labels, "point_labels", "(N, P)")
    if checked.shape != points.shape[:2]:
        raise ValueError(
            f"point_labels: expected shape {tuple(points.shape[:2])}, one for each point, got {tuple(checked.shape)}"
        )
    if not torch.isin(checked, torch.tensor([-1.0, 0.0, 1.0])).all():
        raise ValueError("point_labels: expected 1 (foreground), 0 (background) or -1 (padding)")
    is_padding = checked == -1
    if is_padding.all(dim=1).any():
        raise ValueError("point_labels: a region has padding (-1) only; expected at least one point")
    # padding points may be anywhere, other points must be on a pixel
    is_inside = (points >= 0).all(dim=2) & (points[..., 0] < size[1]) & (points[..., 1] < size[0])  # NaN is not
    if not (is_inside | is_padding).all():
        index = (~(is_inside | is_padding)).nonzero()[0].tolist()
        raise ValueError(
            f"points: {points[tuple(index)].tolist()} is outside the image of height {size[0]} and width {size[1]}"
        )
    return checked.long()


def float_tensor(value: ArrayLike, what: str, shape: str) -> torch.Tensor:
    """Return numbers of any kind as a float32 tensor, a copy; ``what`` and ``shape`` are for the message.

    Raises:
        ValueError: not numbers, or rows of different lengths.
    """
    try:
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected numbers of shape {shape}, got {str(value)[:80]}") from error


def clipped_sides(boxes: np.ndarray, image_sizes: Any) -> np.ndarray:
    """Return the (N, 2) float32 width and height of boxes clipped to their images, not positive for those outside.

    Args:
        boxes: (N, 4) XYXY, pixels.
        image_sizes: (height, width) of all boxes' image, or (N, 2) of each box's.
    """
    # float32, in which Detectron2 clips: whether a thin box has area must not depend on who asks
    boxes, limits = np.asarray(boxes, np.float32), np.asarray(image_sizes, np.float32)[..., ::-1]  # (width, height)
    return np.clip(boxes[:, 2:], 0, limits) - np.clip(boxes[:, :2], 0, limits)


def has_area(boxes: np.ndarray, image_sizes: Any) -> np.ndarray:
    """Return (N,) bool: which boxes have area inside their images; arguments as of ``clipped_sides``."""
    return np.all(clipped_sides(boxes, image_sizes) > MIN_SIDE, axis=1)


def check_regions(
    images: Sequence[torch.Tensor],
    boxes: Sequence[Boxes],
    scores: Sequence[torch.Tensor | None] | None,
    names: Sequence[str] = (),
) -> None:
    """Refuse invalid arguments of ``RegionRecognizer.forward``; messages have the images' ``names``.

    Raises:
        ValueError: not as many of each, an image or scores of wrong shape, scores outside [0, 1], boxes that are not
            ``Boxes`` or are invalid.
    """
    scores = [None] * len(images) if scores is None else scores
    names = names or [f"image {i}" for i in range(len(images))]
    if not len(images) == len(boxes) == len(scores):
        raise ValueError(f"expected boxes and scores for each of {len(images)} images, got {len(boxes)}, {len(scores)}")
    for image, image_boxes, image_scores, name in zip(images, boxes, scores, names):
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"{name}: expected shape (3, H, W), got {tuple(image.shape)}")
        if not isinstance(image_boxes, Boxes):
            raise ValueError(f"boxes of {name}: expected detectron2's Boxes, got {type(image_boxes).__name__}")
        check_boxes(image_boxes.tensor, (image.shape[1], image.shape[2]), f"boxes of {name}")
        if image_scores is None:
            continue
        if image_scores.shape != (len(image_boxes),):
            raise ValueError(f"scores of {name}: expected shape ({len(image_boxes)},), got {tuple(image_scores.shape)}")
        # a product may round to a little more than 1; NaN is neither
        if not ((image_scores >= 0) & (image_scores <= 1 + 1e-4)).all():
            raise ValueError(f"scores of {name}: expected numbers in [0, 1]; put logits through a sigmoid first")


def check_targets(targets: Instances, num_classes: int, name: str) -> None:
    """Refuse ``gt_boxes`` that are invalid (see ``check_boxes``), and ``gt_classes`` outside the vocabulary."""
    check_boxes(targets.gt_boxes.tensor, targets.image_size, f"annotated boxes of {name}")
    outside = targets.gt_classes[(targets.gt_classes < 0) | (targets.gt_classes >= num_classes)]
    if len(outside):
        raise ValueError(
            f"{name}: class {int(outside[0])} is outside the vocabulary of {num_classes} names; "
            "set the data set's own vocabulary"
        )


def image_name(inputs: dict[str, Any]) -> str:
    """Return the name, in messages, of the image of one of Detectron2's model inputs."""
    return f"image {inputs.get('file_name', inputs.get('image_id', 'without a name'))}"


def read_targets(inputs: dict[str, Any], num_classes: int) -> Instances:
    """Return the annotations of an image of Detectron2's model inputs, checked by ``check_targets``.

    Raises:
        KeyError: the image has none.
    """
    if "instances" not in inputs:
        raise KeyError(f"{image_name(inputs)}: training needs the key 'instances', got {sorted(inputs)}")
    check_targets(inputs["instances"], num_classes, image_name(inputs))
    return inputs["instances"]


def read_proposals(proposals: Instances, top_k: int = -1, nms_thresh: float = 1.0) -> tuple[Boxes, torch.Tensor | None]:
    """Return the best boxes of an image and their scores.

    Args:
        proposals: with ``proposal_boxes`` and, optionally, ``scores`` in [0, 1] or ``objectness_logits``.
        top_k: number of boxes to keep, the first ones if there are no scores; -1 for all.
        nms_thresh: of two scored boxes with a greater IoU only the better is kept; 1 keeps both.

    Returns:
        N boxes and (N,) float scores in [0, 1], or None without scores.
    """
    boxes, scores = proposals.proposal_boxes, None
    if proposals.has("scores"):
        scores = proposals.scores
    elif proposals.has("objectness_logits"):
        scores = proposals.objectness_logits.sigmoid()
    # Without scores the first boxes are the best guess: detectors write them in the order of their scores.
    if scores is None:
        return (boxes[:top_k] if top_k >= 0 else boxes), None
    if nms_thresh < 1:
        keep = nms(boxes.tensor.float(), scores.float(), nms_thresh)
        boxes, scores = boxes[keep], scores[keep]
    if not 0 <= top_k < len(boxes):
        return boxes, scores
    # topk also sorts: with fewer boxes than top_k the order of the file stays
    scores, best = scores.topk(top_k)
    return boxes[best], scores
