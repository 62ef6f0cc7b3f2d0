"""The evaluator that belongs to a data set."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from regionspot.evaluation.lvis import LVISEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Return the evaluator that the ``evaluator_type`` of the data set's metadata names ("lvis" or "coco").

    Raises:
        ValueError: another type.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("evaluator_type") is None and dataset_name in DatasetCatalog:
        DatasetCatalog.get(dataset_name)  # the annotations may say
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)
    if evaluator_type == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"data set {dataset_name!r}: expected evaluator_type 'lvis' or 'coco' in its metadata, got {evaluator_type!r}"
    )
