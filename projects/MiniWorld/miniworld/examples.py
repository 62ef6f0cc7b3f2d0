"""Examples as names: novel classes by regions of the validation split, recognized in the test split."""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from miniworld import experiment
from miniworld.categories import NAMES, NOVEL
from miniworld.tables import format_runs
from miniworld.trained import index_split, load_trained
from regionspot import RegionSpotPredictor
from regionspot.data.coco_io import AnnotationFile
from regionspot.index import IndexClassifier, RegionIndex
from regionspot.index.audit import annotated_labels
from regionspot.modeling.entry_embeddings import embed_vocabulary
from regionspot.utils.files import write_json
from regionspot.vocabulary import load_vocabulary

NUMBERS = (1, 5, 20)  # examples of a class
COLUMNS = {"novel_top1": "novel top-1", "base_top1": "base top-1", "novel_of_novel": "novel of novel names"}


def example_pool(dataset_name: str) -> dict[int, list[dict[str, Any]]]:
    """Return the regions of a data set by class, as the examples of a vocabulary file.

    Raises:
        ValueError: too few regions of a novel class.
    """
    pool: dict[int, list[dict[str, Any]]] = {}
    for record in DatasetCatalog.get(dataset_name):
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            box = [x, y, x + width, y + height]
            pool.setdefault(annotation["category_id"], []).append({"image": record["file_name"], "box": box})
    for label in NOVEL:
        if len(pool.get(label, ())) < max(NUMBERS):
            raise ValueError(
                f"{dataset_name} has {len(pool.get(label, ()))} regions of {NAMES[label]!r}, expected at least "
                f"{max(NUMBERS)} of each novel class; draw more scenes: --val"
            )
    return pool


def vocabularies(
    pool: dict[int, list[dict[str, Any]]], similar: dict[int, int], seed: int
) -> dict[str, list[str | dict[str, Any]]]:
    """Return the vocabularies of the table's rows: base classes by name, novel ones as the row says.

    Args:
        pool: of ``example_pool``.
        similar: for each novel class the one whose name is most similar, of which negatives are taken.
        seed: of the choice of examples; more examples include those of fewer.
    """
    rng = np.random.default_rng(seed)
    shuffled = {label: [pool[label][i] for i in rng.permutation(len(pool[label]))] for label in sorted(pool)}

    def row(number: int, with_name: bool, num_negatives: int = 0) -> list[str | dict[str, Any]]:
        names: list[str | dict[str, Any]] = list(NAMES)
        for label in NOVEL:
            entry: dict[str, Any] = {"name": NAMES[label], "examples": shuffled[label][:number]}
            entry |= {"synonyms": [NAMES[label]]} if with_name else {}
            entry |= {"negatives": shuffled.get(similar[label], [])[:num_negatives]} if num_negatives else {}
            names[label] = entry
        return names

    rows: dict[str, list[str | dict[str, Any]]] = {"name": list(NAMES)}
    for number in NUMBERS:
        rows[f"{number} example{'s' * (number > 1)}"] = row(number, with_name=False)
    for number in NUMBERS:
        rows[f"name and {number} example{'s' * (number > 1)}"] = row(number, with_name=True)
    rows["name, 5 examples, 5 negatives"] = row(5, with_name=True, num_negatives=5)
    return rows


def accuracies(index: RegionIndex, embeddings: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Return top-1 of novel and of base regions over all names, and of novel ones over novel names."""
    is_novel, novel = np.isin(labels, NOVEL), np.array(NOVEL)
    best = np.concatenate([p.argmax(dim=1).numpy() for _, _, p in IndexClassifier(index, embeddings).probabilities()])
    among_novel = np.concatenate(
        [p.argmax(dim=1).numpy() for _, _, p in IndexClassifier(index, embeddings[novel]).probabilities()]
    )
    return {
        "novel_top1": float((best == labels)[is_novel].mean()),
        "base_top1": float((best == labels)[~is_novel].mean()),
        "novel_of_novel": float((novel[among_novel] == labels)[is_novel].mean()),
    }


def similar_names(predictor: RegionSpotPredictor) -> dict[int, int]:
    """Return for each novel class the class whose name has the most similar embedding."""
    _, embeddings = predictor.recognizer.encode_vocabulary(NAMES)
    similarities = (embeddings @ embeddings.t()).fill_diagonal_(-1)
    return {label: int(similarities[label].argmax()) for label in NOVEL}


def run_seed(args: Namespace, seed: int, pool: dict[int, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the accuracies of all rows by the model of a seed, with examples that the seed chooses."""
    predictor, cfg = load_trained(args, seed)
    index = index_split(predictor, cfg, "miniworld_test", args.output / "indexes" / f"test-{seed}")
    _, labels = annotated_labels(index, AnnotationFile(MetadataCatalog.get("miniworld_test").json_file))
    rows = vocabularies(pool, similar_names(predictor), seed)
    validation = index_split(predictor, cfg, "miniworld_val", args.output / "indexes" / f"val-{seed}")
    references = validation.embeddings(range(0, len(validation), max(len(validation) // 4096, 1)))
    results = {}
    for name, vocabulary in tqdm(rows.items(), desc=f"vocabularies, seed {seed}"):
        entries = embed_vocabulary(predictor.recognizer, load_vocabulary(vocabulary, with_examples=True), references)
        _, embeddings = predictor.recognizer.encode_vocabulary(entries)
        results[name] = accuracies(index, embeddings.cpu(), labels)
    return results


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """Return mean and standard deviation over the seeds, in percent."""
    runs = {name: [result[name] for result in results] for name in results[0]}
    return format_runs(runs, COLUMNS, heading="novel classes by")


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    sizes = {"train": args.train, "val": args.val, "test": args.test}
    experiment.draw_data(args.output / "data", sizes, args.workers)
    pool, results = example_pool("miniworld_val"), []
    for seed in range(args.seeds):
        path: Path = args.output / "examples" / f"{seed}.json"
        if not path.is_file():
            write_json(path, run_seed(args, seed, pool))
        results.append(json.loads(path.read_text()))
    print(f"\n{table(results)}")
