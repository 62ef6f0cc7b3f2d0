"""RegionSpot on your own images: ``set_image`` once, ``predict`` as often as you like."""

import numbers
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes
from numpy.typing import ArrayLike
from PIL import Image
from torch.nn.functional import normalize

from regionspot.checkpoint.checkpointer import load_model
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.region_predictions import RegionPredictions, name_regions
from regionspot.structures import (
    ImageFeatures,
    Prompts,
    check_boxes,
    check_points,
    check_regions,
    float_tensor,
    read_proposals,
)
from regionspot.utils.deprecation import renamed_argument
from regionspot.utils.images import to_rgb_array
from regionspot.vocabulary import VocabularySource

ImageSource = str | Path | Image.Image | np.ndarray


class RegionSpotPredictor:
    """Recognizes regions of single images; the image encoders run once an image.

    ``set_image`` and then ``predict`` is for one thread. Any number of threads may call ``encode``, and ``predict``
    with its result: such a call leaves the predictor, and its vocabulary, as they are.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build the model of ``cfg`` and load its weights (``MODEL.WEIGHTS``, SAM's and CLIP's).

        Raises:
            ValueError: a model that is neither RegionSpot itself nor its baseline, CLIP on crops.
        """
        if cfg.MODEL.META_ARCHITECTURE not in ("RegionSpot", "CropBaseline"):
            raise ValueError(
                "MODEL.META_ARCHITECTURE: the predictor expects RegionSpot or CropBaseline, got "
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
    def encode(self, image: ImageSource, image_format: str = "RGB") -> ImageFeatures:
        """Return the features of an image that ``predict`` needs.

        Args:
            image: a path or a PIL image, which are turned upright by their EXIF tag; or an array, uint8, (H, W, 3),
                (H, W, 4) or gray, (H, W). All are converted to RGB; transparency is dropped.
            image_format: order of an array's channels, "RGB" or "BGR" (OpenCV's).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an image, or an array of another shape or dtype.
        """
        return self.recognizer.encode_images([self._to_tensor(image, image_format)])

    def _to_tensor(self, image: ImageSource, image_format: str) -> torch.Tensor:
        array = to_rgb_array(image, self._deep_range, image_format)
        return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)  # a copy: the user's array may change

    def set_image(self, image: ImageSource, image_format: str = "RGB") -> None:
        """Encode an image, as ``encode`` does, for the next calls of ``predict``."""
        self._features = None  # after an image that is refused, the previous one must not be used
        self._features = self.encode(image, image_format)

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
        top_k = _check_top_k(top_k)
        prompts = self._prompts(boxes, points, point_labels, masks, features.sizes[0])
        recognizer = self.recognizer
        if is_independent and vocabulary is not None:
            names, embeddings = recognizer.encode_vocabulary(vocabulary)
        else:
            if vocabulary is not None:
                self.set_vocabulary(vocabulary)
            names, embeddings = recognizer.classifier.get()  # K names, (K, text_dim)
        return self._recognize(features, [prompts], [None], (names, embeddings), top_k, with_masks)[0]

    @torch.no_grad()
    def predict_images(
        self,
        images: Sequence[ImageSource],
        boxes: Sequence[ArrayLike | None] | None = None,
        proposal_scores: Sequence[ArrayLike | None] | None = None,
        vocabulary: VocabularySource | None = None,
        top_k: int = 5,
        with_masks: bool = True,
        image_format: str = "RGB",
    ) -> list[RegionPredictions]:
        """Recognize regions of several images at once; the image of ``set_image`` and the vocabulary in use stay.

        Args:
            images: B images, as for ``encode``.
            boxes: for each image (N_i, 4), XYXY, original pixels, or None for those that ``MODEL.REGIONSPOT.PROPOSALS``
                finds ("sam_automatic" or "detector"); None for all images by default.
            proposal_scores: for each image (N_i,) scores of its boxes in [0, 1], or None.
            vocabulary, top_k, with_masks: as for ``predict``, for this call only.
            image_format: as for ``encode``.

        Raises:
            ValueError: an invalid image or box, which is named by its number; or no boxes, and nothing finds any.
        """
        top_k = _check_top_k(top_k)
        names, embeddings = (
            self.recognizer.classifier.get() if vocabulary is None else self.recognizer.encode_vocabulary(vocabulary)
        )
        tensors = [self._to_tensor(image, image_format) for image in images]
        if not tensors:
            return []
        features = self.recognizer.encode_images(tensors)
        regions = self._regions(tensors, features, boxes, proposal_scores)
        prompts = [Prompts(boxes=image_boxes.tensor) for image_boxes, _ in regions]
        scores = [image_scores for _, image_scores in regions]
        return self._recognize(features, prompts, scores, (names, embeddings), top_k, with_masks)

    def _regions(
        self,
        images: list[torch.Tensor],
        features: ImageFeatures,
        boxes: Sequence[ArrayLike | None] | None,
        proposal_scores: Sequence[ArrayLike | None] | None,
    ) -> list[tuple[Boxes, torch.Tensor | None]]:
        """Return boxes and scores of each image, as they are given or as they are found."""
        boxes = [None] * len(images) if boxes is None else boxes
        scores = [None] * len(images) if proposal_scores is None else proposal_scores
        if not len(images) == len(boxes) == len(scores):
            raise ValueError(
                f"expected boxes and scores for each of {len(images)} images, got {len(boxes)}, {len(scores)}"
            )
        regions: list[tuple[Boxes, torch.Tensor | None]] = [
            (
                Boxes(_box_tensor([] if x is None else x, f"boxes of image {i}")),
                None if y is None else float_tensor(y, f"scores of image {i}", "(N,)"),
            )
            for i, (x, y) in enumerate(zip(boxes, scores))
        ]
        check_regions(images, [x for x, _ in regions], [y for _, y in regions])
        without = [i for i, image_boxes in enumerate(boxes) if image_boxes is None]
        if without:
            chosen = torch.tensor(without)
            assert features.embeddings is not None
            for i, proposals in zip(
                without, self.model.propose([images[i] for i in without], features.embeddings[chosen])
            ):
                regions[i] = read_proposals(proposals, self.model.top_k_proposals)
        return regions

    def _recognize(
        self,
        features: ImageFeatures,
        prompts: list[Prompts],
        scores: Sequence[torch.Tensor | None],
        vocabulary: tuple[list[str], torch.Tensor],
        top_k: int,
        with_masks: bool,
    ) -> list[RegionPredictions]:
        """Recognize the prompts of B images, which have been checked, by names and their embeddings."""
        recognizer, (names, embeddings) = self.recognizer, vocabulary
        # without boxes in the prompts, the regions' boxes are those around the masks
        with_logits = with_masks or any(x.boxes is None for x in prompts)
        located = recognizer.locate(features, prompts, with_logits or recognizer.needs_masks, with_iou=True)
        masks = [self._masks(output, size) for output, size in zip(located, features.sizes)]
        boxes = [_boxes(*parts) for parts in zip(prompts, masks, features.sizes)]
        semantic = recognizer.region_embeddings(features.images or [], boxes, features, located)
        dense = recognizer.dense_embeddings(features, located)
        # (N, K + number of background names)
        logits = recognizer.score_images(semantic, [embeddings] * len(prompts), True, dense, names)
        results = []
        for i, size in enumerate(features.sizes):
            result = self._predictions(boxes[i], located[i], semantic[i], logits[i], scores[i], names, top_k, size)
            own = None if dense is None else normalize(dense[i], dim=1).cpu().numpy()
            results.append(replace(result, region_masks=masks[i] if with_masks else None, dense_embeddings=own))
        return results

    def _masks(self, output: LocalizerOutput, size: tuple[int, int]) -> RegionMasks | None:
        """Return one mask for each region, if there are any."""
        if output.masks is None:
            return None
        rows = torch.arange(len(output.masks), device=output.masks.device)
        return RegionMasks(output.masks, rows, self.recognizer.localizer.mask_upsampler(size))

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
            prompts["boxes"] = _box_tensor(boxes, "boxes")
            check_boxes(prompts["boxes"], size)
        if point_labels is not None and points is None:
            raise ValueError("point_labels are given without points")
        if points is not None:
            prompts["points"] = float_tensor(points, "points", "(N, P, 2)")
            prompts["point_labels"] = check_points(prompts["points"], point_labels, size)
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
        boxes: Boxes,
        output: LocalizerOutput,
        semantic_tokens: torch.Tensor,
        logits: torch.Tensor,
        proposal_scores: torch.Tensor | None,
        names: list[str],
        top_k: int,
        size: tuple[int, int],
    ) -> RegionPredictions:
        assert output.iou is not None
        recognizer = self.recognizer
        return RegionPredictions(
            boxes=boxes.tensor.cpu().numpy(),
            predicted_ious=output.iou.cpu().numpy(),
            vocabulary=list(names),
            embeddings=normalize(semantic_tokens.float(), dim=1).cpu().numpy(),
            proposal_scores=None if proposal_scores is None else proposal_scores.cpu().numpy(),
            image_size=size,
            region_masks=None,
            **name_regions(recognizer.rule, names, logits, len(recognizer.background), top_k, proposal_scores),
        )


def _boxes(prompts: Prompts, masks: RegionMasks | None, size: tuple[int, int]) -> Boxes:
    """Return the boxes of prompts, clipped to an image of (height, width), or those around their masks."""
    boxes = prompts.clip(size).boxes
    if boxes is not None:
        return Boxes(boxes)
    assert masks is not None
    return masks.bounding_boxes(*size)


def _box_tensor(boxes: ArrayLike, what: str) -> torch.Tensor:
    tensor = float_tensor(boxes, what, "(N, 4)")
    if tensor.numel() == 0:  # an empty list has no columns
        return tensor.reshape(0, 4)
    if tensor.dim() != 2 or tensor.shape[1] != 4:  # before Boxes, which asserts
        raise ValueError(f"{what}: expected shape (N, 4), XYXY in pixels, got {tuple(tensor.shape)}")
    return tensor


def _check_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1:
        raise ValueError(f"top_k: expected an integer of at least 1, got {top_k!r}")
    return int(top_k)
