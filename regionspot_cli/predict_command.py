"""The arguments of `regionspot predict`."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from regionspot_cli.command import Command, add_overrides, join_negative

# Written while the run goes, one file or more an image; and made at its end of all images.
IMAGE_FORMATS = ("drawing", "json", "labelme", "yolo", "crops")
RUN_FORMATS = ("results", "coco", "csv", "parquet")

PREDICT = """recognize regions of any number of images: drawings, JSON, COCO, labelme, YOLO, crops, tables

A run that was killed continues when the same command is given again, and ends with the same files.

Examples:
    regionspot predict --input cup.jpg --vocabulary "cup,spoon" --output output/cup MODEL.WEIGHTS regionspot_bb.pth
    regionspot predict --input photos --vocabulary @names.txt --output output/photos --format results,parquet \\
        --score-threshold 0.3 --nms 0.7 MODEL.WEIGHTS regionspot_bb.pth
    regionspot predict --input cup.jpg --boxes "172,17,408,308;326,66,424,326" --vocabulary "cup,spoon,saucer" \\
        --output output/cup MODEL.WEIGHTS regionspot_bb.pth
    regionspot predict --input my.json:my_images --regions gt --output output/mine --format results
    regionspot predict --input clip.mp4 --video-step 30 --vocabulary "person,dog" --output output/clip
"""


def parse_formats(text: str) -> list[str]:
    """Return the formats of "json,csv"; a ``ValueError`` is argparse's to report."""
    formats = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not formats or any(name not in (*IMAGE_FORMATS, *RUN_FORMATS) for name in formats):
        raise ValueError(text)
    return formats


def _add_inputs(parser: ArgumentParser) -> None:
    parser.add_argument("--config-file", default="", metavar="FILE", help="default: RegionSpot-BB.yaml")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="IMG",
        help="images, directories (all below), patterns, videos, @list.txt, or a data set: a registered name, or "
        "annotations.json:directory",
    )
    parser.add_argument("--video-step", type=int, default=1, metavar="N", help="every N-th frame of a video")
    parser.add_argument(
        "--regions",
        metavar="SOURCE",
        help="sam: SAM's automatic masks; detector: MODEL.REGIONSPOT.PROPOSALS.DETECTOR; gt: the data set's "
        "annotations; or a file of proposals or annotations. Default: PROPOSALS.SOURCE, sam if it is auto",
    )
    parser.add_argument(
        "--boxes",
        metavar="BOXES",
        help='"x0,y0,x1,y1;..." in pixels, or a JSON file: a list of boxes, or {image file name: boxes}',
    )
    parser.add_argument(
        "--points",
        metavar="POINTS",
        help='"x,y;..." in pixels, one region each; "x,y x,y,0;..." several points, label 0 is background',
    )
    parser.add_argument(
        "--vocabulary",
        metavar="NAMES",
        help='"a,b,c" or @file; default: MODEL.REGIONSPOT.VOCABULARY, else the data set\'s',
    )


def _add_outputs(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="for all outputs")
    parser.add_argument(
        "--format",
        type=parse_formats,
        default=["drawing", "json"],
        metavar="NAME,...",
        help=f"of each image: {', '.join(IMAGE_FORMATS)}; of all: {', '.join(RUN_FORMATS)}. Default: drawing,json",
    )
    parser.add_argument("--score-threshold", type=float, default=0.0, metavar="S", help="drop regions below this score")
    parser.add_argument("--nms", type=float, default=1.0, metavar="IOU", help="drop regions of a class on better ones")
    parser.add_argument("--top-k", type=int, default=-1, metavar="K", help="keep the K best regions of each image")
    parser.add_argument("--drop-unknown", action="store_true", help="drop regions of no class, see UNKNOWN.THRESHOLD")
    parser.add_argument("--embeddings", action="store_true", help="also the embedding of each region")
    parser.add_argument("--overwrite", action="store_true", help="discard what another run left in the directory")


def parse_predict(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_inputs(parser)
    _add_outputs(parser)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images of a step (default: 4)")
    workers = min(os.cpu_count() or 1, 8)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes that read images")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="run on a Ray cluster; local starts one")
    parser.add_argument("--ray-actors", type=int, default=1, metavar="N", help="processes with a model each, of --ray")
    parser.add_argument(
        "--cached-weights-only",
        action="store_true",
        help="fetch nothing: SAM or CLIP weights that are not on this machine are left random",
    )
    add_overrides(parser)
    args = parser.parse_args(join_negative(arguments))
    for name, minimum in (("video_step", 1), ("batch_size", 1), ("workers", 0), ("ray_actors", 1)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name.replace('_', '-')}: expected at least {minimum}, got {getattr(args, name)}")
    if args.regions and (args.boxes or args.points):
        parser.error("--regions: expected it, or --boxes and --points, not both")
    return args


COMMANDS = {"predict": Command(parse_predict, "regionspot_cli.predict", PREDICT, "finished images are kept")}
