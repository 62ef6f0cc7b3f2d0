"""The arguments of the commands that show results."""

import re
from argparse import REMAINDER, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from regionspot_cli.command import Command, add_overrides, join_negative

CROPS = ("box", "mask", "box,mask")

REPORT = """write evaluations as one HTML file: metrics, classes, curves, errors by kind, worst images

The first evaluation is reported, and compared with the others; all must be of the same annotations. The file holds its
images and needs no network.

Examples:
    regionspot report output/eval/inference/my_val --output report.html
    regionspot report output/new output/old --output report.html
    regionspot report output/new --output report.html --config-file configs/RegionSpot-BB.yaml \\
        --opts MODEL.WEIGHTS regionspot_bb.pth   (with attention maps)
"""
VISUALIZE = """draw what regions attend to, models side by side, or what a token store holds: one PNG

Examples:
    regionspot visualize attention --config-file configs/RegionSpot-BB.yaml --input cup.jpg \\
        --boxes "172,17,408,308;326,66,424,326" --output attention.png MODEL.WEIGHTS regionspot_bb.pth
    regionspot visualize compare --config-file configs/RegionSpot-BB.yaml --input cup.jpg --vocabulary "cup,spoon" \\
        --boxes "172,17,408,308;326,66,424,326" --crops box,mask --output compared.png MODEL.WEIGHTS regionspot_bb.pth
    regionspot visualize tokens tokens/my-my_images --dataset my.json:my_images --output tokens.png
"""
APP = """serve a local web page: upload an image, draw boxes or click points, type names, see masks, scores, attention

Nothing leaves the machine, and nobody else can open the page unless --host says so.

Example:
    regionspot app --config-file configs/RegionSpot-BB.yaml --vocabulary "cup,spoon" MODEL.WEIGHTS regionspot_bb.pth
"""
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
ATTENTION = """Draw an image with numbered regions, and what each attends to in CLIP's feature map (paper, figure 4)."""
COMPARE = """Draw how two models name the same regions, or RegionSpot and CLIP on crops (paper, figure 3)."""
STORED = """Draw images with the regions whose tokens a store holds."""


def parse_report(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="OUTPUT_DIR/inference/<data set>, or OUTPUT_DIR if it has one",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the HTML file")
    parser.add_argument("--worst", type=int, default=20, metavar="K", help="images with most errors; 0 for none")
    parser.add_argument("--images", default="", metavar="DIR", help="directory of the images, if it was moved")
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model, for attention maps")
    parser.add_argument("--opts", nargs=REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; at the end")
    args = parser.parse_args(arguments)
    if args.worst < 0:
        parser.error(f"--worst: expected at least 0, got {args.worst}")
    return args


def parse_numbers(text: str) -> list[int]:
    """Return the numbers of "3,1"; a ``ValueError`` is argparse's to report."""
    return [int(number) for number in text.split(",")]


def parse_visualize(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    kinds = parser.add_subparsers(dest="kind", required=True)
    attention = kinds.add_parser("attention", help="what regions attend to", description=ATTENTION)
    compare = kinds.add_parser("compare", help="models side by side", description=COMPARE)
    tokens = kinds.add_parser("tokens", help="what a token store holds", description=STORED)
    for kind in (attention, compare):
        kind.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
        kind.add_argument("--input", required=True, type=Path, metavar="IMG", help="image")
        kind.add_argument("--boxes", required=True, metavar="BOXES", help='"x0,y0,x1,y1;..." in pixels, or a JSON file')
        kind.add_argument("--vocabulary", default="", metavar="NAMES", help='"a,b,c" or @file')
    attention.add_argument("--regions", type=parse_numbers, metavar="N,...", help="boxes to show, from 1; default: all")
    compare.add_argument(
        "--other-config-file", default="", metavar="FILE", help="of the other model; default: the same"
    )
    compare.add_argument("--other-weights", default="", metavar="FILE", help="of the other model")
    compare.add_argument(
        "--crops", choices=CROPS, help="CLIP on these crops; by default box if there is no other model"
    )
    tokens.add_argument("store", type=Path, metavar="DIR", help="token store")
    tokens.add_argument("--dataset", required=True, metavar="NAME", help="a registered name, or my.json:images")
    tokens.add_argument("--image-ids", type=parse_numbers, metavar="ID,...", help="default: the first 8")
    tokens.add_argument("--stage", default="transformer", metavar="STAGE", help="of SAM")
    for kind in (attention, compare, tokens):
        kind.add_argument("--output", required=True, type=Path, metavar="FILE", help="the PNG")
    for kind in (attention, compare):
        add_overrides(kind)
    return parser.parse_args(join_negative(arguments))


def parse_bytes(text: str) -> int:
    """Return the bytes of "20mb"."""
    match = re.fullmatch(r"([1-9]\d*)(kb|mb|gb)", text.lower())
    if match is None:
        raise ArgumentTypeError(f"expected a size such as 500kb or 20mb, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def parse_app(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument("--vocabulary", metavar="NAMES", help='"a,b,c" or @file, to start with')
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--max-upload", type=parse_bytes, default="20mb", metavar="SIZE", help="of an image: 500kb, 20mb, ..."
    )
    parser.add_argument("--cached-weights-only", action="store_true", help="fetch nothing, see `regionspot predict`")
    parser.add_argument("--check", action="store_true", help="load the model, build the page, and exit")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if not 0 < args.port < 1 << 16:
        parser.error(f"--port: expected 1 to 65535, got {args.port}")
    return args


COMMANDS = {
    "app": Command(parse_app, "regionspot_cli.app", APP),
    "report": Command(parse_report, "regionspot_cli.report", REPORT),
    "visualize": Command(parse_visualize, "regionspot_cli.visualize", VISUALIZE),
}
