"""The arguments of the commands that take a model elsewhere."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

from regionspot_cli.command import Command, add_overrides

EXPORT = """write a model as ONNX files, with what runs them without PyTorch, or as torch.export programs

Image encoders, region decoder and region classifier go into a new directory, with the names' text embeddings. They are
compared with PyTorch before it gets its name.

Examples:
    regionspot export --config-file configs/RegionSpot-BB.yaml --vocabulary "cup,spoon" --output exported \\
        MODEL.WEIGHTS regionspot_bb.pth
    regionspot export --config-file configs/RegionSpot-BB.yaml --vocabulary @names.txt --output exported_fp16 \\
        --precision fp16 MODEL.WEIGHTS regionspot_bb.pth
"""


def parse_export(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new directory")
    parser.add_argument("--vocabulary", metavar="NAMES", help='"a,b,c" or @file; default: MODEL.REGIONSPOT.VOCABULARY')
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    parser.add_argument("--precision", choices=("float32", "fp16"), default="float32", help="default: float32")
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="of ONNX, 18 to 23; default: 20")
    parser.add_argument("--check", action=BooleanOptionalAction, default=True, help="compare with PyTorch")
    add_overrides(parser)
    return parser.parse_args(arguments)


COMMANDS = {"export": Command(parse_export, "regionspot_cli.export", EXPORT)}
