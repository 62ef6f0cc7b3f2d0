"""Searches region indexes."""

import csv
import logging
from argparse import Namespace

from detectron2.utils.logger import setup_logger
from PIL import Image

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.index import IndexedRegion, RegionIndex, search_index
from regionspot.index.contact_sheet import draw_contact_sheet
from regionspot.index.search import combine, embed_region, embed_texts, mean_embedding, parse_region
from regionspot.index.store import OVERRIDES
from regionspot.modeling.identity import describe_model
from regionspot.utils.command_line import printable
from regionspot.utils.files import atomic_path

COLUMNS = ("rank", "score", "image", "x0", "y0", "x1", "y1", "region")


def load_predictor(args: Namespace, index: RegionIndex) -> RegionSpotPredictor:
    """Return the model that made an index.

    Raises:
        ValueError: the config names another one.
    """
    predictor = RegionSpotPredictor(load_config(args.config_file or index.config_file, [*args.opts, *OVERRIDES]))
    index.check_origin(describe_model(predictor.recognizer))
    return predictor


def table_rows(regions: list[IndexedRegion], scores: list[float]) -> list[tuple]:
    """Return a row of ``COLUMNS`` for each region."""
    return [
        (rank, round(score, 4), region.image, *(round(float(x), 2) for x in region.box), region.row)
        for rank, (region, score) in enumerate(zip(regions, scores), 1)
    ]


def main(args: Namespace) -> None:
    setup_logger(name="regionspot").setLevel(logging.WARNING)
    index = RegionIndex(args.index)
    examples = [(path, None) for path in args.image] + [parse_region(text) for text in args.region]
    predictor = load_predictor(args, index)
    text = embed_texts(predictor, args.text) if args.text else None
    embedded = [embed_region(predictor, path, box) for path, box in examples]
    mean = mean_embedding(index) if text is not None and embedded else None
    result = search_index(index, combine(text, embedded, mean), args.top_k, device=str(predictor.model.device))
    regions, scores = index.regions(result.rows[0]), result.scores[0].tolist()
    rows = table_rows(regions, scores)
    for rank, score, image, *box, _ in rows:
        print(f"{rank:4}  {score:7.4f}  {printable(image)}  box {', '.join(f'{x:.0f}' for x in box)}")
    if args.output:
        with atomic_path(args.output / "regions.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        titles = [f"{rank}: {score:.3f}" for rank, score in enumerate(scores, 1)]
        sheet = draw_contact_sheet(regions, titles, args.images or index.root)
        with atomic_path(args.output / "sheet.png") as path:
            Image.fromarray(sheet).save(path, format="PNG")
        print(f"regions.csv and sheet.png are in {printable(args.output)}")
