"""What each part costs, beside the plain way: ``python -m tools.benchmarks BENCHMARK`` in the checkout."""

import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from regionspot_cli.command import Command, add_overrides, run_one_of

MODEL = """time every stage on equal images, beside the plain way

The plain way takes one image at a time in float32, as the published release does.

Examples:
    python -m tools.benchmarks model --config-file configs/RegionSpot-BL.yaml --boxes 1 10 100 300
    python -m tools.benchmarks model --config-file configs/RegionSpot-BL.yaml --boxes 100 --batch 8 \\
        MODEL.REGIONSPOT.PRECISION bf16 MODEL.REGIONSPOT.SAM.ENCODER_BATCH_SIZE 8
"""
TEXT = """time the text embeddings of a vocabulary

Example:
    python -m tools.benchmarks text --config-file configs/RegionSpot-BB.yaml --names 20
"""
TRAIN = """time training from stored tokens: the loader, the step, and both together

CLIP's image encoder is in the loop, unless --maps stores its feature maps.

Example:
    python -m tools.benchmarks train --config-file configs/RegionSpot-BB.yaml --steps 20 SOLVER.IMS_PER_BATCH 4
"""
EXTRACT = """time the extraction of tokens, on drawn images of 640 x 480

Example:
    python -m tools.benchmarks extract --config-file configs/RegionSpot-BB.yaml --images 8 --batch 4 --workers 1
"""
PROPOSALS = """time the boxes of SAM's automatic masks, against segment_anything's SamAutomaticMaskGenerator

SAM has random weights, and both know the embedding of the 640 x 480 image.

Example:
    python -m tools.benchmarks proposals --config-file configs/RegionSpot-BB.yaml --points 6 --kept 15 100
"""
MODELS = """measure localizers and vision-language models with random weights: parameters, time, memory, lengths

Those of --config-file come first, then those of --others that have not been measured yet.

Example:
    python -m tools.benchmarks models --config-file configs/RegionSpot-BB.yaml --others configs/models/*.yaml
"""
REPORT = """write the tables of JSON files into a document, between <!-- benchmark:NAME --> and <!-- /benchmark -->

Example:
    python -m tools.benchmarks report output/benchmark/*.json --document docs/performance.md
"""
ALL = """run the benchmarks of docs/performance.md and write their tables there, as `make benchmark` does

Example:
    python -m tools.benchmarks all
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
INDEX = """time search in a region index of random embeddings, and the naming of all its regions

Example:
    python -m tools.benchmarks index --regions 1000000 --names 1203
"""
STARTUP = "time `import regionspot`, and what of it is RegionSpot's own, and `regionspot --help`"


def add_config(parser: ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE")
    add_overrides(parser)


def positive(text: str) -> int:
    """Return the number of an option, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def add_report_options(parser: ArgumentParser, benchmark: str, arguments: Sequence[str]) -> None:
    """Add the options of a benchmark that ``report`` can put into a document."""
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="timed runs at the most (CPU: 3, the shortest counts; GPU: 10, the median)",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there, too")
    shown = list(arguments)
    if "--json" in shown:  # where the figures went does not matter
        del shown[shown.index("--json") : shown.index("--json") + 2]
    parser.set_defaults(benchmark=benchmark, command=f"python -m tools.benchmarks {shlex.join([benchmark, *shown])}")
    add_config(parser)


def parse_model(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--boxes", type=positive, nargs="+", default=[100], help="in an image")
    parser.add_argument("--names", type=positive, nargs="+", default=[80, 1203, 20000], help="sizes of the vocabulary")
    parser.add_argument(
        "--whole", type=positive, nargs="+", help="of --boxes, with which all is measured, plainly, too"
    )
    parser.add_argument("--batch", type=positive, default=1, help="images a call; the plain way takes one")
    parser.add_argument("--plain-boxes", type=int, default=300, help="with more the plain way is left out")
    add_report_options(parser, "model", arguments)
    args = parser.parse_args(arguments)
    if args.whole and not set(args.whole) <= set(args.boxes):
        parser.error(f"--whole: expected some of the numbers of --boxes, {args.boxes}; got {args.whole}")
    return args


def parse_text(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--names", type=positive, default=20, help="class names")
    add_report_options(parser, "text", arguments)
    return parser.parse_args(arguments)


def parse_train(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--images", type=positive, default=512, help="in the drawn data set, with 10 boxes each")
    parser.add_argument("--maps", action="store_true", help="also store CLIP's feature maps, so that CLIP is not run")
    parser.add_argument("--workers", type=int, default=2, help="loading processes")
    parser.add_argument("--steps", type=positive, default=20, help="that are timed")
    parser.add_argument("--warm-up", type=positive, default=5, help="steps before them, at least 1")
    add_report_options(parser, "train", arguments)
    return parser.parse_args(arguments)


def parse_extract(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--images", type=positive, default=8, help="in the drawn data set")
    parser.add_argument("--boxes", type=positive, default=10, help="in an image")
    parser.add_argument("--batch", type=positive, default=1, help="images a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--plain-images", type=positive, default=2, help="images that the plain way takes")
    add_report_options(parser, "extract", arguments)
    args = parser.parse_args(arguments)
    if args.plain_images > args.images:
        parser.error(f"--plain-images: expected at most {args.images}, the number of images; got {args.plain_images}")
    return args


def parse_proposals(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--points", type=positive, default=32, help="per side of the grid")
    parser.add_argument(
        "--kept", type=positive, nargs="+", default=[15, 100], help="percentages of masks above the threshold of IoU"
    )
    add_report_options(parser, "proposals", arguments)
    args = parser.parse_args(arguments)
    if max(args.kept) > 100:
        parser.error(f"--kept: expected percentages, at most 100; got {max(args.kept)}")
    return args


def parse_models(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--others", nargs="+", default=[], metavar="FILE", help="more configs")
    parser.add_argument("--boxes", type=positive, default=100, help="in the image")
    add_report_options(parser, "models", arguments)
    return parser.parse_args(arguments)


def parse_report(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON", help="that benchmarks wrote")
    parser.add_argument("--document", type=Path, default=Path("docs/performance.md"), metavar="FILE")
    return parser.parse_args(arguments)


def parse_all(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), metavar="DIR", help="for JSON files")
    parser.add_argument("--document", type=Path, default=Path("docs/performance.md"), metavar="FILE")
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


def parse_index(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--regions", type=positive, default=1_000_000, help="in the index")
    parser.add_argument("--dim", type=positive, default=512, help="numbers of an embedding")
    parser.add_argument("--names", type=positive, default=1203, help="of the vocabulary")
    parser.add_argument("--repeats", type=positive, default=2, help="runs, of which the shortest counts")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the index is written for the time")
    return parser.parse_args(arguments)


def parse_startup(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
    return parser.parse_args(arguments)


COMMANDS = {
    "model": Command(parse_model, "tools.benchmarks.model", MODEL),
    "text": Command(parse_text, "tools.benchmarks.model", TEXT),
    "train": Command(parse_train, "tools.benchmarks.train", TRAIN),
    "extract": Command(parse_extract, "tools.benchmarks.extract", EXTRACT),
    "proposals": Command(parse_proposals, "tools.benchmarks.proposals", PROPOSALS),
    "models": Command(parse_models, "tools.benchmarks.models", MODELS),
    "data": Command(parse_data, "tools.benchmarks.data", DATA),
    "memory": Command(parse_memory, "tools.benchmarks.train", MEMORY),
    "eval": Command(parse_eval, "tools.benchmarks.evaluation", EVAL),
    "index": Command(parse_index, "tools.benchmarks.index", INDEX),
    "startup": Command(parse_startup, "tools.benchmarks.startup", STARTUP),
    "report": Command(parse_report, "tools.benchmarks.report", REPORT),
    "all": Command(parse_all, "tools.benchmarks.suite", ALL),
}


def main() -> NoReturn:
    run_one_of(COMMANDS, "python -m tools.benchmarks", "What each part of RegionSpot costs, beside the plain way.")


if __name__ == "__main__":
    main()
