#!/usr/bin/env python
"""Turn a file of proposals of any format into any other, and keep only the best of each image if asked to.

The input's format is recognized by its content. Formats: glip ({image_id: {boxes, scores, labels}}), coco (COCO
results), detectron2 (its pickle), safetensors (RegionSpot's own: small, and read at once).

Example:
    tools/convert_proposals.py glip_lvis_val.json glip_lvis_val.safetensors --nms 0.7 --top-k 300
"""

import argparse
from pathlib import Path

SUFFIXES = {".json": "glip", ".pkl": "detectron2", ".pickle": "detectron2", ".safetensors": "safetensors"}
FORMATS = ("glip", "coco", "detectron2", "safetensors")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--to", choices=FORMATS, help="by default as OUTPUT's suffix says; .json is glip")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K best boxes of each image")
    parser.add_argument(
        "--nms", type=float, metavar="IOU", help="drop boxes over a better one of the same label, if any"
    )
    parser.add_argument("--min-score", type=float, metavar="S", help="drop boxes that score lower")
    args = parser.parse_args(arguments)
    args.to = args.to or SUFFIXES.get(args.output.suffix.lower())
    if args.to is None:
        parser.error(f"{args.output}: expected one of the suffixes {', '.join(SUFFIXES)}, or --to FORM")
    return args


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

from regionspot.data.proposals import ProposalFile, select_proposals, write_proposals
from regionspot.utils.command_line import run_command


def convert(source: Path, target: Path, format: str, top_k: int | None, nms: float | None, least: float | None) -> str:
    """Write ``target`` and return a line about it."""
    proposals = ProposalFile(source, with_masks=format == "coco")
    kept = select_proposals(proposals.arrays, top_k, nms, least)
    write_proposals(target, format, kept)
    return (
        f"{target} ({format}): {len(kept.boxes)} boxes of {len(kept.image_ids)} images, of {len(proposals.boxes)} in "
        f"{source} ({proposals.format}); {kept.num_not_finite} NaN or infinite left out; scores: {kept.scores_from}"
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    print(convert(args.input, args.output, args.to, args.top_k, args.nms, args.min_score))


if __name__ == "__main__":
    run_command(main)
