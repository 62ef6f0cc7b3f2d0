"""Finds suspicious labels in an annotation file."""

import logging
from argparse import Namespace

from detectron2.utils.logger import setup_logger

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.coco_io import AnnotationFile
from regionspot.engine import fork_workers
from regionspot.index import IndexClassifier, build_index, dataset_images
from regionspot.index.audit import annotated_labels, audit_labels
from regionspot.index.audit_files import AuditWriter
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.utils.command_line import printable

SHOWN = 10  # labels that are printed


def main(args: Namespace) -> None:
    setup_logger(name="regionspot").setLevel(logging.WARNING)
    fork_workers()
    file = AnnotationFile(args.annotations)
    names = [category.class_name for category in file.categories]
    if len(names) < 2:
        raise ValueError(f"--annotations {args.annotations}: expected at least two categories, got {len(names)}")
    dataset = f"{args.annotations}:{args.images}"
    check_registered([dataset], "--annotations and --images")
    images = dataset_images(dataset)
    cfg = load_config(args.config_file, args.opts)
    predictor = RegionSpotPredictor(cfg)
    _, embeddings = predictor.recognizer.encode_vocabulary(names)
    index = build_index(predictor, cfg, images, args.output / "index", args.shard_images)
    if index is None:
        print(f"{printable(args.output)}: other processes still work on the index; run it again when they are done")
        return
    device = str(predictor.model.device)
    classifier = IndexClassifier(index, embeddings, rule=DetectionRule("softmax"), device=device)
    audit = audit_labels(classifier, *annotated_labels(index, file))
    writer = AuditWriter(index, file, audit, args.top_k)
    writer.write_coco(args.output / "suspicious.json")
    writer.write_csv(args.output / "suspicious.csv")
    writer.write_page(args.output / "audit.html", str(args.images), args.worst)
    for region, entry, row in list(zip(writer.regions, writer.entries, writer.rows))[:SHOWN]:
        label = names[audit.labels[row]]
        text = f"{entry['suspicion']:.3f}  {region.image}: {label}, looks like {entry['suggested']}"
        print(printable(text))
    count = int(audit.is_suspicious.sum())
    print(
        f"{count:,} of {len(audit.labels):,} labels are suspicious, {len(index.left_out())} images left out; "
        f"suspicious.json, suspicious.csv and audit.html are in {printable(args.output)}"
    )
