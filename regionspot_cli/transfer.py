"""Transfers a trained checkpoint to another localizer."""

import logging
from argparse import Namespace

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine.token_transfer import open_store, pairs_of_dataset, pairs_of_stores, transfer


def main(args: Namespace) -> float:
    """Write the checkpoint; return the explained variance."""
    logging.basicConfig(level=logging.WARNING)
    if args.dataset:
        check_registered([args.dataset], "--dataset")
    trained, model = (
        load_model(load_config(path, [*args.opts, "MODEL.WEIGHTS", weights]))
        for path, weights in ((args.config_file, args.weights), (args.to, ""))
    )
    both = (trained.recognizer, model.recognizer)
    if args.stores:
        old, new = (open_store(path, recognizer) for path, recognizer in zip(args.stores, both))
        pairs = pairs_of_stores(old, new, args.max_images)
    else:
        pairs = pairs_of_dataset(*both, args.dataset, args.max_images)
    result = transfer(*both, pairs, args.ridge)
    RegionSpotCheckpointer(model, str(args.output.parent)).save(args.output.stem, is_last=False)
    share = f"explained variance {result.explained_variance:.4f} of the tokens of {result.num_held_out} others"
    print(f"{args.output}: fitted on {result.num_pairs} regions; {share}")
    return result.explained_variance
