"""The evaluator of regions: LVIS AP, fixed AP or COCO AP of boxes and masks, and accuracy on annotated boxes."""

import logging
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from regionspot.data.coco_io import Results, write_results
from regionspot.data.datasets import category_ids
from regionspot.evaluation.average_precision import Evaluation
from regionspot.evaluation.class_cap import ClassCap
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import DETS_PER_CLASS
from regionspot.evaluation.prediction_log import ImagePredictions, PredictionLog
from regionspot.evaluation.protocol import ANNOTATED, Protocol
from regionspot.evaluation.record import EvaluationRecord
from regionspot.evaluation.report import chance_warning, evaluate_task, format_table, region_accuracy, write_evaluations
from regionspot.utils.files import short_hash
from regionspot.utils.rle import PackedRles

logger = logging.getLogger(__name__)

LVIS_LIMIT = 300  # detections of an image that LVIS AP counts


class RegionEvaluator(DatasetEvaluator):
    """Evaluates a data set by its protocol, and leaves the predictions as COCO results for any other tool.

    Predictions are written as they come, and an interrupted run resumes after the images that are done. Neither the
    number of processes nor an interruption changes a digit. Fixed AP keeps only predictions that may be among the best
    of their class.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path,
        protocol: Protocol,
        tasks: tuple[str, ...] = ("bbox",),
        num_images: int = 0,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set; without ``json_file`` in its metadata it is written in COCO's format,
                as Detectron2's evaluator does.
            output_dir: for the predictions, ``metrics.json`` and the tables.
            protocol: what to evaluate, and by which rules.
            tasks: "bbox", "segm".
            num_images: size of the data set; 0 accepts any number.
        """
        self.metadata = MetadataCatalog.get(dataset_name)
        self.output_dir, self.protocol = Path(output_dir), protocol
        self.tasks, self.num_images = tasks, num_images
        self.json_file = Path(self.metadata.get("json_file") or self.output_dir / "annotations.json")
        if not self.metadata.get("json_file"):
            convert_to_coco_json(dataset_name, str(self.json_file), allow_cached=False)
        self.category_ids = category_ids(dataset_name)  # before hours of inference: refuses categories that differ
        cap = ClassCap(len(self.metadata.thing_classes), DETS_PER_CLASS) if protocol.metric == "fixed" else None
        self.log = PredictionLog(output_dir, short_hash(protocol.identity() + " ".join(tasks)), cap)
        self.finished = self.log.open()

    def reset(self) -> None:
        """Do nothing: predictions of an interrupted run stay."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write the predictions of a batch, see ``RegionSpot.forward``."""
        for image, output in zip(inputs, outputs):
            if image.get("unreadable"):
                self.log.append(ImagePredictions(image["image_id"], unreadable=image["unreadable"]))
            else:
                self.log.append(self._image_predictions(image, output))

    def _image_predictions(self, image: dict[str, Any], output: dict[str, Any]) -> ImagePredictions:
        detections = output["instances"].to(torch.device("cpu"))
        # Before anything else: without a limit per image there may be hundreds of thousands of detections.
        admitted = self.log.admits(image["image_id"], detections.pred_classes.numpy(), detections.scores.numpy())
        detections = detections[torch.from_numpy(admitted)]
        # Detections of the same region share its box and mask, which are written once.
        _, first, regions = np.unique(detections.region_indices.numpy(), return_index=True, return_inverse=True)
        boxes = detections.pred_boxes.tensor.numpy()[first]
        predictions = ImagePredictions(
            image_id=image["image_id"],
            classes=detections.pred_classes.numpy().astype(np.int32),
            scores=detections.scores.numpy(),
            regions=regions.astype(np.int32).reshape(-1),
            boxes=BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS),
        )
        if "segm" in self.tasks:
            predictions.rles = [detections.pred_masks_rle[row]["counts"] for row in first.tolist()]
            predictions.size = detections.image_size
        if self.protocol.boxes == ANNOTATED:
            predictions.targets = image["instances"].gt_classes.numpy()
            predictions.top = output["regions"].top_classes.cpu().numpy()
        return predictions

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the metrics of each task, in percent, in the main process; None in the others, which wait for it.

        Raises:
            ValueError: not every image of the data set was evaluated, or its annotations cannot be.
        """
        self.log.collect()
        metrics = None
        try:
            if comm.is_main_process():
                metrics = self._evaluate()
        finally:
            self.log.finish(complete=metrics is not None)
        return metrics

    def _evaluate(self) -> dict[str, dict[str, float]]:
        if self.num_images and len(self.log) != self.num_images:
            raise ValueError(
                f"{self.output_dir}: predictions of {len(self.log)} images, expected all {self.num_images} of "
                f"{self.metadata.name}; run the evaluation again, which resumes with those that are missing"
            )
        truth = GroundTruth(self.json_file)
        results, regions, unreadable = self._read_log()
        # the names of Detectron2's evaluators, which other tools look for
        kind = "coco" if self.protocol.metric == "coco" else "lvis"
        file_name = f"{kind}_instances_results.json"
        write_results(self.output_dir / file_name, results)
        evaluations = self._evaluate_tasks(truth, results)
        metrics = OrderedDict({task: evaluation.metrics() for task, evaluation in evaluations.items()})
        line = self.protocol.line(len(self.log), self.num_images)
        line += f", {len(unreadable)} unreadable" * bool(unreadable)
        logger.info("%s\n%s", line, format_table(metrics))
        more: dict[str, object] = {"protocol": line}
        if unreadable:
            more["unreadable"] = unreadable
            logger.warning(
                "%d images could not be read and count as images without detections: %s",
                len(unreadable),
                "; ".join(unreadable),
            )
        if regions:
            targets, top = zip(*regions)
            metrics["region"] = more["region"] = region_accuracy(targets, top, truth.frequencies)
            logger.info("accuracy on the annotated boxes\n%s", format_table({"region": metrics["region"]}))
            if warning := chance_warning(targets, top, metrics["bbox"]["AP"]):
                more["warning"] = warning
                logger.warning("%s", warning)
        write_evaluations(self.output_dir, truth, evaluations, **more)
        self._write_record(file_name)
        return metrics

    @property
    def _max_dets(self) -> int:
        limit = self.protocol.detections_per_image
        return LVIS_LIMIT if limit < 0 else min(limit, LVIS_LIMIT)

    def _write_record(self, predictions: str) -> None:
        images = self.metadata.get("image_root")
        EvaluationRecord(
            annotations=str(self.json_file.absolute()),
            predictions=predictions,
            metric=self.protocol.metric,
            max_dets=self._max_dets,
            dataset=self.metadata.name,
            images=str(Path(images).absolute()) if images else "",
            protocol=asdict(self.protocol),
        ).write(self.output_dir)

    def _evaluate_tasks(self, truth: GroundTruth, results: Results) -> dict[str, Evaluation]:
        evaluations: dict[str, Evaluation] = {}
        for task in self.tasks:
            try:
                evaluations[task] = evaluate_task(truth, results, task, self.protocol.metric, self._max_dets)
            except ValueError as error:
                if task == "bbox":
                    raise
                logger.warning("masks are not evaluated: %s", error)  # such as annotations without masks
        return evaluations

    def _read_log(self) -> tuple[Results, list[tuple[np.ndarray, np.ndarray]], list[str]]:
        """Return all detections, the annotated and the best classes of each image's regions, and unreadable images."""
        no_detections = (*np.zeros((2, 0), np.int64), np.zeros(0), np.zeros((0, 4)), np.zeros(0, np.int64))
        images: list[tuple[np.ndarray, ...]] = [no_detections]
        rles, classes_of_regions, unreadable = PackedRles(), [], []
        for image in self.log:
            # D detections of R regions; boxes (R, 4) -> (D, 4)
            image_ids = np.full(len(image.classes), image.image_id)
            rows = len(rles) + image.regions.astype(np.int64)  # an image's regions are numbered from 0
            columns = (image_ids, self.category_ids[image.classes], image.scores, image.boxes[image.regions], rows)
            images.append(columns)
            for counts in image.rles:
                rles.append(image.size, counts.encode())
            if image.targets is not None and image.top is not None and len(image.targets):
                classes_of_regions.append((image.targets, image.top))
            if image.unreadable:
                unreadable.append(image.unreadable)
        ids, categories, scores, boxes, regions = (np.concatenate(column) for column in zip(*images))
        masks = (regions, rles) if "segm" in self.tasks else (None, None)
        return Results(ids, categories, scores, boxes, *masks), classes_of_regions, unreadable
