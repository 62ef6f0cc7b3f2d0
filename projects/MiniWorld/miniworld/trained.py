"""Models that several experiments of this world share: trained where they are not there yet."""

from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode

from miniworld import experiment
from regionspot import RegionSpotPredictor
from regionspot.index import ImageSet, RegionIndex, build_index, dataset_images


def load_trained(args: Namespace, seed: int) -> tuple[RegionSpotPredictor, CfgNode]:
    """Return the full model of a seed, with its config; it is trained unless its weights are in ``args.output``.

    The directories are those of ``miniworld ablations``.
    """
    output = args.output / "training" / f"{args.config_file.stem}-{seed}"
    weights = output / "model_final.pth"
    cfg = experiment.miniworld_config(args.config_file, output, seed, args.opts)
    if not weights.is_file():
        experiment.train(cfg, args.output / "features")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.TEST.BATCH_SIZE = 8
    cfg.freeze()
    return RegionSpotPredictor(cfg), cfg


def index_split(predictor: RegionSpotPredictor, cfg: CfgNode, dataset_name: str, directory: Path) -> RegionIndex:
    """Return the index of a split's annotated boxes; an existing one is kept."""
    images: ImageSet = dataset_images(dataset_name)
    index = build_index(predictor, cfg, images, directory)
    assert index is not None  # nobody else writes there
    return index
