"""Recognition in batches of images, as engines for many machines call it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import ArrayLike

from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction.region_filter import RegionFilter
from regionspot.predictor import ImageSource, RegionSpotPredictor
from regionspot.utils.images import open_image, to_rgb_array
from regionspot.vocabulary import VocabularySource

# Columns of a batch that hold the pixels; all others are passed on.
PIXELS = ("image", "bytes")


class RegionBatchPredictor:
    """Recognizes the regions of batches of images. The names are encoded once, when it is built.

    ``predict`` takes and returns Python objects. Called with a batch of columns it is a function for ``map_batches`` of
    Ray Data, and for anything else that maps dicts of columns: build one an actor or process, and call it often.
    """

    def __init__(
        self,
        cfg: CfgNode,
        vocabulary: VocabularySource | None = None,
        region_filter: RegionFilter | None = None,
        top_classes: int = 5,
        with_masks: bool = True,
        with_embeddings: bool = False,
    ) -> None:
        """
        Args:
            cfg: the config; its ``MODEL.REGIONSPOT.PROPOSALS`` finds the regions of images that come without boxes.
            vocabulary: class names, see ``load_vocabulary``; by default ``MODEL.REGIONSPOT.VOCABULARY``.
            region_filter: which regions are kept; by default all.
            top_classes: number of best classes to report of each region.
            with_masks: whether masks are computed.
            with_embeddings: whether columns have ``embeddings``.

        Raises:
            ValueError: no class names.
        """
        self.predictor = RegionSpotPredictor(cfg)
        if vocabulary is not None:
            self.predictor.set_vocabulary(vocabulary)
        self.predictor.recognizer.classifier.get()  # encodes the names now
        self.region_filter = region_filter or RegionFilter()
        self.top_classes, self.with_masks, self.with_embeddings = top_classes, with_masks, with_embeddings
        self._deep_range = tuple(cfg.INPUT.DEEP_RANGE)

    @property
    def vocabulary(self) -> list[str]:
        """Class names in use."""
        return self.predictor.vocabulary

    def predict(
        self,
        images: Sequence[ImageSource],
        boxes: Sequence[ArrayLike | None] | None = None,
        proposal_scores: Sequence[ArrayLike | None] | None = None,
    ) -> list[RegionPredictions]:
        """Return the regions that are kept of each image; arguments and errors are ``predict_images``'s."""
        results = self.predictor.predict_images(
            images, boxes, proposal_scores, top_k=self.top_classes, with_masks=self.with_masks
        )
        return [self.region_filter(result) for result in results]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Recognize a batch of columns.

        Args:
            batch: columns of B rows: the images as ``path``, as encoded ``bytes``, or as ``image`` arrays (H, W, 3)
                uint8 RGB; optionally their ``boxes`` (N, 4), XYXY, original pixels, None for regions that are to be
                found, and ``proposal_scores`` (N,).

        Returns:
            All columns but the pixels and, with one entry for each image: ``height``, ``width``; ``error``, None or why
            the image could not be used, which then has no regions; ``boxes``, ``classes``, ``class_names``, ``scores``,
            ``detection_scores``, ``unknown``; ``masks``, the counts of COCO's compressed RLEs as text, if masks are
            computed; and ``embeddings`` if asked for.
        """
        num_images = len(next(iter(batch.values()), ()))
        images, errors = self._read(batch, num_images)
        boxes = _column(batch, "boxes", num_images)
        if self.predictor.model.proposal_source is None and any(x is None for x in boxes):
            raise ValueError(
                "no boxes: expected the column 'boxes', or MODEL.REGIONSPOT.PROPOSALS.SOURCE sam_automatic or detector"
            )
        scores = _column(batch, "proposal_scores", num_images)
        readable = [row for row in range(num_images) if row not in errors]
        results, invalid = predict_each(
            lambda rows: self.predict(
                [images[row] for row in rows], [boxes[row] for row in rows], [scores[row] for row in rows]
            ),
            readable,
        )
        errors |= {row: message.replace("image 0", "the image") for row, message in invalid.items()}
        columns = {name: list(values) for name, values in batch.items() if name not in (*PIXELS, "proposal_scores")}
        sizes = [images[row].shape[:2] if row in images else (0, 0) for row in range(num_images)]
        columns |= {"height": [size[0] for size in sizes], "width": [size[1] for size in sizes]}
        columns |= self._columns([results.get(row) for row in range(num_images)])
        return {**columns, "error": [errors.get(row) for row in range(num_images)]}

    def _read(self, batch: dict[str, Any], num_images: int) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Return the (H, W, 3) images of a batch that can be read, and why others cannot, by row."""
        kinds = [name for name in ("path", *PIXELS) if name in batch]
        if not kinds:
            raise ValueError(f"no images: expected a column 'path', 'bytes' or 'image', got {sorted(batch)}")
        kind = kinds[-1]  # a path beside the pixels is a name
        images, errors = {}, {}
        for row in range(num_images):
            value = batch[kind][row]
            try:
                source = str(value) if kind == "path" else value if kind == "image" else open_image(value)
                images[row] = to_rgb_array(source, self._deep_range)
            except (ValueError, OSError) as error:
                errors[row] = str(error)
        return images, errors

    def _columns(self, results: Sequence[RegionPredictions | None]) -> dict[str, list]:
        """Return regions as columns of plain lists; an image without a result has none."""
        names = ["boxes", "classes", "class_names", "scores", "detection_scores", "unknown"]
        names += ["embeddings"] if self.with_embeddings else []
        columns = {name: [[] if x is None else _as_list(getattr(x, name)) for x in results] for name in names}
        if self.with_masks:
            columns["masks"] = [[] if x is None else [rle["counts"] for rle in x.rles or ()] for x in results]
        return columns


def predict_each(
    predict: Callable[[list[int]], list[RegionPredictions]], rows: Sequence[int]
) -> tuple[dict[int, RegionPredictions], dict[int, str]]:
    """Predict rows of a batch together; one that is invalid costs itself alone.

    Args:
        predict: returns the regions of some rows; a ``ValueError`` is about one of them.
        rows: of the batch.

    Returns:
        Regions, and what is wrong with the other rows, by row.
    """
    results: dict[int, RegionPredictions] = {}
    errors: dict[int, str] = {}
    groups = [list(rows)] if rows else []
    while groups:
        group = groups.pop()
        try:
            results.update(zip(group, predict(group)))
        except ValueError as error:
            if len(group) > 1:
                groups += [[row] for row in group]
            else:
                errors[group[0]] = str(error)
    return results, errors


def _column(batch: dict[str, Any], name: str, num_images: int) -> list[Any]:
    return list(batch[name]) if name in batch else [None] * num_images


def _as_list(values: np.ndarray | list) -> list:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
