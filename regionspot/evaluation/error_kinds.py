"""Errors by kind, and the AP that each kind costs ("TIDE: A General Toolbox for Identifying Object Detection Errors",
arXiv 2008.08115), by the rules of the evaluation at hand.

A false positive is, by its box's IoU with annotations (0.5 is on an object, below 0.1 is background):

* localization: 0.1 to 0.5 with one of its own name;
* classification: at least 0.5 with one of another name;
* duplicate: at least 0.5 with one of its own name, which a better detection was matched to;
* background: below 0.1 with all;
* both: 0.1 to 0.5 with one of another name.

Where several hold, the first of this list does, as in the authors' toolbox. An annotation is missed if no detection
was matched to it and no error of localization or classification is on it.
"""

from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.average_precision import accumulate, mean_percent
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.matching import Matches
from regionspot.evaluation.overlaps import Overlaps, is_object

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
RIGHT, NOT_COUNTED = -1, -2
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))


@dataclass(eq=False)
class ErrorKinds:
    """What is wrong with each detection and annotation that takes part in an evaluation.

    Attributes:
        kinds: (D,) int8 into ``KINDS``, in the order of ``Matches.detections``; ``RIGHT`` for a true positive,
            ``NOT_COUNTED`` for a detection that is neither right nor wrong.
        truths: (D,) int64, the annotation that a true positive is matched to, or that an error of classification,
            localization or duplication is on; -1 for none.
        missed: (G,) bool, in the order of ``Matches.truths``.
        matched: (G,) bool: a true positive is matched to it.
        ap50: AP50 in percent.
        gains: by kind, the points of AP50 that are gained if all its errors are corrected.
    """

    kinds: np.ndarray
    truths: np.ndarray
    missed: np.ndarray
    matched: np.ndarray
    ap50: float
    gains: dict[str, float]

    def counts(self) -> dict[str, int]:
        """Return the number of errors of each kind."""
        counts = np.bincount(self.kinds[self.kinds >= 0], minlength=len(KINDS)).tolist()
        counts[_MISSED] = int(self.missed.sum())
        return dict(zip(KINDS, counts))


def find_error_kinds(ground_truth: GroundTruth, results: Results, matches: Matches, overlaps: Overlaps) -> ErrorKinds:
    """Tell the errors of an evaluation apart.

    Args:
        ground_truth: the annotations.
        results: the detections.
        matches: of the evaluation of their boxes.
        overlaps: of the same results, and the annotations of ``matches``.
    """
    kinds, truths = _classify(matches, overlaps)
    matched = np.zeros(len(matches.truths.rows), bool)
    matched[truths[kinds == RIGHT]] = True
    correctable = np.isin(kinds, (_CLASSIFICATION, _LOCALIZATION))
    covered = matched.copy()
    covered[truths[correctable]] = True
    missed = is_object(matches.truths) & ~covered
    categories, scores = matches.detections.categories, results.scores[matches.detections.rows]
    truth_categories, totals = ground_truth.categories[matches.truths.rows], matches.truths.totals[:, 0]
    is_right, is_wrong = kinds == RIGHT, kinds >= 0
    ap50 = _ap50(categories, scores, is_right, is_wrong, totals)
    gains = {}
    for index, kind in enumerate(KINDS):
        corrected = np.zeros(0, np.int64)
        if index in (_CLASSIFICATION, _LOCALIZATION):
            corrected = _best_of_each(np.flatnonzero(kinds == index), truths, scores, matched)
        new_categories, new_right = categories.copy(), is_right.copy()
        new_categories[corrected], new_right[corrected] = truth_categories[truths[corrected]], True
        new_totals = totals - np.bincount(truth_categories[missed], minlength=len(totals)) * (index == _MISSED)
        new_ap50 = _ap50(new_categories, scores, new_right, is_wrong & (kinds != index), totals, new_totals)
        gains[kind] = new_ap50 - ap50
    return ErrorKinds(kinds, truths, missed, matched, ap50, gains)


def _classify(matches: Matches, overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind (D,) int8 of each detection, and the annotation (D,) int64 that it concerns."""
    rows = matches.detections.rows
    own, other = overlaps.own_iou[rows], overlaps.other_iou[rows]
    conditions = [
        (own >= BACKGROUND) & (own < FOREGROUND),
        other >= FOREGROUND,
        own >= FOREGROUND,
        np.maximum(own, other) < BACKGROUND,
    ]
    kinds = np.select(conditions, [_LOCALIZATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND], _BOTH).astype(np.int8)
    kinds[~matches.counts[:, 0]] = NOT_COUNTED
    state = matches.state[:, 0, 0]
    kinds[matches.rows[state == 1]] = RIGHT
    kinds[matches.rows[state == 2]] = NOT_COUNTED
    truths = np.full(len(rows), -1)
    is_own = np.isin(kinds, (_LOCALIZATION, _DUPLICATE))
    truths[is_own] = overlaps.own[rows[is_own]]
    is_other = kinds == _CLASSIFICATION
    truths[is_other] = overlaps.other[rows[is_other]]
    truths[matches.rows[state == 1]] = matches.partners[state == 1]
    return kinds, truths


def _best_of_each(rows: np.ndarray, truths: np.ndarray, scores: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """Return the best of ``rows`` on each annotation that nothing is matched to: these would become right.

    All others of the kind would be duplicates, which correcting removes.
    """
    rows = rows[~matched[truths[rows]]]
    rows = rows[np.lexsort((-scores[rows], truths[rows]))]
    return rows[np.unique(truths[rows], return_index=True)[1]]


def _ap50(
    categories: np.ndarray,
    scores: np.ndarray,
    is_right: np.ndarray,
    is_wrong: np.ndarray,
    totals: np.ndarray,
    new_totals: np.ndarray | None = None,
) -> float:
    """Return AP50 in percent of detections (D,) that are right, wrong or not counted; ``totals`` are (K,).

    With ``new_totals`` a category that is left without annotations has AP 0 if it has false positives, as in the
    authors' toolbox; if not, it does not take part.
    """
    new_totals = totals if new_totals is None else new_totals
    order = np.lexsort((-scores, categories))
    rows = np.flatnonzero(is_right[order])
    state = np.ones((len(rows), 1, 1), np.int8)
    counts = (is_wrong | is_right)[order, None]
    precision, _ = accumulate(categories[order], counts, rows, state, new_totals[:, None])
    is_zero = (new_totals == 0) & (totals > 0) & (np.bincount(categories[is_wrong], minlength=len(totals)) > 0)
    precision[:, :, is_zero] = 0.0
    return mean_percent(precision)
