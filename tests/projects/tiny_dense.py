"""The lazy configs of projects/RegionSpotDense at sizes that a CPU builds in milliseconds."""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from omegaconf import DictConfig

from ..helpers import ROOT, TINY

PROJECT = ROOT / "projects" / "RegionSpotDense"
STAGES = [(8, 8, 1), (8, 16, 2), (16, 24, 2), (24, 32, 2)]  # channels in and out, stride
SMALL = [
    *["model.detector.backbone.bottom_up.stem.out_channels=8", "model.detector.backbone.bottom_up.stem.norm=BN"],
    *["model.detector.backbone.bottom_up.freeze_at=0", "model.detector.backbone.out_channels=64", "train.device=cpu"],
    *["dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "dataloader.train.total_batch_size=4"],
]
DENSE = [
    *["model.detector.num_classes=4", "model.detector.head.conv_dims=[64]", "model.detector.test_score_thresh=0.0"],
    *["model.top_k=20", "model.detector_weights=''", f"model.recognizer.cfg.config_file={TINY}"],
]
RCNN = [
    *["model.detector.proposal_generator.head.in_channels=64", "model.weights=''"],
    *[f"model.detector.roi_heads.recognizer.cfg.config_file={TINY}", "model.detector.roi_heads.boxes.top_k=20"],
]


def tiny_dense_config(name: str, *overrides: str) -> DictConfig:
    """Return the config ``name`` with a ResNet of four blocks, BatchNorm that is not frozen, and a tiny RegionSpot."""
    cfg = LazyConfig.load(str(PROJECT / "configs" / f"{name}.py"))
    detector = cfg.model.detector
    detector.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock, num_blocks=1, stride_per_block=[s], in_channels=i, out_channels=o, norm="BN"
        )
        for i, o, s in STAGES
    ]
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        resize = loader.mapper.augmentations[0]
        resize.short_edge_length, resize.max_size = 96, 256
    if "rcnn" in name:
        return LazyConfig.apply_overrides(cfg, [*SMALL, *RCNN, *overrides])
    detector.backbone.top_block.in_channels = 64 if "in_feature" in detector.backbone.top_block else 32
    detector.head.input_shape = [ShapeSpec(channels=64)] * 5
    if "anchor_generator" in detector:
        detector.anchor_generator.sizes = [[x, x * 1.3, x * 1.6] for x in (12, 20, 32, 64, 128)]
    return LazyConfig.apply_overrides(cfg, [*SMALL, *DENSE, *overrides])
