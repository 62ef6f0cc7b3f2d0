"""Recognizes regions of any number of images."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from regionspot import RegionPredictions, __version__, model_zoo
from regionspot.config import load_config
from regionspot.data.datasets import category_ids
from regionspot.data.training_set import describe_annotations
from regionspot.drawing import DrawingStyle
from regionspot.prediction import RegionBatchPredictor, RegionFilter
from regionspot.prediction.loading import SampleReader
from regionspot.prediction.outputs import DrawingWriter, ImageWriter, JsonWriter, open_image_writers, write_run_files
from regionspot.prediction.parts import PartStore
from regionspot.prediction.ray_map import RayPool, connect, is_for_ray, run_on_ray
from regionspot.prediction.recognize import Recognize, recognize_boxes, recognize_points
from regionspot.prediction.regions import (
    AnnotatedBoxes,
    FileBoxes,
    RegionSource,
    SameBoxes,
    open_region_source,
    parse_boxes,
    parse_points,
)
from regionspot.prediction.run import Summary, run_prediction, summarize
from regionspot.prediction.settings import describe_run
from regionspot.prediction.sources import SUMMARY, ImageList, ImageRecord, list_images
from regionspot.utils.command_line import printable
from regionspot.utils.run_lock import run_lock
from regionspot.vocabulary import dataset_names, load_vocabulary
from regionspot_cli.predict_command import IMAGE_FORMATS
from regionspot_cli.predict_files import check_outputs, input_files, region_files, written_files
from regionspot_cli.weights import BASELINE, leave_absent_weights, use_baseline_without_weights

FEW = 20  # images: of more, the regions are not printed
LISTED = 10  # lines of a list at the end


def choose_regions(args: Namespace, cfg: CfgNode, images: ImageList) -> RegionSource | None:
    """Return where regions come from, None if the model finds them, which is then set in ``cfg``."""
    node, chosen = cfg.MODEL.REGIONSPOT.PROPOSALS, args.regions
    if args.boxes or args.points:
        node.SOURCE = "gt"  # builds no detector
        return parse_boxes(args.boxes) if args.boxes else None
    if not chosen and node.SOURCE in ("gt", "detector"):
        chosen = node.SOURCE
    if chosen in (None, "sam", "detector"):
        node.SOURCE = "detector" if chosen == "detector" else "sam_automatic"
        return None
    node.SOURCE = "gt"
    return open_region_source(chosen, images.dataset)


class RegionPrinter:
    """Prints the regions of an image, one a line."""

    def __call__(self, record: ImageRecord, image: np.ndarray, regions: RegionPredictions) -> None:
        columns = (regions.boxes, regions.class_names, regions.scores, regions.predicted_ious)
        for box, label, score, iou in zip(*columns):
            place, name = ", ".join(f"{x:.0f}" for x in box), printable(record.name)
            tqdm.write(f"{name}  box {place}:  {printable(label)}  (score {score:.3f}, mask IoU {iou:.3f})")


class Prediction:
    """What the arguments of a command line ask for, checked before the model is built."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.output = args, Path(args.output)
        self.cfg = load_config(args.config_file or model_zoo.get_config_file("RegionSpot-BB.yaml"), args.opts)
        self.filter = RegionFilter(args.score_threshold, args.nms, args.top_k, not args.drop_unknown)
        is_remote = is_for_ray(args.input)
        if is_remote and not args.ray:
            raise ValueError(f"--input {args.input[0]}: only Ray reads it; give --ray ADDRESS, or local files")
        if is_remote and (args.boxes or args.regions not in (None, "sam", "detector")):
            option = "--boxes" if args.boxes else "--regions"
            raise ValueError(
                f"--input {args.input[0]}: Ray reads it without {option}; give Parquet with a column boxes, or local "
                "files"
            )
        self.images = ImageList() if is_remote else list_images(args.input, args.video_step, self.output)
        source = choose_regions(args, self.cfg, self.images)
        if isinstance(source, (SameBoxes, FileBoxes)):
            source.check_images(self.images)
        self.points = parse_points(args.points) if args.points else None
        names = args.vocabulary or self.cfg.MODEL.REGIONSPOT.VOCABULARY
        if not names and self.images.dataset:
            names = f"dataset:{self.images.dataset}"
        self.vocabulary = load_vocabulary(names, with_examples=True)
        self.inputs_among_outputs: set[str] = set()
        if not args.ray:
            others = input_files(args, self.images)
            self.inputs_among_outputs = check_outputs(self.images, others, self.output, args.format)
        self.absent_weights = leave_absent_weights(self.cfg) if args.cached_weights_only else ""
        self.is_baseline = use_baseline_without_weights(self.cfg)
        self.reader = SampleReader(self.images, source, self.cfg.INPUT.DEEP_RANGE)
        # not of a video: FFmpeg's threads, some of which stay, would be missing in the readers that are forked
        if len(self.images) == 1 and self.images[0].frame < 0:
            sample = self.reader[0]
            if sample.error or not sample.has_entry:
                raise ValueError(sample.error or f"{args.boxes or args.regions}: no boxes for {sample.record.name}")
        self.random_parts: list[str] = []
        self.region_writers = open_image_writers(self.output, args.format, self.vocabulary)
        self.category_ids = self._find_category_ids()
        if "parquet" in args.format and importlib.util.find_spec("pyarrow") is None:
            raise ValueError("--format parquet needs pyarrow: pip install 'regionspot[parquet]'")

    def _find_category_ids(self) -> list[int] | None:
        """Return the data set's ids of the classes, if they are its own."""
        name = self.images.dataset
        if not name or list(dataset_names(name)) != list(self.vocabulary):
            return None
        return category_ids(name).tolist()

    @property
    def image_formats(self) -> list[str]:
        """What is written of each image, in a fixed order."""
        return [name for name in IMAGE_FORMATS if name in self.args.format]

    def describe(self) -> dict[str, Any]:
        """Return all that the results depend on."""
        args = self.args
        options = {
            "version": __version__,
            "batch size": args.batch_size,
            "formats": self.image_formats,
            "embeddings": args.embeddings,
            "filter": [args.score_threshold, args.nms, args.top_k, args.drop_unknown],
            "boxes": args.boxes,
            "points": args.points,
            "regions": args.regions,
        }
        if isinstance(self.reader.regions, AnnotatedBoxes):
            options["annotations"] = describe_annotations(self.images.dataset)["fingerprint"][:16]
        return describe_run(self.cfg, self.images, self.vocabulary, options, region_files(args))

    def build(self) -> tuple[Recognize, list[ImageWriter]]:
        """Build the model, and what writes the outputs of each image."""
        torch.manual_seed(max(self.cfg.SEED, 0))
        predictor = RegionBatchPredictor(self.cfg, self.vocabulary, self.filter)
        self.random_parts = predictor.predictor.random_parts
        recognize = recognize_boxes(predictor) if self.points is None else recognize_points(predictor, *self.points)
        style = DrawingStyle(outline="box" if "sam" in self.random_parts else "mask")
        writers: dict[str, Any] = {
            "drawing": DrawingWriter(self.output, style),
            "json": JsonWriter(self.output, self.args.embeddings),
            **self.region_writers,
        }
        chosen: list[ImageWriter] = [writers[name] for name in self.image_formats]
        return recognize, [*chosen, RegionPrinter()] if len(self.images) <= FEW else chosen

    def write_run_files(self, parts: PartStore) -> list[Path]:
        """Write what is made of all images; return the paths."""
        for writer in self.region_writers.values():
            writer.finish()
        args = self.args
        return write_run_files(self.output, args.format, parts, self.vocabulary, self.category_ids, args.embeddings)


def print_summary(output: Path, summary: Summary) -> None:
    """Print how many images and regions there were, and the beginnings of the lists of what was left out."""
    print(f"{summary.num_regions} regions of {summary.num_images} images are in {printable(output)}")
    lists = {
        "could not be used": [f"{name}: {reason}" for name, reason in summary.unreadable],
        "have no regions in the file": summary.without_regions,
    }
    for what, lines in lists.items():
        if lines:
            more = f", {LISTED} of them here and all in {printable(output / SUMMARY)}" if len(lines) > LISTED else ""
            print(f"{len(lines)} images {what}{more}:")
            print("\n".join(f"  {printable(line)}" for line in lines[:LISTED]))


def print_weights(prediction: Prediction) -> None:
    """Say it where names or masks are not RegionSpot's."""
    if prediction.is_baseline:
        print(f"\n{BASELINE}")
    elif prediction.random_parts:
        print(
            f"\nNo weights for {', '.join(prediction.random_parts)}: these parts are untrained, "
            "THE LABELS AND MASKS MEAN NOTHING. This only shows that the program runs."
        )
    if absent := prediction.absent_weights:
        print(f"Without --cached-weights-only (make photo DOWNLOAD=yes) {absent} are fetched from official addresses.")


def predict_on_ray(prediction: Prediction) -> None:
    """Do the work of a command line on a Ray cluster."""
    args, cfg = prediction.args, prediction.cfg
    if args.points or set(args.format) - {"drawing", "json", "parquet"}:
        raise ValueError("--ray: it writes Parquet alone, without --points or other formats")
    is_local = "://" not in args.output
    if is_local and prediction.output.is_dir() and any(prediction.output.iterdir()):
        raise ValueError(f"--output {args.output}: expected a new or empty directory, as Ray adds to what is there")
    has_gpus = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    with connect(args.ray) as ray:
        run_on_ray(
            ray,
            args.input,
            prediction.images if len(prediction.images) else None,
            str(prediction.output.absolute()) if is_local else args.output,
            cfg=cfg,
            vocabulary=prediction.vocabulary,
            region_filter=prediction.filter,
            pool=RayPool(args.ray_actors, num_gpus=int(has_gpus), batch_size=args.batch_size),
            with_embeddings=args.embeddings,
            regions=prediction.reader.regions,
        )
    print(f"Parquet files of the regions are in {printable(args.output)}")


def main(args: Namespace) -> None:
    setup_logger(name="regionspot")
    prediction = Prediction(args)
    if prediction.is_baseline:
        print(f"{BASELINE}\n")
    if args.ray:
        predict_on_ray(prediction)
        return
    parts = PartStore(args.output, len(prediction.images), args.batch_size)
    settings = prediction.describe()
    with run_lock(args.output):
        discarded = parts.open(settings, args.overwrite)  # from here on no run claims to have written its outputs
        for name in written_files(prediction.output, *discarded) if args.overwrite and any(discarded) else ():
            if name not in prediction.inputs_among_outputs:
                (prediction.output / name).unlink(missing_ok=True)
        run_prediction(prediction.reader, prediction.build, parts, args.workers, args.embeddings)
        files = prediction.write_run_files(parts)
        summary = summarize(args.output, parts, prediction.images.skipped, files)
    print_summary(prediction.output, summary)
    print_weights(prediction)
    num_failed = len(summary.unreadable) - len(prediction.images.skipped)  # the latter are no images
    if summary.unreadable and num_failed == summary.num_images:
        raise ValueError(f"none of the images could be used; the first: {summary.unreadable[0][1]}")
