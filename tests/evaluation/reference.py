"""Generated data sets and detections in LVIS format, and the results of the lvis package."""

import contextlib
import copy
import io
import json
from collections import defaultdict
from pathlib import Path

import lvis.eval
import numpy as np
import pycocotools.mask as mask_utils
from lvis import LVIS, LVISEval, LVISResults


class _NumPyWithFloat:
    """NumPy as the lvis package knows it: with ``np.float``, which NumPy 1.24 removed."""

    float = float

    def __getattr__(self, name):
        return getattr(np, name)


@contextlib.contextmanager
def lvis_on_current_numpy():
    """Let ``lvis.eval``, and nothing else, see ``np.float``."""
    original = lvis.eval.np
    lvis.eval.np = _NumPyWithFloat()
    try:
        yield
    finally:
        lvis.eval.np = original


def random_mask(rng, size, box):
    """A blob in a box (XYWH), as RLE with str counts."""
    mask = np.zeros(size, np.uint8)
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h + 1, x : x + w + 1] = rng.random((h + 1, w + 1))[: size[0] - y, : size[1] - x] < 0.95
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": list(size), "counts": rle["counts"].decode()}


def make_world(
    seed,
    images=8,
    categories=7,
    truths=5,
    detections=40,
    *,
    masks=False,
    ties=False,
    near=0.6,
    ignored=0.1,
    empty=0.15,
    frequencies="rcf",
):
    """Return annotations (dict) and detections (list) in LVIS format.

    Args:
        images, categories: how many.
        truths, detections: of an image, about.
        masks: detections have masks, too.
        ties: few different scores, and boxes that are there twice.
        near: share of detections that lie about a ground truth.
        ignored: share of ground truths with ``ignore``.
        empty: share of images without ground truths, and without detections.
        frequencies: of the categories, in turn.
    """
    rng = np.random.default_rng(seed)
    category_ids = rng.permutation(np.arange(1, 3 * categories))[:categories].tolist()
    image_ids = rng.permutation(np.arange(1, 5 * images))[:images].tolist()
    sizes = {i: (int(rng.integers(90, 300)), int(rng.integers(90, 300))) for i in image_ids}
    annotations, predictions, records = [], [], []

    def draw_box(size):
        w, h = np.exp(rng.uniform(np.log(4), np.log((size[1] - 1, size[0] - 1))))
        return [rng.uniform(0, size[1] - w), rng.uniform(0, size[0] - h), w, h]

    for image_id in image_ids:
        size = sizes[image_id]
        some = rng.choice(category_ids, max(1, categories // 2), replace=False).tolist()
        own = []
        for _ in range(0 if rng.random() < empty else rng.integers(1, 2 * truths)):
            x, y, w, h = (round(float(v), 2) for v in draw_box(size))
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.choice(some))}
            entry |= {"bbox": [x, y, w, h], "area": w * h * rng.choice([1, 0.8, 0.4]), "iscrowd": 0}
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x + w / 2, y + 0.9 * h, x, y + h]]
            if rng.random() < ignored:
                entry["ignore"] = 1
            if rng.random() < 0.05:
                entry["area"] = float(rng.choice([0, 1024, 9216]))
            annotations.append(entry)
            own.append(entry)
        present = {entry["category_id"] for entry in own}
        absent = [c for c in category_ids if c not in present]
        records.append(
            {
                "id": image_id,
                "height": size[0],
                "width": size[1],
                "file_name": f"{image_id}.jpg",
                "neg_category_ids": absent[: len(absent) // 2],
                "not_exhaustive_category_ids": sorted(present)[: int(rng.integers(0, 3))],
            }
        )
        for _ in range(0 if rng.random() < empty else rng.integers(1, 2 * detections)):
            box, category = draw_box(size), int(rng.choice(category_ids))
            if own and rng.random() < near:
                truth = own[rng.integers(len(own))]
                box, category = np.array(truth["bbox"]), truth["category_id"] if rng.random() < 0.8 else category
                if rng.random() < 0.9:
                    box[:2] += rng.normal(0, 0.06, 2) * box[2:]
                    box[2:] *= np.exp(rng.normal(0, 0.1, 2))
                box[:2] = np.clip(box[:2], 0, [size[1] - 2, size[0] - 2])
                box[2:] = np.minimum(box[2:], [size[1] - 1 - box[0], size[0] - 1 - box[1]])
            box = [float(v) for v in box]
            score = float(rng.integers(5) / 4) if ties else float(rng.random())
            entry = {"image_id": image_id, "category_id": category, "score": score, "bbox": box}
            if masks:
                entry["segmentation"] = random_mask(rng, size, box)
            predictions.append(entry)
            if ties and rng.random() < 0.2:
                predictions.append(dict(entry))
    order = rng.permutation(len(predictions))
    names = [{"id": c, "name": f"thing {c}", "frequency": frequencies[k % len(frequencies)]}
             for k, c in enumerate(category_ids)]  # fmt: skip
    world = {"images": records, "annotations": annotations, "categories": names}
    return world, [predictions[i] for i in order]


def write_world(directory, world, predictions, lines=False):
    """Write both, return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    annotations, results = directory / "annotations.json", directory / ("results.jsonl" if lines else "results.json")
    annotations.write_text(json.dumps(world))
    text = "\n".join(map(json.dumps, predictions)) if lines else json.dumps(predictions)
    results.write_text(text)
    return annotations, results


def run_lvis(annotations: Path, predictions: list, task: str, max_dets: int = 300, without_boxes: bool = True):
    """Return the results of the lvis package in percent, NaN for -1, and the AP of each category id.

    Args:
        without_boxes: for masks the boxes are taken away first, as Detectron2's evaluator does.
    """
    predictions = copy.deepcopy(predictions)
    if task == "segm" and without_boxes:
        for entry in predictions:
            entry.pop("bbox", None)
    with lvis_on_current_numpy(), contextlib.redirect_stdout(io.StringIO()):
        truth = LVIS(str(annotations))
        evaluation = LVISEval(truth, LVISResults(truth, predictions, max_dets=max_dets), task)
        evaluation.run()
    values = evaluation.get_results()
    precision = evaluation.eval["precision"][..., 0].mean(axis=(0, 1))
    per_class = {c: p * 100 if p >= 0 else np.nan for c, p in zip(evaluation.params.cat_ids, precision)}
    return {key: value * 100 if value >= 0 else np.nan for key, value in values.items()}, per_class


def best_of_each_class(predictions: list, limit: int) -> list:
    """The fixed protocol's limit, in the simplest code."""
    by_class = defaultdict(list)
    for entry in predictions:
        by_class[entry["category_id"]].append(entry)
    return [
        entry
        for entries in by_class.values()
        for entry in sorted(entries, key=lambda entry: entry["score"], reverse=True)[:limit]
    ]


def assert_same(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-9)
