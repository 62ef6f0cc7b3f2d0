"""The arguments of the commands that find regions: indexes, search, names for indexes, suspicious labels."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from regionspot_cli.command import Command, add_overrides

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")

INDEX = """embed the regions of any number of images into an index, to be searched and named again

Of a data set they are the annotated boxes; else SAM finds them, or what --regions says. An interrupted run
resumes when it is started again; several processes may run it at the same time.

Examples:
    regionspot index --input photos --config-file configs/RegionSpot-BB.yaml --output output/index \\
        MODEL.WEIGHTS regionspot_bb.pth
    regionspot index --input my.json:my_images --config-file configs/RegionSpot-BB.yaml --output output/index \\
        MODEL.WEIGHTS regionspot_bb.pth
    regionspot index --verify output/index
"""
SEARCH = """find the regions of an index that are like a text, an image or a region: a table and a contact sheet

Several texts, images and regions together are one query, their mean.

Examples:
    regionspot search --index output/index --text "red mug"
    regionspot search --index output/index --image crop.png --text mug --output output/search
    regionspot search --index output/index --region "cup.jpg:172,17,408,308"
"""
CLASSIFY = """name all regions of an index by any vocabulary, without reading an image

Examples:
    regionspot classify-index --index output/index --vocabulary "cup,spoon,saucer" --output output/names.csv
    regionspot classify-index --index output/index --vocabulary @lvis_v1_val.json --top-k 5 --output names.parquet
"""
AUDIT = """find suspicious labels in an annotation file: regions that look like another of its names

Writes suspicious.json (COCO), suspicious.csv and audit.html. A model that was trained on these annotations has learned
their errors, too, and finds fewer of them.

Example:
    regionspot audit --annotations my.json --images my_images --config-file configs/RegionSpot-BB.yaml \\
        --output output/audit MODEL.WEIGHTS regionspot_bb.pth
"""
VOCABULARY = """embed a vocabulary whose entries have examples, prompts or negatives, once for all later uses

The file holds names, embeddings and the fingerprints of the weights that made them; other weights refuse it.

Example:
    regionspot vocabulary embed --vocabulary names.json --config-file configs/RegionSpot-BB.yaml \\
        --output names.safetensors MODEL.WEIGHTS regionspot_bb.pth
"""
KEPT = "finished shards are kept"


def parse_index(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="IMG",
        help="images, directories (all below), patterns, @list.txt, or a data set: a registered name, or "
        "annotations.json:directory",
    )
    parser.add_argument(
        "--regions",
        default="",
        metavar="SOURCE",
        help="sam, detector, gt (a data set's annotations), or a file of boxes; default: gt of a data set, else "
        "PROPOSALS.SOURCE, sam if it is auto",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the index")
    parser.add_argument("--shard-images", type=int, default=512, help="images of a shard")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only check a finished index")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if not args.verify and not (args.config_file and args.output and args.input):
        parser.error("expected --input, --config-file and --output, or --verify")
    return args


def _add_index(parser: ArgumentParser) -> None:
    parser.add_argument("--index", required=True, type=Path, metavar="DIR", help="a finished index")
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model; default: as it was indexed")


def parse_search(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_index(parser)
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a name or description; any number of times"
    )
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="IMG", help="an image of the object alone; likewise"
    )
    parser.add_argument(
        "--region", action="append", default=[], metavar="IMG:BOX", help="image.jpg:x0,y0,x1,y1 in pixels; likewise"
    )
    parser.add_argument("--top-k", type=int, default=20, metavar="K", help="number of regions")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for regions.csv and sheet.png")
    parser.add_argument("--images", default="", metavar="DIR", help="directory of the indexed images, if it was moved")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if not (args.text or args.image or args.region):
        parser.error("expected --text, --image or --region")
    return args


def parse_classify(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    _add_index(parser)
    parser.add_argument("--vocabulary", required=True, metavar="NAMES", help='"a,b,c" or @file')
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="names of each region")
    suffixes = ", ".join(TABLE_SUFFIXES)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=f"table of regions: {suffixes}")
    parser.add_argument("--counts", type=Path, metavar="FILE", help="regions by name, as CSV")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if args.output.suffix not in TABLE_SUFFIXES:
        parser.error(f"--output {args.output}: expected one of the suffixes {suffixes}")
    if args.top_k < 1:
        parser.error(f"--top-k: expected at least 1, got {args.top_k}")
    return args


def parse_audit(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--annotations", required=True, type=Path, metavar="JSON", help="in COCO or LVIS format")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="their images")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for index, tables and page")
    parser.add_argument("--top-k", type=int, metavar="K", help="labels to write; default: all suspicious ones")
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="images in the page")
    parser.add_argument("--shard-images", type=int, default=512, help="images of a shard of the index")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if args.top_k is not None and args.top_k < 0:
        parser.error(f"--top-k: expected at least 0, got {args.top_k}")
    if args.worst < 0:
        parser.error(f"--worst: expected at least 0, got {args.worst}")
    return args


def parse_vocabulary(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    kinds = parser.add_subparsers(dest="kind", required=True)
    embed = kinds.add_parser("embed", help="embed a vocabulary", description="Embed the entries of a vocabulary.")
    embed.add_argument("--vocabulary", required=True, metavar="NAMES", help='a JSON or text file, or "a,b,c"')
    embed.add_argument("--config-file", required=True, metavar="FILE", help="of the model")
    embed.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .safetensors file")
    embed.add_argument("--reference", type=Path, metavar="INDEX", help="of typical images, to calibrate examples")
    add_overrides(embed)
    args = parser.parse_args(arguments)
    if args.output.suffix != ".safetensors":
        embed.error(f"--output {args.output}: expected the suffix .safetensors")
    return args


COMMANDS = {
    "index": Command(parse_index, "regionspot_cli.index", INDEX, KEPT),
    "search": Command(parse_search, "regionspot_cli.search", SEARCH),
    "classify-index": Command(parse_classify, "regionspot_cli.classify_index", CLASSIFY),
    "audit": Command(parse_audit, "regionspot_cli.audit", AUDIT, KEPT),
    "vocabulary": Command(parse_vocabulary, "regionspot_cli.vocabulary", VOCABULARY),
}
