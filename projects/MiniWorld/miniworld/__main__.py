"""``miniworld COMMAND``, or ``python -m miniworld COMMAND``; only the standard library is imported here."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from regionspot_cli.command import Command, add_overrides, run_one_of

CPUS = os.cpu_count() or 1
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# steps, batch size, learning rate, images
RECIPES = {
    "clip": (6000, 64, 1e-3, 40000),
    "sam": (5000, 8, 1e-3, 6000),
    "sam2": (2400, 8, 1e-3, 6000),
    "siglip": (2000, 64, 1e-3, 30000),
}

DEMO = """train RegionSpot in a drawn world, evaluate it on classes without annotations (make demo)

Example:
    miniworld demo --output output/demo
"""
ABLATIONS = """run the paper's ablations: every config with several seeds, a table beside the paper's numbers

An interrupted run continues: what is in DIR/results is not run again.

Example:
    miniworld ablations --output output/ablations
"""
EXAMPLES = """recognize novel classes by example regions, by their names, and by both: a table over several seeds

Models are trained where they are not in DIR/training yet, which `miniworld ablations` fills, too. An interrupted run
continues.

Example:
    miniworld examples --output output/ablations
"""
AUDIT = """plant wrong labels in the validation split and look for them: precision and recall of the first N

Example:
    miniworld audit --output output/ablations
"""
TRANSFER = """move trained models from SAM to SAM 2: a linear map, with a short fine-tune, and training from scratch

Models are trained where they are not in DIR/training yet. An interrupted run continues.

Example:
    miniworld transfer --output output/ablations
"""
PRETRAIN = """train one of the frozen models of this world: SAM, CLIP, SAM 2 or SigLIP

Run again after an interruption, it resumes from its last checkpoint.

Examples:
    miniworld pretrain clip --output output/pretrain
    miniworld pretrain sam2 --output output/pretrain --no-amp
"""
DRAW = """draw the annotated splits into $DETECTRON2_DATASETS/miniworld, in LVIS format

Examples:
    miniworld draw
    miniworld draw --sheet docs/miniworld.png
"""


def parse_demo(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR")
    parser.add_argument("--config-file", type=Path, default=CONFIGS / "RegionSpot-mini.yaml", metavar="FILE")
    parser.add_argument("--train", type=int, default=3200, help="number of training scenes")
    parser.add_argument("--test", type=int, default=200, help="number of test scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--workers", type=int, default=CPUS, help="drawing processes")
    add_overrides(parser)
    return parser.parse_args(arguments)


def parse_ablations(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--output", type=Path, default=Path("output/ablations"), metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each config")
    parser.add_argument("--train", type=int, default=3200, help="number of training scenes")
    parser.add_argument("--test", type=int, default=200, help="number of test scenes")
    parser.add_argument("--jobs", type=int, default=CPUS, help="runs at the same time")
    parser.add_argument("--rows", nargs="+", metavar="CONFIG", help="only these, such as plus/mask-pooling")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val, to choose among options")
    add_overrides(parser)
    return parser.parse_args(arguments)


def _add_training(parser: ArgumentParser) -> None:
    parser.add_argument("--config-file", type=Path, default=CONFIGS / "RegionSpot-mini.yaml", metavar="FILE")
    _add_output(parser)


def _add_output(parser: ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/ablations"), metavar="DIR")
    parser.add_argument("--train", type=int, default=3200, help="number of training scenes")
    parser.add_argument("--workers", type=int, default=CPUS, help="drawing processes")


def parse_examples(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_training(parser)
    parser.add_argument("--seeds", type=int, default=3, help="models, each with other examples")
    parser.add_argument("--val", type=int, default=1600, help="scenes that examples are taken from")
    parser.add_argument("--test", type=int, default=200, help="number of test scenes")
    add_overrides(parser)
    return parser.parse_args(arguments)


def parse_audit(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_training(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the errors")
    parser.add_argument("--val", type=int, default=1600, help="scenes whose labels are audited")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels that become wrong")
    add_overrides(parser)
    return parser.parse_args(arguments)


def parse_transfer(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_output(parser)
    parser.add_argument("--seeds", type=int, default=3, help="models that are moved")
    parser.add_argument("--images", type=int, default=3200, help="training scenes whose regions the map is fitted on")
    parser.add_argument("--steps", type=int, default=200, help="iterations of the fine-tune")
    parser.add_argument("--test", type=int, default=200, help="number of scenes to evaluate on")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="of these scenes")
    add_overrides(parser)
    return parser.parse_args(arguments)


def parse_pretrain(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("model", choices=sorted(RECIPES), help="which model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for checkpoint, images and result")
    parser.add_argument("--steps", type=int, help="iterations")
    parser.add_argument("--batch", type=int, help="images in a batch")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--images", "--pictures", type=int, help="images to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of images, weights and batches")
    parser.add_argument("--amp", action=BooleanOptionalAction, default=True, help="bf16; slow on a CPU without it")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--workers", type=int, default=CPUS, help="drawing processes")
    parser.add_argument("--save-every", type=int, default=250, help="iterations between checkpoints")
    args = parser.parse_args(arguments)
    for key, value in zip(("steps", "batch", "lr", "images"), RECIPES[args.model]):
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def parse_draw(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")))
    parser.add_argument("--train", type=int, default=4000, help="number of scenes")
    parser.add_argument("--val", type=int, default=300, help="number of scenes")
    parser.add_argument("--test", type=int, default=300, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world")
    parser.add_argument("--workers", type=int, default=CPUS, help="processes")
    parser.add_argument(
        "--sheet", "--picture", type=Path, metavar="FILE", help="only draw one image: scenes above captioned images"
    )
    return parser.parse_args(arguments)


COMMANDS = {
    "demo": Command(parse_demo, "miniworld.demo", DEMO, "the drawn scenes and the features are kept"),
    "ablations": Command(parse_ablations, "miniworld.ablations", ABLATIONS, "finished runs are kept"),
    "examples": Command(parse_examples, "miniworld.examples", EXAMPLES, "trained models and finished seeds are kept"),
    "audit": Command(parse_audit, "miniworld.audit", AUDIT, "trained models are kept"),
    "transfer": Command(parse_transfer, "miniworld.transfer", TRANSFER, "trained models and finished seeds are kept"),
    "draw": Command(parse_draw, "miniworld.draw", DRAW, "finished splits are kept"),
    "pretrain": Command(parse_pretrain, "miniworld.pretrain", PRETRAIN, "the last checkpoint is kept"),
}


def main() -> NoReturn:
    run_one_of(COMMANDS, "miniworld", "A drawn world in which RegionSpot is trained and evaluated in minutes on a CPU.")


if __name__ == "__main__":
    main()
