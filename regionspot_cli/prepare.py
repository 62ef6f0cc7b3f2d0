"""The commands of ``datasets/prepare_*.py``, with their arguments."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from regionspot_cli.command import Command

LVIS_MINIVAL = "Make lvis/lvis_v1_minival.json: the images of lvis/lvis_v1_val.json that are in COCO's val2017."
ODINW = """Make annotations_without_background.json of the ODinW sets that have only Roboflow's; check all of them.

Expected below --root: odinw, the benchmark's archive unpacked. The first category of Roboflow's
`_annotations.coco.json` stands for all others and has no boxes; it is left out. Lists what each split has, and what is
missing.
"""
OPENIMAGES = """Make openimages/openimages_v6_{train,val}.json, COCO JSON of OpenImages v6's boxes, from its CSVs.

Expected below --root: openimages/class-descriptions-boxable.csv, oidv6-train-annotations-bbox.csv and
validation-annotations-bbox.csv beside it, and the images in openimages/{train,validation}. The CSVs have no image
sizes: they are read from the images' headers into openimages/image_sizes_*.npz, from which an interrupted run resumes.
"""


def parse_root(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--root", type=Path, default=root, help="default $DETECTRON2_DATASETS, or datasets")
    return parser.parse_args(arguments)


def parse_openimages(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="default: both")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read image headers")
    parser.add_argument("--skip-missing", action="store_true", help="leave out images that are missing or damaged")
    parser.add_argument("--benchmark", type=int, metavar="N", help="only measure the conversion of N generated boxes")
    return parse_root(parser, arguments)


PREPARE = {
    "lvis_minival": Command(parse_root, "regionspot_cli.prepare_lvis_minival", LVIS_MINIVAL),
    "odinw": Command(parse_root, "regionspot_cli.prepare_odinw", ODINW, "finished sets are kept"),
    "openimages": Command(
        parse_openimages, "regionspot_cli.prepare_openimages", OPENIMAGES, "the image sizes that were read are kept"
    ),
}
