"""Evaluation of a model on a data set, by a protocol that is stated."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint import find_recognizer
from regionspot.data.build import build_test_loader, proposal_source
from regionspot.data.training_set import describe_annotations
from regionspot.evaluation import Protocol, build_evaluator
from regionspot.evaluation.protocol import ANNOTATED, short_hash
from regionspot.modeling import RegionSpot
from regionspot.utils.files import sha256_of_file
from regionspot.weights import fingerprint


def evaluate_dataset(cfg: CfgNode, model: nn.Module, name: str, output_dir: str | Path) -> dict[str, Any]:
    """Evaluate ``model`` on a data set against the vocabulary in use; a run that was cut goes on.

    Args:
        cfg: the config.
        model: a ``RegionSpot``, or one that DDP has wrapped.
        name: a registered data set.
        output_dir: for predictions and metrics.

    Returns:
        Metrics in percent, by task; {} but in the main process.
    """
    records = DatasetCatalog.get(name)
    protocol = describe_protocol(cfg, model, name)
    evaluator = build_evaluator(cfg, name, output_dir, protocol, len(records))
    loader = build_test_loader(cfg, name, skip=evaluator.finished)
    with _masks_as_rle(model):
        metrics = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(metrics)
    return metrics


@contextmanager
def _masks_as_rle(model: nn.Module) -> Iterator[None]:
    """Let the model give one RLE a region instead of full-size masks."""
    [regionspot] = [module for module in model.modules() if isinstance(module, RegionSpot)]
    before = regionspot.masks
    regionspot.masks = "rle" if before else ""
    try:
        yield
    finally:
        regionspot.masks = before


def describe_protocol(cfg: CfgNode, model: nn.Module, name: str) -> Protocol:
    """Return what the numbers of an evaluation depend on."""
    node, recognizer = cfg.MODEL.REGIONSPOT, find_recognizer(model)
    annotations = describe_annotations(name)
    encoder = recognizer.classifier.text_encoder
    kind = MetadataCatalog.get(name).evaluator_type
    weights = Path(cfg.MODEL.WEIGHTS).name or "no file"
    rule = f"{node.SCORE_RULE}, {node.SCORE_FUNCTION}, above {node.SCORE_THRESH_TEST}, NMS {node.NMS_THRESH_TEST}"
    if node.UNKNOWN.THRESHOLD or node.UNKNOWN.BACKGROUND:
        rule += f", unknown below {node.UNKNOWN.THRESHOLD} or {len(node.UNKNOWN.BACKGROUND)} background names"
    return Protocol(
        dataset=f"{name} ({annotations['fingerprint'][:12]})",
        metric="fixed" if kind == "lvis" and cfg.TEST.PROTOCOL == "fixed" else kind,
        boxes=_describe_boxes(cfg, name),
        labels_per_box=node.LABELS_PER_BOX,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        score=rule,
        vocabulary=f"{len(recognizer.vocabulary)} names ({short_hash(json.dumps(recognizer.vocabulary))})",
        templates=f"{len(encoder.templates)} ({short_hash(json.dumps([*encoder.templates, node.CLIP.NAME_STYLE]))})",
        checkpoint=f"{cfg.MODEL.META_ARCHITECTURE} {weights} ({fingerprint(recognizer.state_dict())[:12]})",
    )


def _describe_boxes(cfg: CfgNode, name: str) -> str:
    node = cfg.MODEL.REGIONSPOT.PROPOSALS
    source, path = proposal_source(cfg, name)
    best = "" if node.TOP_K < 0 or source == "gt" else f", best {node.TOP_K}"
    if source == "file":
        return f"file {Path(path).name} ({sha256_of_file(path)[:12]}){best}"
    if source == "sam_automatic":
        settings = ", ".join(f"{key.lower()} {value}" for key, value in node.SAM_AUTOMATIC.items())
        return f"SAM's automatic masks ({settings}){best}"
    if source == "detector":
        detector = node.DETECTOR
        weights = Path(detector.WEIGHTS)
        digest = f" {weights.name} ({sha256_of_file(weights)[:12]})" if weights.is_file() else ""
        return f"{detector.OUTPUT} of {Path(detector.CONFIG_FILE).stem}{digest}{best}"
    return ANNOTATED
