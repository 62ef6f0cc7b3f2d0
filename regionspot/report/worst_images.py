"""The images with most errors: their objects and detections, each with what is wrong with it."""

from dataclasses import dataclass, field

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.error_kinds import KINDS, NOT_COUNTED, RIGHT, ErrorKinds
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.matching import Matches
from regionspot.evaluation.overlaps import is_object

MAX_REGIONS = 60  # drawn of an image, the best-scored
_UNJUDGED = "not judged: nobody looked for this class here, or there are too many detections"
_UNCOUNTED = "not counted: on an ignored annotation, or the class is annotated incompletely here"


@dataclass(frozen=True)
class Region:
    """A box with its name.

    Attributes:
        box: (x, y, width, height), original pixels.
        name: class name.
        kind: "right", "wrong", or for an object "missed"; "other" where the evaluation does not count it.
        score: of a detection.
        text: what is wrong, "" for nothing.
    """

    box: tuple[float, ...]
    name: str
    kind: str
    score: float | None = None
    text: str = ""


@dataclass(eq=False)
class ImageErrors:
    """An image with its objects and detections.

    Attributes:
        image_id, file_name: of the annotation file.
        size: (height, width), pixels.
        num_missed: objects that no detection above the threshold was matched to.
        num_wrong: false positives above the threshold.
        objects, detections: at most ``MAX_REGIONS`` of each.
        num_hidden: detections above the threshold that are not among ``detections``.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    num_missed: int
    num_wrong: int
    objects: list[Region] = field(default_factory=list)
    detections: list[Region] = field(default_factory=list)
    num_hidden: int = 0


def best_threshold(scores: np.ndarray, is_right: np.ndarray, num_objects: int) -> float:
    """Return the score above which detections have the best F1 over the whole data set; the lowest if none is right.

    Args:
        scores: (D,) float64, of detections that count.
        is_right: (D,) bool.
        num_objects: number of annotated objects.
    """
    if not is_right.any():
        return float(scores.min()) if len(scores) else 0.0
    order = np.argsort(-scores, kind="stable")
    num_right = is_right[order].cumsum()
    f1 = 2 * num_right / (np.arange(1, len(scores) + 1) + num_objects)
    is_last = np.diff(scores[order], append=-np.inf) < 0  # equal scores are above the threshold together
    return float(scores[order][np.argmax(np.where(is_last, f1, -1.0))])


def find_worst_images(
    truth: GroundTruth, results: Results, matches: Matches, errors: ErrorKinds, num_images: int
) -> tuple[list[ImageErrors], float]:
    """Return the images with most missed objects and false positives, worst first, above the score of the best F1.

    Returns:
        At most ``num_images`` with errors, and the score.
    """
    rows, num_all = matches.detections.rows, len(truth.image_ids)
    scores, is_right, is_wrong = results.scores[rows], errors.kinds == RIGHT, errors.kinds >= 0
    objects = np.flatnonzero(is_object(matches.truths))
    counted = is_right | is_wrong
    threshold = best_threshold(scores[counted], is_right[counted], len(objects))
    shown = scores >= threshold
    has_match = np.zeros(len(matches.truths.rows), bool)
    has_match[errors.truths[is_right & shown]] = True
    missed = objects[~has_match[objects]]
    num_missed = np.bincount(matches.truths.keys[missed] % num_all, minlength=num_all)
    num_wrong = np.bincount(matches.detections.keys[is_wrong & shown] % num_all, minlength=num_all)
    order = np.argsort(-(num_missed + num_wrong), kind="stable")[:num_images]
    describe = _Describer(truth, results, matches, errors, has_match, threshold)
    worst = [
        describe(image, int(num_missed[image]), int(num_wrong[image]))
        for image in order.tolist()
        if num_missed[image] + num_wrong[image]
    ]
    return worst, threshold


class _Describer:
    """Collects the objects and detections of images, which all are looked up in sorted arrays."""

    def __init__(
        self,
        truth: GroundTruth,
        results: Results,
        matches: Matches,
        errors: ErrorKinds,
        has_match: np.ndarray,
        threshold: float,
    ) -> None:
        self.truth, self.results, self.matches, self.errors = truth, results, matches, errors
        self.has_match, self.threshold = has_match, threshold
        self.images, self.categories = truth.locate(results)
        self.truth_images, self.is_object = matches.truths.keys % len(truth.image_ids), is_object(matches.truths)
        # position in ``matches.detections`` of each row of the results, -1 for those that take no part
        self.positions = np.full(len(results), -1)
        self.positions[matches.detections.rows] = np.arange(len(matches.detections.rows))

    def __call__(self, image: int, num_missed: int, num_wrong: int) -> ImageErrors:
        rows = np.flatnonzero((self.images == image) & (self.results.scores >= self.threshold))
        rows = rows[np.argsort(-self.results.scores[rows], kind="stable")]
        objects = np.flatnonzero(self.truth_images == image)
        height, width = self.truth.sizes[image].tolist()
        return ImageErrors(
            image_id=int(self.truth.image_ids[image]),
            file_name=self.truth.file_name(image),
            size=(height, width),
            num_missed=num_missed,
            num_wrong=num_wrong,
            objects=[self._object(row) for row in objects[:MAX_REGIONS].tolist()],
            detections=[self._detection(row) for row in rows[:MAX_REGIONS].tolist()],
            num_hidden=max(len(rows) - MAX_REGIONS, 0),
        )

    def _object(self, position: int) -> Region:
        row = int(self.matches.truths.rows[position])
        box, name = tuple(self.truth.boxes[row].tolist()), self.truth.class_names[self.truth.categories[row]]
        if not self.is_object[position]:
            return Region(box, name, "other", text="ignored")
        return Region(box, name, "right") if self.has_match[position] else Region(box, name, "missed", text="not found")

    def _detection(self, row: int) -> Region:
        box, score = tuple(self.results.boxes[row].tolist()), float(self.results.scores[row])
        name, position = self.truth.class_names[self.categories[row]], int(self.positions[row])
        kind = NOT_COUNTED if position < 0 else int(self.errors.kinds[position])
        if kind == RIGHT:
            return Region(box, name, "right", score)
        if kind == NOT_COUNTED:
            return Region(box, name, "other", score, _UNJUDGED if position < 0 else _UNCOUNTED)
        text, on = KINDS[kind], int(self.errors.truths[position])
        if text == "classification":
            true_row = self.matches.truths.rows[on]
            text = f"is: {self.truth.class_names[self.truth.categories[true_row]]}"
        return Region(box, name, "wrong", score, text)
