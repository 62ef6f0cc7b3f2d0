"""Evaluation of a model on a data set, with a protocol that says what its numbers mean."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_context, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.formats import fingerprint
from regionspot.checkpoint.loading import find_recognizer
from regionspot.data.build import build_test_loader, proposal_source
from regionspot.data.training_set import describe_annotations, image_ids
from regionspot.engine.extract import check_image_ids
from regionspot.evaluation import Protocol, RegionEvaluator
from regionspot.evaluation.protocol import ANNOTATED, METRICS
from regionspot.modeling import RegionRecognizer, RegionSpot
from regionspot.modeling.proposal_sources import detector_config
from regionspot.utils.files import sha256_of_file, short_hash
from regionspot.utils.run_lock import run_lock

logger = logging.getLogger(__name__)


def evaluate_dataset(cfg: CfgNode, model: nn.Module, name: str, output_dir: str | Path) -> dict[str, Any]:
    """Evaluate ``model`` on a data set against the vocabulary in use; an interrupted evaluation is resumed.

    Args:
        cfg: the config.
        model: a ``RegionSpot``, or one that DDP has wrapped.
        name: a registered data set.
        output_dir: for predictions and metrics; refused while another run uses it.

    Returns:
        Metrics in percent, by task; {} in all processes but the main one.
    """
    with run_lock(output_dir):
        records = DatasetCatalog.get(name)
        check_image_ids(image_ids(records), name)
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluator = RegionEvaluator(name, output_dir, describe_protocol(cfg, model, name), tasks, len(records))
        # Each process reads its share of what is left, so the number of processes may change between runs.
        loader = build_test_loader(cfg, name, skip=evaluator.finished)
        regionspot = next(module for module in model.modules() if isinstance(module, RegionSpot))  # inside DDP
        masks = "rle" if regionspot.masks else ""  # one RLE per region, in place of full-size masks
        with inference_context(regionspot):
            metrics = inference_on_dataset(partial(regionspot.inference, masks=masks), loader, evaluator)
    if comm.is_main_process():
        print_csv_format(metrics)
    return metrics


def load_host(model: nn.Module, weights: str, output_dir: str, resume: bool = False) -> None:
    """Load the weights of a detector to evaluate it; averaged weights of a recognizer inside are preferred.

    Args:
        model: the detector, with RegionSpot inside or before it gets it.
        weights: its checkpoint, "" for none.
        output_dir: directory of a run; ``resume`` prefers its last checkpoint.
    """
    has_recognizer = any(isinstance(module, RegionRecognizer) for module in model.modules())
    average = {"ema": find_recognizer(model).knowledge_integration} if has_recognizer else {}
    checkpointer = SafeDetectionCheckpointer(model, output_dir, **average)
    is_resumed = resume and checkpointer.has_checkpoint()
    checkpointer.load(checkpointer.get_checkpoint_file() if is_resumed else weights, checkpointables=list(average))


def describe_protocol(cfg: CfgNode, model: nn.Module, name: str) -> Protocol:
    """Return everything that the numbers of an evaluation depend on."""
    node, recognizer = cfg.MODEL.REGIONSPOT, find_recognizer(model)
    annotations = describe_annotations(name)
    encoder, phrases = recognizer.classifier.text_encoder, recognizer.classifier.get_phrases()
    metric = choose_metric(cfg, name)
    weights, architecture = Path(cfg.MODEL.WEIGHTS).name or "no file", cfg.MODEL.META_ARCHITECTURE
    if architecture == "CropBaseline":
        architecture += " on mask crops" if node.CROP.MASKED else " on box crops"
    rule = f"{node.SCORE_RULE}, {node.SCORE_FUNCTION}, above {node.SCORE_THRESH_TEST}, NMS {node.NMS_THRESH_TEST}"
    if recognizer.ensemble is not None:
        rule += f", {recognizer.ensemble.describe()}"
    if node.UNKNOWN.THRESHOLD or node.UNKNOWN.BACKGROUND:
        background = short_hash(json.dumps(list(node.UNKNOWN.BACKGROUND)))
        rule += f", unknown below {node.UNKNOWN.THRESHOLD} or {len(node.UNKNOWN.BACKGROUND)} names ({background})"
    return Protocol(
        dataset=f"{name} ({annotations['fingerprint'][:12]})",
        metric=metric,
        boxes=_describe_boxes(cfg, name),
        labels_per_box=node.LABELS_PER_BOX,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        score=rule,
        vocabulary=f"{len(recognizer.vocabulary)} names ({short_hash(json.dumps(phrases))})",
        templates=f"{len(encoder.templates)} ({short_hash(json.dumps([*encoder.templates, node.CLIP.NAME_STYLE]))})",
        checkpoint=f"{architecture} {weights} ({fingerprint(recognizer.state_dict())[:12]}) in {node.PRECISION}",
        config=_hash_config(cfg),
    )


def _hash_config(cfg: CfgNode) -> str:
    """Return a hash of the config's model and input, the same on all devices."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = ""  # an evaluation on a GPU resumes on a CPU
    return short_hash(cfg.MODEL.dump() + cfg.INPUT.dump())


def choose_metric(cfg: CfgNode, name: str) -> str:
    """Return the metric of a data set: ``TEST.PROTOCOL``, or by default that of its metadata.

    Raises:
        ValueError: unknown protocol, LVIS's for a data set of another kind, or metadata without a known evaluator.
    """
    metadata, protocol = MetadataCatalog.get(name), cfg.TEST.PROTOCOL
    if not metadata.get("evaluator_type") and metadata.get("json_file"):
        DatasetCatalog.get(name)  # reading the file sets it
    kind = metadata.get("evaluator_type") or ("" if metadata.get("json_file") else "coco")
    if protocol not in ("", *METRICS):
        raise ValueError(f"TEST.PROTOCOL: expected {', '.join(METRICS)} or nothing, got {protocol!r}")
    if kind not in ("lvis", "coco"):
        raise ValueError(f"data set {name!r}: expected evaluator_type lvis or coco in its metadata, got {kind!r}")
    if protocol in ("lvis", "fixed") and kind != "lvis":
        raise ValueError(
            f"TEST.PROTOCOL {protocol}: data set {name!r} is no LVIS data set; leave it empty, or set coco"
        )
    if protocol == "fixed" and cfg.TEST.DETECTIONS_PER_IMAGE >= 0:
        logger.warning(
            "TEST.PROTOCOL fixed with %d detections per image: fixed AP has no such limit; set "
            "TEST.DETECTIONS_PER_IMAGE -1 (or more of them)",
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    return protocol or kind


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
        detector = detector_config(cfg)
        weights = Path(detector.MODEL.WEIGHTS)
        digest = sha256_of_file(weights) if weights.is_file() else short_hash(detector.MODEL.WEIGHTS)
        detector.MODEL.DEVICE = ""
        return (
            f"{node.DETECTOR.OUTPUT} of {Path(node.DETECTOR.CONFIG_FILE).stem} (config {short_hash(detector.dump())}, "
            f"weights {weights.name} {digest[:12]}){best}"
        )
    return ANNOTATED
