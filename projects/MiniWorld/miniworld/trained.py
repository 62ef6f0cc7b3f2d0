"""Models that several experiments of this world share: trained where they are not there yet."""

import json
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode

from miniworld import experiment
from regionspot import RegionSpotPredictor
from regionspot.index import ImageSet, RegionIndex, build_index, dataset_images
from regionspot.utils.files import short_hash

NUM_SCENES = 3200  # of a training, by default


def training_directory(args: Namespace, config_file: Path, seed: int) -> Path:
    """Return where a config is trained with a seed; all experiments under ``args.output`` share it."""
    config_file = config_file.resolve()
    if config_file.is_relative_to(experiment.CONFIGS):
        name = config_file.relative_to(experiment.CONFIGS).with_suffix("").as_posix().replace("/", "-")
    else:  # another config may have the same name
        name = f"{config_file.stem}-{short_hash(str(config_file))}"
    return args.output / "training" / f"{name}-{seed}{settings_suffix(args)}"


def settings_suffix(args: Namespace) -> str:
    """Return what tells the files of a run with overrides, or other numbers of scenes, from one without."""
    settings = json.dumps([args.train, args.opts])
    return "" if settings == json.dumps([NUM_SCENES, []]) else f"-{short_hash(settings)}"


def load_trained(
    args: Namespace, seed: int, inference_config: Path | None = None
) -> tuple[RegionSpotPredictor, CfgNode]:
    """Return the model of a config and a seed, with its config; trained unless its weights are in ``args.output``.

    ``inference_config`` takes the place of ``args.config_file`` once it is trained.
    """
    output = training_directory(args, args.config_file, seed)
    weights = output / "model_final.pth"
    if not weights.is_file():
        cfg = experiment.miniworld_config(args.config_file, output, seed, args.opts)
        experiment.train(cfg, args.output / "features")
    cfg = experiment.miniworld_config(inference_config or args.config_file, output, seed, args.opts)
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
