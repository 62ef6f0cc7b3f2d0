#!/usr/bin/env python
"""Import tokens that the authors published, one <image_id>.pth an image, into a token store.

Example:
    tools/convert_tokens.py --config-file configs/RegionSpot-BB.yaml --tokens their_tokens/objects365 \
        --dataset objects365_v1_train --output datasets/tokens/objects365_v1_train
"""

import argparse
import logging
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model whose SAM they are of")
    parser.add_argument("--tokens", required=True, type=Path, metavar="DIR", help="where the .pth files lie")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered name, or my.json:images")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the store")
    parser.add_argument("--shard-images", type=int, default=512, help="images of the data set a shard")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

from regionspot.checkpoint.checkpointer import load_model
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.tokens.convert import convert_tokens
from regionspot.engine.extract import Extraction, describe_store
from regionspot.utils.command_line import run_command


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    if not args.tokens.is_dir():
        raise FileNotFoundError(f"--tokens {args.tokens}: no such directory")
    cfg = load_config(args.config_file, args.opts)
    check_registered([args.dataset], "--dataset")
    model = load_model(cfg)
    recognizer, stage = model.recognizer, cfg.MODEL.REGIONSPOT.TOKEN_STAGE
    extraction = Extraction(stages=(stage,), shard_images=args.shard_images)
    origin = describe_store(recognizer, recognizer.weight_sources, args.dataset, extraction)
    origin["imported_from"] = str(args.tokens)
    dim = recognizer.localizer.token_dim
    counts = convert_tokens(load_checkpoint_file, args.tokens, args.dataset, stage, dim, args.output, origin)
    print(f"{args.output}: images " + ", ".join(f"{outcome} {count}" for outcome, count in counts.items()))


if __name__ == "__main__":
    run_command(main, kept="finished shards are kept")
