"""Converts proposal files between formats, and the authors' tokens into a token store."""

import logging
from argparse import Namespace

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.proposals import ProposalFile, select_proposals, write_proposals
from regionspot.data.tokens.convert import convert_tokens
from regionspot.engine.extract import Extraction, describe_store


def convert_proposals(args: Namespace) -> str:
    """Write the proposals in another format, and return a line about them."""
    proposals = ProposalFile(args.input, with_masks=args.to == "coco")
    selected = select_proposals(proposals.arrays, args.top_k, args.nms, args.min_score)
    write_proposals(args.output, args.to, selected)
    return (
        f"{args.output} ({args.to}): {len(selected.boxes)} boxes of {len(selected.image_ids)} images, of "
        f"{len(proposals.boxes)} in {args.input} ({proposals.format}); {selected.num_not_finite} NaN or infinite "
        f"left out; scores: {selected.scores_from}"
    )


def import_tokens(args: Namespace) -> str:
    """Write the token store, and return a line about its images."""
    if not args.tokens.is_dir():
        raise FileNotFoundError(f"--tokens {args.tokens}: no such directory")
    cfg = load_config(args.config_file, args.opts)
    check_registered([args.dataset], "--dataset")
    model = load_model(cfg)
    recognizer, stage = model.recognizer, cfg.MODEL.REGIONSPOT.TOKEN_STAGE
    extraction = Extraction(stages=(stage,), shard_images=args.shard_images)
    origin = describe_store(recognizer, args.dataset, extraction)
    origin["imported_from"] = str(args.tokens)
    dim = recognizer.localizer.token_dim
    counts = convert_tokens(args.tokens, args.dataset, stage, dim, args.output, origin)
    return f"{args.output}: images " + ", ".join(f"{outcome} {count}" for outcome, count in counts.items())


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    print(convert_proposals(args) if args.kind == "proposals" else import_tokens(args))
