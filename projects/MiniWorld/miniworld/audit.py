"""Suspicious labels in this world: wrong labels are planted in the validation split, and looked for."""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from miniworld import experiment
from miniworld.categories import NAMES
from miniworld.trained import index_split, load_trained
from regionspot.data.coco_io import AnnotationFile
from regionspot.index import IndexClassifier
from regionspot.index.audit import annotated_labels, audit_labels
from regionspot.index.audit_files import AuditWriter
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.utils.files import write_json

SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # numbers N of labels, as multiples of the number of planted errors


def plant_errors(content: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Any], set[int]]:
    """Return annotations of which a share has another category, and the ids of these annotations."""
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in content["categories"]]
    annotations = [dict(annotation) for annotation in content["annotations"]]
    planted = rng.permutation(len(annotations))[: round(share * len(annotations))]
    for row in planted.tolist():
        others = [i for i in ids if i != annotations[row]["category_id"]]
        annotations[row]["category_id"] = others[rng.integers(len(others))]
    return {**content, "annotations": annotations}, {annotations[row]["id"] for row in planted.tolist()}


def curve(is_planted: np.ndarray, order: np.ndarray) -> list[tuple[int, float, float]]:
    """Return (N, precision, recall) of the first N labels of an order, for the numbers of ``SHARES``."""
    hits, total = is_planted[order].cumsum(), int(is_planted.sum())
    numbers = [min(max(round(share * total), 1), len(order)) for share in SHARES]
    return [(n, float(hits[n - 1] / n), float(hits[n - 1] / total)) for n in numbers]


def main(args: Namespace) -> list[tuple[int, float, float]]:
    logging.basicConfig(level=logging.WARNING)
    experiment.draw_data(args.output / "data", {"train": args.train, "val": args.val}, args.workers)
    predictor, cfg = load_trained(args, args.seed)
    # labels are not in the index: that of the right annotations serves for the wrong ones
    index = index_split(predictor, cfg, "miniworld_val", args.output / "indexes" / f"val-{args.seed}")
    root = args.output / "data" / "miniworld"
    content, planted = plant_errors(json.loads((root / "val.json").read_text()), args.share, args.seed)
    path: Path = args.output / "audit" / "planted.json"
    write_json(path, content, indent=None)
    file = AnnotationFile(path)
    _, embeddings = predictor.recognizer.encode_vocabulary(NAMES)
    classifier = IndexClassifier(index, embeddings.cpu(), rule=DetectionRule("softmax"))
    audit = audit_labels(classifier, *annotated_labels(index, file))
    ids = np.array([annotation["id"] for annotation in content["annotations"]])[audit.annotations]
    is_planted = np.isin(ids, list(planted))
    ranked = curve(is_planted, audit.ranked(only_suspicious=False))
    plain = curve(is_planted, np.argsort(audit.label_scores, kind="stable"))
    lines = [
        [n, *(f"{100 * x:.1f}" for x in (precision, recall, *other))]
        for (n, precision, recall), (_, *other) in zip(ranked, plain)
    ]
    headers = ("N", "precision", "recall", "precision by probability alone", "recall by probability alone")
    print(f"\n{is_planted.sum()} of {len(is_planted)} labels are wrong; the {len(NAMES)} names, base and novel\n")
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    flagged = audit.is_suspicious
    precision, recall = is_planted[flagged].mean() if flagged.any() else 0.0, flagged[is_planted].mean()
    print(f"\n{flagged.sum()} are reported: precision {100 * precision:.1f}, recall {100 * recall:.1f}")
    writer = AuditWriter(index, file, audit, len(planted))
    writer.write_page(args.output / "audit" / "audit.html", str(root))
    print(f"the page of the first {len(planted)} is {args.output / 'audit' / 'audit.html'}")
    return ranked
