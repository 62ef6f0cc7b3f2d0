"""Training and evaluation of RegionSpot itself."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, verify_results
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, load_model
from regionspot.checkpoint.loading import find_recognizer
from regionspot.data.build import (
    build_test_loader,
    build_train_loader,
    check_registered,
    dataset_vocabulary,
    proposal_source,
)
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.image_check import check_images
from regionspot.data.tokens.side_by_side import choose_store, list_stores
from regionspot.engine.evaluate import choose_metric, evaluate_dataset
from regionspot.engine.optimizer import build_lr_scheduler, build_optimizer
from regionspot.engine.region_logs import RegionAccuracy, validate_regions
from regionspot.engine.run_setup import log_size
from regionspot.engine.trainer import Trainer, TrainingPlan
from regionspot.modeling import RegionSpot
from regionspot.modeling.identity import describe_clip, describe_sam
from regionspot.utils.files import directory_name


class RegionSpotTrainer(Trainer):
    """``Trainer`` with everything that a config of RegionSpot names."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build what ``cfg`` names; weights are loaded by ``resume_or_load``."""
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_architecture(cfg)
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")  # mistakes in these are reported before the test sets'
        check_test_sets(cfg)
        self.cfg = cfg = choose_token_stores(cfg)
        plan = TrainingPlan.from_config(cfg)
        data_loader = build_train_loader(cfg, plan.seed)
        # encoded in ``train``, when CLIP's weights are loaded
        self.vocabularies = {name: dataset_vocabulary(cfg, name) for name in cfg.DATASETS.TRAIN}
        model = build_model(cfg)
        log_size(model)
        self.recognizer = find_recognizer(model)
        optimizer = build_optimizer(cfg, model)
        super().__init__(model, data_loader, optimizer, build_lr_scheduler(cfg, optimizer), plan)

    def build_checkpointer(self, model: nn.Module, **checkpointables: Any) -> RegionSpotCheckpointer:
        return RegionSpotCheckpointer.from_config(self.cfg, model, self.cfg.OUTPUT_DIR, **checkpointables)

    def train(self) -> dict[str, Any]:
        """Train, and evaluate as the config says; refuse token stores of other models."""
        self._check_token_stores()
        for name, names in self.vocabularies.items():
            self.recognizer.set_vocabulary(names, name)
        results = super().train()
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def build_hooks(self) -> list[HookBase]:
        accuracy = [RegionAccuracy(self.model, self.plan.log_period)] if comm.is_main_process() else []
        return [*accuracy, *super().build_hooks()]

    def evaluate(self) -> dict[str, Any]:
        if self.cfg.TEST.VALIDATION_IMAGES > 0:
            self._validate()
        return self.test(self.cfg, self.model)

    def _validate(self) -> None:
        """Log loss and accuracy of annotated regions of the test sets, and drawings of some."""
        for name in self.cfg.DATASETS.TEST:
            validation = validate_regions(self.cfg, self.model, name, self.cfg.TEST.VALIDATION_IMAGES)
            if not comm.is_main_process() or np.isnan(validation.top1):
                continue
            prefix = "validation" if len(self.cfg.DATASETS.TEST) == 1 else f"{name}/validation"
            values = {f"{prefix}/loss": validation.loss, f"{prefix}/top1": validation.top1}
            self.storage.put_scalars(**values, smoothing_hint=False)
            for image_id, drawing in validation.drawings.items():
                self.storage.put_image(f"{prefix}/{image_id}", drawing.transpose(2, 0, 1))

    def _check_token_stores(self) -> None:
        """Refuse token stores that another SAM or CLIP made; the model's weights must be loaded."""
        stores = [mapper.token_store for mapper in self.loop.data_loader.dataset.mappers if mapper.token_store]
        if not stores:
            return
        expected = {"sam": describe_sam(self.recognizer)}
        if stores[0].has_feature_maps and self.cfg.MODEL.REGIONSPOT.CLIP.FEATURES != "none":  # then all have them
            expected["clip"] = describe_clip(self.recognizer)
        for store in stores:
            store.check_origin(expected)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluate on each of ``DATASETS.TEST`` against that data set's own vocabulary.

        ``evaluators``, one for each test set, such as Detectron2's, take the place of RegionSpot's. The metrics of
        several data sets are returned by name, with the "odinw_average" of those of ODinW.
        """
        check_architecture(cfg)
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        results: dict[str, Any] = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            with find_recognizer(model).using_vocabulary(dataset_vocabulary(cfg, name)):
                if evaluators:
                    results[name] = inference_on_dataset(model, build_test_loader(cfg, name), evaluators[index])
                    continue
                directory = Path(cfg.OUTPUT_DIR) / "inference" / directory_name(name)
                results[name] = evaluate_dataset(cfg, model, name, directory)
        if len(results) == 1:
            return next(iter(results.values()))
        odinw = [result for name, result in results.items() if name.startswith("odinw_") and result]
        if odinw:  # sets without annotations do not count
            tasks = [task for task in ("bbox", "segm") if all(task in result for result in odinw)]
            average = {task: float(np.nanmean([result[task]["AP"] for result in odinw])) for task in tasks}
            results["odinw_average"] = {task: {"AP": value} for task, value in average.items()}
        return results


def choose_token_stores(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` with the configured localizer's store in place of each directory that has those of several.

    Raises:
        ValueError: a directory has none of this localizer.
    """
    paths = cfg.DATASETS.TOKEN_STORES_TRAIN
    if not any(list_stores(path) for path in paths):
        return cfg
    sam = describe_sam(load_model(cfg).recognizer)  # its weights decide, which the trainer loads after the data
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TOKEN_STORES_TRAIN = tuple(
        str(choose_store(path, sam)) if list_stores(path) else path for path in paths
    )
    cfg.freeze()
    return cfg


def check_architecture(cfg: CfgNode) -> None:
    """Refuse other models than RegionSpot's own: this trainer and its evaluation expect their regions."""
    name = cfg.MODEL.META_ARCHITECTURE
    if not issubclass(META_ARCH_REGISTRY.get(name), RegionSpot):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE: expected RegionSpot or CropBaseline, got {name!r}; a detector with RegionSpot's "
            "head is trained and evaluated by projects/RegionSpotRCNN/train_net.py"
        )


def check_test_sets(cfg: CfgNode) -> None:
    """Refuse test sets, files and vocabularies on which an evaluation would fail hours later."""
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    for name in cfg.DATASETS.TEST:
        proposal_source(cfg, name)
        dataset_vocabulary(cfg, name)
        choose_metric(cfg, name)
        records, mapper = DatasetCatalog.get(name), RegionSpotDatasetMapper(cfg, False)
        check_images(records, np.arange(len(records)), name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)
