"""Embeds vocabularies with examples, once for all later uses."""

import logging
from argparse import Namespace

from detectron2.utils.logger import setup_logger

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.index import RegionIndex
from regionspot.modeling.entry_embeddings import embed_vocabulary
from regionspot.modeling.identity import describe_model, fingerprints
from regionspot.utils.command_line import printable
from regionspot.vocabulary import load_vocabulary
from regionspot.vocabulary_entries import EmbeddedVocabulary, save_embedded

NUM_REFERENCES = 4096  # regions of an index


def main(args: Namespace) -> None:
    setup_logger(name="regionspot").setLevel(logging.WARNING)
    names = load_vocabulary(args.vocabulary, with_examples=True)
    predictor = RegionSpotPredictor(load_config(args.config_file, args.opts))
    recognizer, references = predictor.recognizer, None
    if args.reference:
        index = RegionIndex(args.reference)
        if len(index) < 2:  # their similarities need a standard deviation
            raise ValueError(f"--reference {args.reference}: expected an index of many regions, got {len(index)}")
        index.check_origin(describe_model(recognizer))
        step = max(len(index) // NUM_REFERENCES, 1)
        references = index.embeddings(range(0, len(index), step))
    embedded = embed_vocabulary(recognizer, names, references)
    if not isinstance(embedded, EmbeddedVocabulary):
        embeddings = recognizer.classifier.text_encoder(names).cpu()
        embedded = EmbeddedVocabulary(list(names), embeddings, fingerprints(recognizer, with_regions=False))
    save_embedded(args.output, embedded)
    print(f"{printable(args.output)}: {len(embedded):,} names of {embedded.embeddings.shape[1]} numbers each")
