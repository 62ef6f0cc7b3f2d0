"""RegionSpot on your own images: ``set_image`` once, ``predict`` as often as you like."""

import numbers
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks
from numpy.typing import ArrayLike
from PIL import Image

from regionspot.checkpoint.checkpointer import load_model
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.recognizer import ImageFeatures, RegionRecognizer
from regionspot.structures import Prompts, check_boxes
from regionspot.utils.deprecation import renamed_argument, renamed_attribute
from regionspot.utils.images import to_rgb_array
from regionspot.vocabulary import VocabularySource

UNKNOWN = "unknown"


@dataclass
class RegionPredictions:
    """What RegionSpot recognizes in N regions of an image, in the order of the prompts.

    Attributes:
        boxes: (N, 4) float32, XYXY, original pixels: the prompts', or those around the predicted masks.
        classes: (N,) int64, index of the best class in ``vocabulary``.
        class_names: N names of the best classes, "unknown" for unknown regions.
        scores: (N,) float32, probability of the best class.
        top_classes: (N, k) int64, the k best classes, best first.
        top_scores: (N, k) float32, their probabilities.
        logits: (N, K) float32.
        predicted_ious: (N,) float32, SAM's own estimate of each mask's IoU.
        vocabulary: K class names.
        unknown: (N,) bool, regions of no class (``MODEL.REGIONSPOT.UNKNOWN``).
        image_size: (height, width) of the image.
        region_masks: SAM's mask logits, on the model's device; None when masks were not asked for. ``masks``, ``mask``
            and ``rles`` resize them to the image.
    """

    boxes: np.ndarray
    classes: np.ndarray
    class_names: list[str]
    scores: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    logits: np.ndarray
    predicted_ious: np.ndarray
    vocabulary: list[str]
    unknown: np.ndarray
    image_size: tuple[int, int]
    region_masks: RegionMasks | None

    labels = renamed_attribute("labels", "class_names")
    iou = renamed_attribute("iou", "predicted_ious")

    def __len__(self) -> int:
        return len(self.class_names)

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool, original pixels; None when not asked for. All are computed when first read, and cached."""
        if self.region_masks is None:
            return None
        return self.region_masks.to_bitmasks(None, *self.image_size).tensor.cpu().numpy()

    @cached_property
    def rles(self) -> list[dict] | None:
        """N masks as COCO's compressed RLE; None when not asked for. Never more than a few are at full size."""
        return None if self.region_masks is None else list(self.region_masks.to_rles(*self.image_size))

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one region, (H, W) bool, original pixels.

        Raises:
            ValueError: masks were not asked for.
        """
        if self.region_masks is None:
            raise ValueError("no masks: predict them by with_masks=True")
        return self.region_masks[int(index)].to_bitmasks(None, *self.image_size).tensor[0].cpu().numpy()


class RegionSpotPredictor:
    """Recognizes regions of single images; the image encoders run once an image.

    ``set_image`` and then ``predict`` is for one thread. Any number of threads may call ``encode``, and ``predict``
    with its result: such a call leaves the predictor, and its vocabulary, as they are.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build the model of ``cfg`` and load its weights (``MODEL.WEIGHTS``, SAM's and CLIP's).

        Raises:
            ValueError: a model other than RegionSpot itself.
        """
        if cfg.MODEL.META_ARCHITECTURE != "RegionSpot":  # CropBaseline has logits of its own for boxes alone
            raise ValueError(
                "MODEL.META_ARCHITECTURE: the predictor expects RegionSpot, got "
                f"{cfg.MODEL.META_ARCHITECTURE}; tools/train_net.py --eval-only evaluates others"
            )
        self.model = load_model(cfg)
        self.recognizer: RegionRecognizer = self.model.recognizer
        # Parts without weights from any file ("trained", "sam", "clip_model"), whose output is meaningless.
        self.random_parts = sorted(part for part, source in self.recognizer.weight_sources.items() if not source)
        self._deep_range = tuple(cfg.INPUT.DEEP_RANGE)
        self._features: ImageFeatures | None = None

    @property
    def vocabulary(self) -> list[str]:
        """Class names in use."""
        return self.recognizer.vocabulary

    def set_vocabulary(self, names: VocabularySource) -> None:
        """Recognize ``names`` from now on: a list, {name: synonyms}, "a,b,c" or "@file", see ``load_vocabulary``."""
        self.recognizer.set_vocabulary(names)

    @torch.no_grad()
    def encode(self, image: str | Path | Image.Image | np.ndarray) -> ImageFeatures:
        """Return the features of an image that ``predict`` needs.

        Args:
            image: a path or a PIL image, which are turned upright by their EXIF tag and converted to RGB; or an array,
                (H, W, 3) uint8, RGB, as it is.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an image, or an array of another shape or dtype.
        """
        array = to_rgb_array(image, self._deep_range)
        tensor = torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)  # a copy: the user's array may change
        return self.recognizer.encode_images([tensor])

    def set_image(self, image: str | Path | Image.Image | np.ndarray) -> None:
        """Encode an image, as ``encode`` does, for the next calls of ``predict``."""
        self._features = None  # after an image that is refused, the previous one must not be used
        self._features = self.encode(image)

    @renamed_argument("labels", "point_labels")
    @torch.no_grad()
    def predict(
        self,
        boxes: ArrayLike | None = None,
        points: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        vocabulary: VocabularySource | None = None,
        top_k: int = 5,
        with_masks: bool = True,
        features: ImageFeatures | None = None,
    ) -> RegionPredictions:
        """Recognize N regions of an image, each given by a box, by points, by a mask, or by several of them together.

        Args:
            boxes: (N, 4), XYXY, original pixels.
            points: (N, P, 2), XY, original pixels.
            point_labels: (N, P): 1 foreground, 0 background, -1 padding; all 1 by default.
            masks: (N, H, W) bool (or 0 and 1, or 0 and 255), original pixels. Alone, a mask also prompts with the box
                around it.
            vocabulary: class names, see ``set_vocabulary``: with ``features`` for this call only, else from now on.
            top_k: number of best classes to return for each region.
            with_masks: whether to compute masks.
            features: the result of ``encode``; by default that of ``set_image``.

        Raises:
            RuntimeError: no image was set.
            ValueError: a prompt of wrong shape or outside the image, or no vocabulary.
        """
        is_independent = features is not None  # then any thread may call, so nothing of the predictor may change
        features = features if is_independent else self._features
        if features is None:
            raise RuntimeError("no image is set: call set_image(image) first, or give features=encode(image)")
        if not isinstance(features, ImageFeatures) or len(features.sizes) != 1:
            raise ValueError(f"features: expected what encode(image) returned, got {type(features).__name__}")
        if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1:
            raise ValueError(f"top_k: expected an integer of at least 1, got {top_k!r}")
        prompts = self._prompts(boxes, points, point_labels, masks, features.sizes[0])
        recognizer = self.recognizer
        if is_independent and vocabulary is not None:
            names, embeddings = recognizer.encode_vocabulary(vocabulary)
        else:
            if vocabulary is not None:
                self.set_vocabulary(vocabulary)
            names, embeddings = recognizer.classifier.get()  # K names, (K, text_dim)
        # without boxes in the prompts, the regions' boxes are those around the masks
        [output] = recognizer.locate(features, [prompts], with_masks or prompts.boxes is None, with_iou=True)
        # (N, K + number of background names)
        [logits] = recognizer.classify([output.tokens], features.feature_map, [embeddings], with_background=True)
        return self._predictions(prompts, output, logits, names, int(top_k), with_masks, features.sizes[0])

    def _prompts(
        self,
        boxes: ArrayLike | None,
        points: ArrayLike | None,
        point_labels: ArrayLike | None,
        masks: ArrayLike | None,
        size: tuple[int, int],
    ) -> Prompts:
        prompts = {}
        # SAM was trained with masks beside boxes or points: a mask alone gets the box around it.
        if masks is not None:
            prompts["masks"], around = self._mask_prompts(np.asarray(masks), size)
            if boxes is None and points is None:
                boxes = around
        if boxes is not None:
            prompts["boxes"] = _float_tensor(boxes, "boxes", "(N, 4)")
            if prompts["boxes"].numel() == 0:  # an empty list has no columns
                prompts["boxes"] = prompts["boxes"].reshape(0, 4)
            check_boxes(prompts["boxes"], size)
        if point_labels is not None and points is None:
            raise ValueError("point_labels are given without points")
        if points is not None:
            prompts["points"] = _float_tensor(points, "points", "(N, P, 2)")
            prompts["point_labels"] = _check_points(prompts["points"], point_labels, size)
        return Prompts(**prompts)

    def _mask_prompts(self, masks: np.ndarray, size: tuple[int, int]) -> tuple[torch.Tensor, np.ndarray]:
        if masks.ndim != 3 or masks.shape[1:] != size:
            raise ValueError(f"masks: expected shape (N, {size[0]}, {size[1]}), the image's size, got {masks.shape}")
        if masks.dtype != bool and not (np.issubdtype(masks.dtype, np.integer) and np.isin(masks, (0, 1, 255)).all()):
            raise ValueError(
                f"masks: expected bool, or integers 0 and 1 (or 255), got {masks.dtype}; threshold logits at 0 first"
            )
        binary = torch.from_numpy(masks.astype(bool))
        if not binary.flatten(1).any(dim=1).all():
            raise ValueError(f"masks: number {int((~binary.flatten(1).any(dim=1)).nonzero()[0])} is empty")
        prompts = self.recognizer.localizer.mask_prompts(binary, size)
        return prompts, BitMasks(binary).get_bounding_boxes().tensor.numpy()

    def _predictions(
        self,
        prompts: Prompts,
        output: LocalizerOutput,
        logits: torch.Tensor,
        names: list[str],
        top_k: int,
        with_masks: bool,
        size: tuple[int, int],
    ) -> RegionPredictions:
        masks = None
        if output.masks is not None:
            rows = torch.arange(len(output.masks), device=output.masks.device)  # one mask for each region
            masks = RegionMasks(output.masks, rows, self.recognizer.localizer.mask_upsampler(size))
        assert output.iou is not None
        probabilities = self.recognizer.rule.probabilities(logits)
        unknown = self.recognizer.rule.is_unknown(probabilities, len(self.recognizer.background))
        # background names count in the probabilities, but are no answers
        top_scores, top_classes = probabilities[:, : len(names)].topk(min(top_k, len(names)), dim=1)
        boxes = prompts.clip(size).boxes
        if boxes is None:
            assert masks is not None
            boxes = masks.bounding_boxes(*size).tensor
        return RegionPredictions(
            boxes=boxes.cpu().numpy(),
            classes=top_classes[:, 0].cpu().numpy(),
            class_names=[UNKNOWN if u else names[i] for i, u in zip(top_classes[:, 0].tolist(), unknown.tolist())],
            scores=top_scores[:, 0].cpu().numpy(),
            top_classes=top_classes.cpu().numpy(),
            top_scores=top_scores.cpu().numpy(),
            logits=logits[:, : len(names)].cpu().numpy(),
            predicted_ious=output.iou.cpu().numpy(),
            vocabulary=names,
            unknown=unknown.cpu().numpy(),
            image_size=size,
            region_masks=masks if with_masks else None,
        )


def _check_points(points: torch.Tensor, labels: ArrayLike | None, size: tuple[int, int]) -> torch.Tensor:
    """Return the (N, P) int64 labels of (N, P, 2) points in an image of (height, width)."""
    if points.dim() != 3 or points.shape[2] != 2 or 0 in points.shape[1:]:
        raise ValueError(f"points: expected shape (N, P, 2), XY in pixels, got {tuple(points.shape)}")
    checked = torch.ones(points.shape[:2]) if labels is None else _float_tensor(labels, "point_labels", "(N, P)")
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


def _float_tensor(value: ArrayLike, what: str, shape: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected numbers of shape {shape}, got {str(value)[:80]}") from error
