"""What each part costs, beside the plain way: ``python -m tools.benchmarks BENCHMARK`` in the checkout."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from regionspot_cli.command import Command, add_overrides, run_one_of

MODEL = """time every part on one image

Example:
    python -m tools.benchmarks model --config-file configs/RegionSpot-BL.yaml --boxes 1 10 100 300
"""
TEXT = """time the text embeddings of a vocabulary

Example:
    python -m tools.benchmarks text --config-file configs/RegionSpot-BB.yaml --names 20
"""
DATA = """time the loader alone, on drawn images of 640 x 480 with 10 boxes

Example:
    python -m tools.benchmarks data --config-file configs/RegionSpot-BB.yaml --workers 0 1 2
"""
MEMORY = """measure the memory of training from a large annotation file

Example:
    python -m tools.benchmarks memory --config-file configs/RegionSpot-BB.yaml SOLVER.IMS_PER_BATCH 4
"""
EVAL = """time the evaluation of generated detections, against lvis or pycocotools

Examples:
    python -m tools.benchmarks eval --images 2000 --detections 300 --task bbox segm
    python -m tools.benchmarks eval --protocol fixed --images 19809   (all detections of LVIS val: memory and disk)
    python -m tools.benchmarks eval --protocol coco --images 29821 --categories 13204 --alone   (the size of V3Det val)
"""
STARTUP = "time `import regionspot`, and what of it is RegionSpot's own, and `regionspot --help`"


def add_config(parser: ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE")
    add_overrides(parser)


def parse_model(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--boxes", type=int, nargs="+", default=[100], help="boxes in the image, one after the other")
    _add_repeats(parser)
    parser.set_defaults(benchmark="model")
    add_config(parser)
    return parser.parse_args(arguments)


def _add_repeats(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts; the plain way: one")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there, too")


def parse_text(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--names", type=int, default=20, help="class names")
    _add_repeats(parser)
    parser.set_defaults(benchmark="text")
    add_config(parser)
    return parser.parse_args(arguments)


def parse_data(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--images", type=int, default=1000, help="in the drawn data set")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loading processes")
    parser.set_defaults(benchmark="data")
    add_config(parser)
    return parser.parse_args(arguments)


def parse_memory(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--boxes", type=int, default=1_000_000, help="in the annotation file, 10 an image")
    parser.add_argument("--workers", type=int, default=4, help="loading processes")
    parser.add_argument("--iterations", type=int, default=10, help="training steps")
    parser.set_defaults(benchmark="memory")
    add_config(parser)
    return parser.parse_args(arguments)


def parse_eval(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--protocol", choices=["lvis", "coco", "fixed"], default="lvis", help="by whose rules")
    parser.add_argument("--images", type=int, default=2000, help="in the generated data set")
    parser.add_argument("--categories", type=int, default=1203, help="in the generated data set")
    parser.add_argument("--detections", type=int, default=300, help="an image, or boxes of one with fixed")
    parser.add_argument("--task", nargs="+", choices=["bbox", "segm"], default=["bbox"], help="whose IoU counts")
    parser.add_argument("--alone", action="store_true", help="without the reference, and once")
    return parser.parse_args(arguments)


def parse_startup(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
    return parser.parse_args(arguments)


COMMANDS = {
    "model": Command(parse_model, "tools.benchmarks.model", MODEL),
    "text": Command(parse_text, "tools.benchmarks.model", TEXT),
    "data": Command(parse_data, "tools.benchmarks.data", DATA),
    "memory": Command(parse_memory, "tools.benchmarks.data", MEMORY),
    "eval": Command(parse_eval, "tools.benchmarks.evaluation", EVAL),
    "startup": Command(parse_startup, "tools.benchmarks.startup", STARTUP),
}


def main() -> NoReturn:
    run_one_of(COMMANDS, "python -m tools.benchmarks", "What each part of RegionSpot costs, beside the plain way.")


if __name__ == "__main__":
    main()
