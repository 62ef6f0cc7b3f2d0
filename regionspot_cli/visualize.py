"""Draws attention maps, models side by side, and what token stores hold."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes
from detectron2.utils.logger import setup_logger
from PIL import Image

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.tokens import TokenStore
from regionspot.data.training_set import image_ids
from regionspot.drawing import draw_attention, draw_labels, draw_sheet, enlarge
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.attention_maps import cross_attention
from regionspot.modeling.crop_baseline import CropRecognizer
from regionspot.modeling.region_predictions import UNKNOWN
from regionspot.prediction.regions import parse_boxes
from regionspot.structures import Prompts, check_boxes
from regionspot.utils.command_line import printable
from regionspot.utils.files import atomic_path
from regionspot.utils.images import to_rgb_array
from regionspot.vocabulary import load_vocabulary


def read_regions(args: Namespace, deep_range: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the image, (H, W, 3) uint8 RGB, and its boxes, (N, 4) float32 XYXY."""
    image = to_rgb_array(args.input, deep_range)
    boxes = parse_boxes(args.boxes).find(args.input.name, str(args.input))
    if boxes is None:
        raise ValueError(f"--boxes {args.boxes}: no boxes for {args.input.name}")
    check_boxes(torch.from_numpy(boxes), (image.shape[0], image.shape[1]), "--boxes")
    return image, boxes


def draw_names(image: np.ndarray, boxes: np.ndarray, names: list[str]) -> np.ndarray:
    """Draw (N, 4) boxes XYXY with names on an image, which is enlarged if it is small."""
    large, scale = enlarge(image)
    return draw_labels(large, boxes * scale, None, names)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@torch.no_grad()
def recognize(recognizer: RegionRecognizer, image: np.ndarray, boxes: np.ndarray) -> list[str]:
    """Return each region's best name with its probability."""
    [result] = recognizer.recognize([to_tensor(image)], [Boxes(torch.from_numpy(boxes))])
    regions = result.regions
    columns = (regions.top_classes[:, 0], regions.top_scores[:, 0], regions.unknown)
    return [
        UNKNOWN if is_unknown else f"{recognizer.vocabulary[label]} {score:.0%}"
        for label, score, is_unknown in zip(*(column.tolist() for column in columns))
    ]


@torch.no_grad()
def draw_attention_maps(args: Namespace) -> np.ndarray:
    """Return the image with its regions, and what each attends to (paper, figure 4)."""
    cfg = load_config(args.config_file, args.opts)
    image, boxes = read_regions(args, cfg.INPUT.DEEP_RANGE)
    chosen = [number - 1 for number in args.regions or range(1, len(boxes) + 1)]
    if not all(0 <= row < len(boxes) for row in chosen):
        raise ValueError(f"--regions: expected numbers from 1 to {len(boxes)}, got {' '.join(map(str, args.regions))}")
    recognizer = load_model(cfg).recognizer
    titles = [f"region {row + 1}" for row in range(len(boxes))]
    if args.vocabulary:
        recognizer.set_vocabulary(args.vocabulary)
        names = recognize(recognizer, image, boxes)
        titles = [f"{title}: {name}" for title, name in zip(titles, names)]
    features = recognizer.encode_images([to_tensor(image)])
    [located] = recognizer.locate(features, [Prompts(boxes=torch.from_numpy(boxes))])
    assert features.feature_map is not None or not recognizer.knowledge_integration.with_features
    maps = cross_attention(recognizer.knowledge_integration, located.tokens, features.feature_map, chosen)
    cells = [(draw_names(image, boxes, [str(row + 1) for row in range(len(boxes))]), args.input.name)]
    for row, weights in zip(chosen, maps.float().cpu().numpy()):
        cells.append((draw_attention(image, weights, boxes[row]), titles[row]))
    return draw_sheet(cells, columns=4)


def draw_comparison(args: Namespace) -> np.ndarray:
    """Return the same regions as two models name them, or RegionSpot and CLIP on crops (paper, figure 3)."""
    cfg = load_config(args.config_file, args.opts)
    image, boxes = read_regions(args, cfg.INPUT.DEEP_RANGE)
    vocabulary = load_vocabulary(args.vocabulary or cfg.MODEL.REGIONSPOT.VOCABULARY, with_examples=True)
    recognizer = load_model(cfg).recognizer
    models = [(_title(args.config_file, cfg.MODEL.WEIGHTS), recognizer)]
    if args.other_config_file or args.other_weights:
        config_file = args.other_config_file or args.config_file
        weights = ["MODEL.WEIGHTS", args.other_weights] if args.other_weights else []
        other = load_config(config_file, [*args.opts, *weights])
        models.append((_title(config_file, other.MODEL.WEIGHTS), load_model(other).recognizer))
    crops = args.crops or ("box" if len(models) == 1 else "")
    for kind in filter(None, crops.split(",")):
        models.append((f"CLIP on {kind} crops", CropRecognizer.sharing(recognizer, masked=kind == "mask")))
    cells = []
    for title, model in models:
        model.set_vocabulary(vocabulary)
        cells.append((draw_names(image, boxes, recognize(model, image, boxes)), title))
    return draw_sheet(cells, columns=2)


def _title(config_file: str, weights: str) -> str:
    return f"{Path(config_file).stem}, {Path(weights).name or 'no weights'}"


def draw_store(args: Namespace) -> np.ndarray:
    """Return images with the regions whose tokens a store holds."""
    store = TokenStore(args.store, args.stage)
    if not len(store.image_ids):
        raise ValueError(
            f"{args.store}: the token store has no images; expected at least one, extract its tokens again"
        )
    check_registered([args.dataset], "--dataset")
    records = DatasetCatalog.get(args.dataset)
    rows = {image_id: row for row, image_id in enumerate(image_ids(records).tolist())}
    names, cells = MetadataCatalog.get(args.dataset).thing_classes, []
    for image_id in args.image_ids or store.image_ids[:8].tolist():
        boxes, labels = store.regions(image_id)
        if image_id not in rows:
            raise KeyError(f"--dataset {args.dataset}: it has no image {image_id}, which is in {args.store}")
        record = records[rows[image_id]]
        image = to_rgb_array(record["file_name"])
        title = f"image {image_id}: {len(boxes)} regions stored, {len(record['annotations'])} annotated"
        cells.append((draw_names(image, boxes.numpy(), [names[label] for label in labels.tolist()]), title))
    return draw_sheet(cells, columns=4)


KINDS = {"attention": draw_attention_maps, "compare": draw_comparison, "tokens": draw_store}


def main(args: Namespace) -> None:
    setup_logger(name="regionspot")
    sheet = KINDS[args.kind](args)
    with atomic_path(args.output) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    print(f"written to {printable(args.output)}")
