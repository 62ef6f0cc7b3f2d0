"""The evaluator that belongs to a data set."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from regionspot.evaluation.protocol import METRICS, Protocol
from regionspot.evaluation.region_evaluator import RegionEvaluator


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | Path, protocol: Protocol, number: int
) -> RegionEvaluator:
    """Return the evaluator of a data set.

    Args:
        cfg: the config.
        dataset_name: a registered data set, whose ``evaluator_type`` ("lvis" or "coco") is known.
        output_dir: for predictions and metrics.
        protocol: what to evaluate, and by which rules.
        number: of the data set's images.

    Raises:
        ValueError: another evaluator type.
    """
    if protocol.metric not in METRICS:
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        raise ValueError(
            f"data set {dataset_name!r}: expected evaluator_type 'lvis' or 'coco' in its metadata, got {kind!r}"
        )
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    return RegionEvaluator(dataset_name, output_dir, protocol, tasks, number)
