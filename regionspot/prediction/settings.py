"""What the results of a run depend on, so that it is never continued with anything else."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from regionspot.checkpoint.fetch import find_known_weights, resolve_weights
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.prediction.sources import ImageList
from regionspot.utils.files import sha256_of_file, short_hash
from regionspot.utils.fingerprint import fingerprint_of
from regionspot.vocabulary_entries import EmbeddedVocabulary, EntryVocabulary


def describe_run(
    cfg: CfgNode, images: ImageList, vocabulary: Sequence[str], options: dict[str, Any], files: Sequence[str]
) -> dict[str, Any]:
    """Return what the results depend on, as JSON has it.

    Args:
        cfg: the config; its device and output directory do not count.
        images: the list.
        vocabulary: class names, also with synonyms.
        options: of the command line.
        files: files and directories of regions; their content counts.

    Raises:
        FileNotFoundError: no such weights.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = cfg.OUTPUT_DIR = ""
    node = cfg.MODEL.REGIONSPOT
    ensemble = GeometricEnsemble.from_config(cfg)
    sources = {"MODEL.WEIGHTS": cfg.MODEL.WEIGHTS}
    sources |= {f"{part}.WEIGHTS": node[part].WEIGHTS for part in ("SAM", "CLIP")}
    sources["DETECTOR.WEIGHTS"] = node.PROPOSALS.DETECTOR.WEIGHTS
    return {
        "images": [len(images), images.fingerprint()],
        "vocabulary": list(vocabulary),
        "entries": _describe_entries(vocabulary),
        **options,
        "files": [fingerprint_of(path)[:16] for path in files],
        **({} if ensemble is None else {"ensemble": ensemble.describe()}),
        "weights": {key: _describe_weights(source) for key, source in sources.items()},
        "config": short_hash(cfg.dump(), 16),
    }


def _describe_entries(vocabulary: Sequence[str]) -> str:
    """Return a hash of what stands behind the names: synonyms, examples, or embeddings."""
    if isinstance(vocabulary, EmbeddedVocabulary):
        return hashlib.sha256(vocabulary.embeddings.numpy().tobytes()).hexdigest()[:16]
    if isinstance(vocabulary, EntryVocabulary):
        concepts = [concept for entry in vocabulary.entries for concept in (entry.concept, *entry.negatives)]
        images = sorted({str(example.image) for concept in concepts for example in concept.examples})
        files = [sha256_of_file(image) for image in images if Path(image).is_file()]
        return short_hash(repr((vocabulary.entries, files)), 16)
    return short_hash(repr(getattr(vocabulary, "phrases", "")), 16)


def _describe_weights(source: str) -> str:
    if not source or find_known_weights(source):
        return source
    if "://" in source:  # a file at an address does not change
        return source
    path = resolve_weights(source)
    return f"{path.name} {sha256_of_file(path)[:16]}"
