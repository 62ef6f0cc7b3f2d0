"""The evaluator of regions: LVIS AP, fixed AP or COCO AP, of boxes and masks, and accuracy on annotated boxes."""

import itertools
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode

from regionspot.data.datasets import category_ids
from regionspot.evaluation.accuracy import region_accuracy
from regionspot.evaluation.ground_truth import read_ground_truth
from regionspot.evaluation.prediction_log import ImagePredictions, PredictionLog
from regionspot.evaluation.protocol import ANNOTATED, Protocol
from regionspot.evaluation.report import evaluate_task, format_table, write_outcomes
from regionspot.evaluation.results import Results
from regionspot.evaluation.results_file import write_results

logger = logging.getLogger(__name__)

LVIS_LIMIT = 300  # detections of an image that LVIS AP counts


class RegionEvaluator(DatasetEvaluator):
    """Evaluates a data set by its protocol, and leaves the predictions as COCO results for any other tool.

    Predictions are written as they come; images that were done before a run was cut are not done again. Neither the
    number of processes nor a cut changes a digit.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path,
        protocol: Protocol,
        tasks: tuple[str, ...] = ("bbox",),
        of: int = 0,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set; without ``json_file`` in its metadata it is written in COCO's format,
                as Detectron2's evaluator does.
            output_dir: for the predictions, ``metrics.json`` and the tables.
            protocol: what to evaluate, and by which rules.
            tasks: "bbox", "segm".
            of: number of images of the data set.
        """
        self.metadata = MetadataCatalog.get(dataset_name)
        self.output_dir, self.protocol, self.tasks, self.of = Path(output_dir), protocol, tasks, of
        self.json_file = Path(self.metadata.get("json_file") or self.output_dir / "annotations.json")
        if not self.metadata.get("json_file"):
            convert_to_coco_json(dataset_name, str(self.json_file), allow_cached=False)
        self.category_ids = category_ids(dataset_name)  # what does not fit is said before inference
        self.log = PredictionLog(output_dir, protocol.identity() + " ".join(tasks))
        self.finished = self.log.open()

    def reset(self) -> None:
        """Nothing to forget: what was written before counts."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write the predictions of a batch, see ``RegionSpot.forward``."""
        for image, output in zip(inputs, outputs):
            if image.get("unreadable"):
                self.log.append(ImagePredictions(image["image_id"], [], [], [], unreadable=image["unreadable"]))
                continue
            detections = output["instances"].to(torch.device("cpu"))
            boxes = detections.pred_boxes.tensor.numpy()
            predictions = ImagePredictions(
                image_id=image["image_id"],
                classes=detections.pred_classes.tolist(),
                scores=detections.scores.tolist(),
                boxes=BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist(),
            )
            if "segm" in self.tasks:
                unique = {id(rle): rle for rle in detections.pred_masks_rle}
                rows = {key: row for row, key in enumerate(unique)}
                predictions.regions = [rows[id(rle)] for rle in detections.pred_masks_rle]
                predictions.rles = [rle["counts"] for rle in unique.values()]
                predictions.size = detections.image_size
            if self.protocol.boxes == ANNOTATED:
                predictions.targets = image["instances"].gt_classes.tolist()
                predictions.top = output["regions"].top_classes.tolist()
            self.log.append(predictions)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the metrics of each task, in percent, in the main process; None in the others."""
        images = self.log.gather()
        if images is None:
            self.log.remove()
            return None
        kind = "coco" if self.protocol.metric == "coco" else "lvis"
        results, truth = self._to_results(images), read_ground_truth(self.json_file)
        write_results(results, self.output_dir / f"{kind}_instances_results.json")
        line, limit = self.protocol.line(len(images), self.of), self.protocol.detections_per_image
        unreadable = [image.unreadable for image in images if image.unreadable]
        line += f", {len(unreadable)} unreadable" * bool(unreadable)
        limit = LVIS_LIMIT if limit < 0 else min(limit, LVIS_LIMIT)
        outcomes = {}
        for task in self.tasks:
            try:
                outcomes[task] = evaluate_task(truth, results, task, self.protocol.metric, limit)
            except ValueError as error:
                if task == "bbox":
                    raise
                logger.warning("masks are not evaluated: %s", error)  # such as annotations without masks
        metrics = OrderedDict({task: outcome.metrics for task, outcome in outcomes.items()})
        logger.info("%s\n%s", line, format_table(metrics))
        more: dict[str, object] = {"protocol": line}
        if unreadable:
            more["unreadable"] = unreadable
            logger.warning(
                "%d images could not be read and count as images without detections: %s",
                len(unreadable),
                "; ".join(unreadable),
            )
        if any(image.targets for image in images):
            metrics["region"] = more["region"] = region_accuracy(images, [f or "" for f in truth.frequencies])
            logger.info("accuracy on the annotated boxes\n%s", format_table({"region": metrics["region"]}))
        write_outcomes(self.output_dir, truth, outcomes, **more)
        self.log.remove()
        return metrics

    def _to_results(self, images: list[ImagePredictions]) -> Results:
        numbers = [len(image.classes) for image in images]
        starts = np.cumsum([0] + [len(image.rles) for image in images])
        classes = itertools.chain.from_iterable(image.classes for image in images)
        flat = itertools.chain.from_iterable(itertools.chain.from_iterable(image.boxes for image in images))
        total = sum(numbers)
        regions = rles = None
        if "segm" in self.tasks:
            regions = np.fromiter(
                (start + row for image, start in zip(images, starts) for row in image.regions), np.int64, total
            )
            rles = [{"size": list(image.size), "counts": counts} for image in images for counts in image.rles]
        return Results(
            image_ids=np.repeat(np.array([image.image_id for image in images], np.int64), numbers),
            category_ids=self.category_ids[np.fromiter(classes, np.int64, total)],
            scores=np.fromiter(itertools.chain.from_iterable(image.scores for image in images), np.float64, total),
            boxes=np.fromiter(flat, np.float64, 4 * total).reshape(-1, 4),
            regions=regions,
            rles=rles,
        )
