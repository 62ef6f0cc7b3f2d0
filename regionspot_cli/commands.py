"""All commands with their arguments."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from regionspot_cli import find_commands, predict_command, see_commands, ship_commands
from regionspot_cli.command import Command, add_overrides

PREDICTIONS_KEPT = "the predictions so far are kept"
# As regionspot.data.proposals.FORMATS, whose import takes seconds.
FORMATS = ("glip", "coco", "detectron2", "safetensors")
# As regionspot.model_zoo.CONFIGS.
TABLES = Path(__file__).resolve().parents[1] / "regionspot" / "model_zoo" / "configs" / "tables"
# The format of a proposal file by the suffix of its name.
SUFFIXES = {".json": "glip", ".pkl": "detectron2", ".pickle": "detectron2", ".safetensors": "safetensors"}

TRAIN = """train a model, or with --eval-only evaluate one; Detectron2's usual arguments

Examples:
    tools/train_net.py --config-file configs/RegionSpot-BB-stage1.yaml --num-gpus 8
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/RegionSpot-BB-stage1.yaml
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml --eval-only MODEL.WEIGHTS model.pth
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml --num-gpus 2 MODEL.DEVICE cpu   (two processes)
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml DATASETS.TRAIN "('my.json:my_images',)"
"""
EVALUATE = """evaluate a model on the data sets of its config, as `train --eval-only` does

Example:
    regionspot evaluate --config-file configs/RegionSpot-BB.yaml MODEL.WEIGHTS regionspot_bb.pth
"""
EXTRACT = """extract SAM's tokens of all annotated boxes into token stores, or verify stores

An interrupted extraction resumes when it is started again. Several machines that share the directory may run it at
the same time; machines that do not share one use --num-machines and --machine-rank, and when their shards are copied
together it is run once more.

Examples:
    tools/extract_tokens.py --config-file configs/RegionSpot-BB.yaml --datasets objects365_v1_train --output tokens
    tools/extract_tokens.py --config-file configs/RegionSpot-BB.yaml --datasets my.json:my_images --output tokens --flip
    tools/extract_tokens.py --verify tokens/objects365_v1_train
"""
TRANSFER = """give a trained checkpoint another localizer, without training again

A linear map from the new localizer's tokens to the old one's is fitted, on the annotated boxes of a data set or on two
token stores of the same boxes, and folded into the checkpoint's first layer. The overrides are for both configs.

Examples:
    regionspot transfer --config-file configs/RegionSpot-BB.yaml --weights output/mine/model_final.pth \\
        --to configs/models/MobileSAM.yaml --dataset my.json:my_images --output output/mobile_sam/start.pth
    regionspot transfer --config-file configs/RegionSpot-BB.yaml --weights output/mine/model_final.pth \\
        --to configs/models/MobileSAM.yaml --stores tokens/old tokens/new --output output/mobile_sam/start.pth
"""
CONVERT = """convert files of other projects: `proposals` between formats, `tokens` into a token store

Examples:
    tools/convert.py proposals glip_lvis_val.json glip_lvis_val.safetensors --nms 0.7 --top-k 300
    tools/convert.py tokens --config-file configs/RegionSpot-BB.yaml --tokens their_tokens/objects365 \\
        --dataset objects365_v1_train --output datasets/tokens/objects365_v1_train
"""
PROPOSALS = """Convert a proposal file into another format, with only the best boxes of each image if asked to.

The input's format is recognized by its content. Formats: glip ({image_id: {boxes, scores, labels}}), coco (COCO
results), detectron2 (its pickle), safetensors (ours: small, and read at once).
"""
TOKENS = "Import the tokens that the authors published, one <image_id>.pth an image, into a token store."
CHECK = """read the annotations and all images of a data set, and report what cannot be used

The exit status is 1 if anything would end a training or an evaluation: images that are missing, damaged or of another
size than the annotations say, and class names that CLIP cannot take.

Examples:
    tools/check_dataset.py my.json:my_images
    tools/check_dataset.py objects365_v1_train --workers 16 --json report.json
"""
RESULTS = """evaluate a file of COCO or LVIS results of any model, and print the protocol

Examples:
    tools/evaluate_predictions.py --annotations lvis_v1_val.json --predictions results.json --output out
    tools/evaluate_predictions.py --annotations lvis_v1_val.json --predictions results.jsonl --protocol fixed
"""
CALIBRATE = """find MODEL.REGIONSPOT.UNKNOWN.THRESHOLD, which keeps a share of a data set's regions known

Example:
    regionspot calibrate --config-file configs/RegionSpot-BB.yaml --dataset lvis_v1_minival --keep 0.95 \\
        MODEL.WEIGHTS regionspot_bb.pth
"""
TABLE = """run the rows of one of the paper's tables whose inputs are on the disk, with the paper's numbers beside

The inputs of a row are in its config (configs/tables): weights, annotations, images, proposal files. Rows without all
inputs are listed with those that are missing. A finished row is not run again; an interrupted one resumes.

Example:
    regionspot table table1 --output output/tables
"""


def add_launch(parser: ArgumentParser) -> None:
    """Add the arguments of Detectron2's ``default_argument_parser`` that `train` and `evaluate` share."""
    # Written out, since importing Detectron2 takes seconds.
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs of each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine among them")
    parser.add_argument("--dist-url", default="auto", help="where processes meet; several machines: tcp://HOST:PORT")
    add_overrides(parser)


def parse_train(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--eval-only", action="store_true", help="evaluate instead of training")
    add_launch(parser)
    args = parser.parse_args(arguments)
    if args.eval_only:
        args.kept = PREDICTIONS_KEPT
    else:
        args.resume_options = ["--resume"]
    return args


def parse_project(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse the command line of a ``projects/*/train_net.py``, whose evaluation keeps no predictions."""
    args = parse_train(parser, arguments)
    args.kept, args.resume_options = "the checkpoints so far are kept", ["--resume"]
    return args


def parse_evaluate(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    add_launch(parser)
    parser.set_defaults(eval_only=True)
    return parser.parse_args(arguments)


def parse_extract(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model whose SAM to run")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="NAME", help="registered names, or my.json:images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="each data set's store is a directory in it")
    parser.add_argument("--side-by-side", action="store_true", help="in a directory of the localizer's own in that one")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="of SAM, and mask; default: the config's")
    parser.add_argument("--flip", action="store_true", help="also of the horizontally flipped images")
    parser.add_argument("--jitter", type=float, metavar="SHARE", help="also of jittered boxes; default: the config's")
    parser.add_argument("--jitter-copies", type=int, default=3, metavar="K", help="jittered copies of each box")
    parser.add_argument(
        "--proposals",
        nargs="+",
        default=[],
        metavar="FILE",
        help="one for each data set: also of boxes that match; default: those of DATASETS.PROPOSAL_FILES_TRAIN",
    )
    parser.add_argument("--feature-maps", action="store_true", help="also CLIP's feature maps")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes, each on a GPU of its own if there are any")
    parser.add_argument("--num-machines", type=int, default=1, help="machines that share no directory")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine among them")
    parser.add_argument("--batch-size", type=int, help="images of one step; default: TEST.BATCH_SIZE")
    parser.add_argument("--shard-images", type=int, default=512, help="images of the data set in a shard")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--verify", nargs="+", type=Path, metavar="DIR", help="only check finished stores")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if not args.verify and not (args.config_file and args.datasets and args.output):
        parser.error("expected --config-file, --datasets and --output, or --verify")
    if args.proposals and len(args.proposals) != len(args.datasets):
        parser.error(
            f"--proposals: expected one file for each of {len(args.datasets)} data sets, got "
            f"{' '.join(args.proposals)}; give overrides of the config behind another option"
        )
    return args


def parse_transfer(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the trained model")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--to", required=True, metavar="FILE", help="config of the model with another localizer")
    parser.add_argument("--output", required=True, type=Path, metavar="PTH", help="the checkpoint to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", default="", metavar="NAME", help="a registered name, or my.json:images")
    source.add_argument("--stores", nargs=2, metavar=("OLD", "NEW"), help="token stores of the two localizers")
    parser.add_argument("--max-images", type=int, default=2000, metavar="N", help="images used, evenly spaced")
    parser.add_argument("--ridge", type=float, default=1e-4, help="of the fit, relative to the tokens' variance")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if args.output.suffix != ".pth":
        parser.error(f"--output: expected a name that ends with .pth, got {args.output}")
    if args.max_images < 1 or not args.ridge > 0:
        parser.error("expected a positive --max-images and --ridge")
    return args


def parse_convert(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    kinds = parser.add_subparsers(dest="kind", required=True)
    proposals = kinds.add_parser("proposals", help="a proposal file into another format", description=PROPOSALS)
    proposals.add_argument("input", type=Path, metavar="INPUT")
    proposals.add_argument("output", type=Path, metavar="OUTPUT")
    proposals.add_argument(
        "--to", choices=FORMATS, metavar="FORMAT", help="by default by OUTPUT's suffix; .json is glip"
    )
    proposals.add_argument("--top-k", type=int, metavar="K", help="only the K best boxes of each image")
    proposals.add_argument("--nms", type=float, metavar="IOU", help="drop boxes that overlap a better one of the label")
    proposals.add_argument("--min-score", type=float, metavar="S", help="drop boxes with lower scores")
    tokens = kinds.add_parser("tokens", help="the authors' tokens into a token store", description=TOKENS)
    tokens.set_defaults(kept="finished shards are kept")
    tokens.add_argument("--config-file", required=True, metavar="FILE", help="of the model whose SAM made them")
    tokens.add_argument("--tokens", required=True, type=Path, metavar="DIR", help="the directory of the .pth files")
    tokens.add_argument("--dataset", required=True, metavar="NAME", help="a registered name, or my.json:images")
    tokens.add_argument("--output", required=True, type=Path, metavar="DIR", help="the store")
    tokens.add_argument("--shard-images", type=int, default=512, help="images of the data set in a shard")
    add_overrides(tokens)
    args = parser.parse_args(arguments)
    if args.kind == "proposals":
        args.to = args.to or SUFFIXES.get(args.output.suffix.lower())
        if args.to is None:
            proposals.error(f"{args.output}: expected one of the suffixes {', '.join(SUFFIXES)}, or --to FORMAT")
    return args


def parse_check(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("dataset", metavar="DATASET", help="a registered name, or annotations.json:image_directory")
    workers = min(os.cpu_count() or 1, 16)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes that read images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON")
    return parser.parse_args(arguments)


def parse_evaluate_predictions(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--annotations", required=True, type=Path, metavar="JSON", help="in LVIS or COCO format")
    parser.add_argument("--predictions", required=True, type=Path, metavar="JSON", help="a list, or JSON lines")
    parser.add_argument(
        "--protocol", choices=("lvis", "fixed", "coco"), help="default: lvis or coco, by what the annotations have"
    )
    parser.add_argument("--task", nargs="+", choices=["bbox", "segm"], help="by default those that predictions allow")
    parser.add_argument("--max-dets", type=int, default=300, metavar="N", help="per image, of protocol lvis; -1: all")
    parser.add_argument(
        "--segm-areas",
        choices=["masks", "boxes"],
        default="masks",
        help="areas that decide whether a detected mask is small, medium or large: masks as in Detectron2, boxes as in "
        "the lvis package",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for metrics.json and per_class_<task>.csv")
    return parser.parse_args(arguments)


def parse_calibrate(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="annotated regions of known classes")
    parser.add_argument("--keep", type=float, default=0.95, help="share of these regions that stay known")
    add_overrides(parser)
    args = parser.parse_args(arguments)
    if not 0 < args.keep < 1:
        parser.error(f"--keep: expected a share between 0 and 1, got {args.keep}")
    return args


def parse_table(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    parser.add_argument("table", choices=sorted(path.stem for path in TABLES.glob("*.json")))
    parser.add_argument("--output", type=Path, default=Path("output/tables"), metavar="DIR")
    parser.add_argument("--num-gpus", default="1", help="processes")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides for all rows")
    # intermixed, as options may follow the overrides, which nargs=REMAINDER would swallow
    return parser.parse_intermixed_args(arguments)


COMMANDS = {
    "train": Command(parse_train, "regionspot_cli.train", TRAIN, "the checkpoints so far are kept", "start"),
    "evaluate": Command(parse_evaluate, "regionspot_cli.train", EVALUATE, PREDICTIONS_KEPT, "start"),
    **predict_command.COMMANDS,
    "extract": Command(parse_extract, "regionspot_cli.extract", EXTRACT, "finished shards are kept"),
    "transfer": Command(parse_transfer, "regionspot_cli.transfer", TRANSFER),
    "convert": Command(parse_convert, "regionspot_cli.convert", CONVERT),
    "check": Command(parse_check, "regionspot_cli.check", CHECK),
    "evaluate-predictions": Command(parse_evaluate_predictions, "regionspot_cli.evaluate_predictions", RESULTS),
    **see_commands.COMMANDS,
    **ship_commands.COMMANDS,
    **find_commands.COMMANDS,
    "calibrate": Command(parse_calibrate, "regionspot_cli.calibrate", CALIBRATE),
    "table": Command(parse_table, "regionspot_cli.table", TABLE, "finished rows are kept"),
}
