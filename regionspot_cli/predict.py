"""Recognizes regions of images."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from regionspot import RegionPredictions, RegionSpotPredictor
from regionspot.checkpoint.fetch import KNOWN_WEIGHTS
from regionspot.config import load_config
from regionspot.structures import check_boxes
from regionspot.utils.command_line import printable
from regionspot.utils.files import atomic_path, read_json, write_json
from regionspot.utils.images import to_rgb_array
from regionspot.visualization import draw_regions
from regionspot.vocabulary import load_vocabulary


def parse_boxes(text: str, image: Path) -> list[list[float]]:
    """Return the boxes of --boxes for an image.

    Raises:
        FileNotFoundError: no such JSON file.
        ValueError: not four numbers a box, or the file has no boxes for the image.
    """
    content = read_json(text, "--boxes") if text.endswith(".json") else _parse_numbers(text, "--boxes", "x0,y0,x1,y1")
    # A file may have boxes for each image, by the image's file name or path; an image may have none there.
    boxes = content
    if isinstance(content, dict):
        boxes = content.get(image.name, content.get(str(image)))
        if boxes is None:
            raise ValueError(f"--boxes {text}: no boxes for {image.name}; it has {', '.join(list(content)[:5])}")
    if not boxes and not isinstance(content, dict):
        raise ValueError("--boxes: no boxes; expected at least one, x0,y0,x1,y1")
    if not isinstance(boxes, list) or any(
        not isinstance(box, list)
        or len(box) != 4
        or any(isinstance(side, bool) or not isinstance(side, (int, float)) for side in box)
        for box in boxes
    ):
        raise ValueError(f"--boxes: expected four numbers a box, x0,y0,x1,y1, got {str(boxes)[:100]}")
    return boxes


def parse_points(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return points (N, P, 2) and labels (N, P), padded with label -1, of --points.

    Raises:
        ValueError: not two or three numbers a point.
    """
    regions = [
        _parse_numbers(";".join(region.split()), "--points", "x,y or x,y,label")
        for region in text.split(";")
        if region.strip()
    ]
    if not regions or any(len(point) not in (2, 3) for region in regions for point in region):
        raise ValueError(f'--points: expected "x,y" or "x,y,label", got {text!r}')
    longest = max(map(len, regions))
    points = np.zeros((len(regions), longest, 2), np.float32)
    labels = np.full((len(regions), longest), -1)
    for i, region in enumerate(regions):
        for j, (x, y, *label) in enumerate(region):
            points[i, j] = x, y
            if label and label[0] not in (0, 1):
                raise ValueError(f"--points: expected label 1 (on the object) or 0 (off it), got {label[0]:g}")
            labels[i, j] = label[0] if label else 1
    return points, labels


def _parse_numbers(text: str, option: str, expected: str) -> list[list[float]]:
    try:
        return [[float(x) for x in group.split(",")] for group in text.split(";") if group.strip()]
    except ValueError:
        raise ValueError(f"{option}: expected numbers, {expected}, separated by semicolons; got {text!r}") from None


def describe(image: Path, size: tuple[int, int], predictions: RegionPredictions) -> dict[str, Any]:
    """Return the content of the JSON file of an image of (height, width)."""
    regions = []
    assert predictions.rles is not None
    for i, label in enumerate(predictions.class_names):
        regions.append(
            {
                "box": [round(float(x), 3) for x in predictions.boxes[i]],
                "label": label,
                "class_index": int(predictions.classes[i]),
                "score": float(predictions.scores[i]),
                "iou": float(predictions.predicted_ious[i]),
                "logits": predictions.logits[i].tolist(),
                "mask": predictions.rles[i],
            }
        )
    return {
        "image": str(image),
        "height": size[0],
        "width": size[1],
        "vocabulary": predictions.vocabulary,
        "regions": regions,
    }


def leave_absent_weights(cfg: CfgNode) -> None:
    """Set the known weights that are not in the cache directory to "": these parts stay random."""
    for part in ("SAM", "CLIP"):
        known = KNOWN_WEIGHTS.get(cfg.MODEL.REGIONSPOT[part].WEIGHTS)
        if known is not None and not known.path.is_file():
            cfg.MODEL.REGIONSPOT[part].WEIGHTS = ""


def load_inputs(args: Namespace, deep_range: Sequence[float]) -> list[tuple[Path, np.ndarray, dict[str, Any]]]:
    """Read all images and prompts first, so that errors in them are reported before the model is built."""
    if not args.boxes and not args.points:
        raise ValueError("no regions: expected --boxes, --points or both")
    stems = [Path(image).stem for image in args.input]
    if len(set(stems)) < len(stems):
        repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise ValueError(f"--input: images of the same name would overwrite each other's output: {repeated}")
    inputs = []
    for path in map(Path, args.input):
        if (Path(args.output) / f"{path.stem}.png").resolve() == path.resolve():
            raise ValueError(
                f"--output {args.output}: the output image would overwrite the input {path}; give another directory"
            )
        image = to_rgb_array(path, deep_range)
        prompts: dict[str, Any] = {}
        if args.boxes:
            prompts["boxes"] = parse_boxes(args.boxes, path)
            check_boxes(
                torch.tensor(prompts["boxes"]).reshape(-1, 4),
                (image.shape[0], image.shape[1]),
                f"--boxes of {path.name}",
            )
        if args.points:
            prompts["points"], prompts["point_labels"] = parse_points(args.points)
        inputs.append((path, image, prompts))
    return inputs


def write_outputs(
    directory: Path, path: Path, image: np.ndarray, predictions: RegionPredictions, with_masks: bool
) -> None:
    """Write the annotated image and the JSON of an image, and print its regions."""
    drawing = draw_regions(image, predictions, with_masks)
    content = describe(path, (image.shape[0], image.shape[1]), predictions)
    write_json(directory / f"{path.stem}.json", content, indent=None)
    with atomic_path(directory / f"{path.stem}.png") as temporary:
        Image.fromarray(drawing).save(temporary, format="PNG")
    for box, label, score, iou in zip(
        predictions.boxes, predictions.class_names, predictions.scores, predictions.predicted_ious
    ):
        place = ", ".join(f"{x:.0f}" for x in box)
        tqdm.write(f"{printable(path.name)}  box {place}:  {printable(label)}  (score {score:.3f}, mask IoU {iou:.3f})")


def main(args: Namespace) -> None:
    setup_logger(name="regionspot")
    cfg = load_config(args.config_file, args.opts)
    inputs = load_inputs(args, cfg.INPUT.DEEP_RANGE)
    vocabulary = load_vocabulary(args.vocabulary or cfg.MODEL.REGIONSPOT.VOCABULARY, with_examples=True)
    if args.cached_weights_only:
        leave_absent_weights(cfg)
    torch.manual_seed(max(cfg.SEED, 0))
    predictor = RegionSpotPredictor(cfg)
    predictor.set_vocabulary(vocabulary)
    for path, image, prompts in tqdm(inputs, desc="images", unit="image"):
        predictor.set_image(image)
        write_outputs(Path(args.output), path, image, predictor.predict(**prompts), "sam" not in predictor.random_parts)
    print(f"images and JSON are in {printable(args.output)}")
    if predictor.random_parts:
        print(
            f"\nNo weights for {', '.join(predictor.random_parts)}: these parts are untrained, "
            "THE LABELS AND MASKS MEAN NOTHING. This only shows that the program runs."
        )
