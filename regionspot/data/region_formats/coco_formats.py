"""COCO's annotations, and boxes by image id."""

from pathlib import Path

import numpy as np

from regionspot.data.coco_io import AnnotationFile, look_up
from regionspot.data.proposals import ProposalFile
from regionspot.data.region_formats.entries import Entries


def read_annotations(path: Path) -> Entries:
    """Read annotations in COCO or LVIS format, without crowds."""
    file = AnnotationFile(path)
    annotations, categories = file.annotations(), file.categories
    keep = ~annotations.crowd
    images = annotations.images[keep]
    order = np.argsort(images, kind="stable")  # of an image together, in the order of the file
    boxes = annotations.boxes[keep][order].astype(np.float64)
    boxes[:, 2:] += boxes[:, :2]
    names, sizes = _names_and_sizes(file)
    return Entries(
        names=names,
        offsets=np.searchsorted(images[order], np.arange(len(names) + 1)),
        boxes=boxes,
        labels=annotations.labels[keep][order],
        label_names=[category.class_name for category in categories],
        scores=None,
        sizes=sizes,
    )


def read_proposals(path: Path, annotations: Path | None) -> tuple[str, Entries]:
    """Read COCO results or proposals of any format; labels are those of the annotation file, or category ids.

    Args:
        path: the file.
        annotations: an annotation file in COCO format, which has the names of the images; without it, the images' file
            names are their ids.
    """
    proposals = ProposalFile(path)
    arrays = proposals.arrays
    names, sizes = [(str(image_id),) for image_id in arrays.image_ids.tolist()], np.zeros((len(proposals), 2), np.int64)
    ids = np.zeros(0, np.int64) if arrays.labels is None else np.unique(arrays.labels)
    label_names = list(map(str, ids.tolist()))
    if annotations is not None:
        file = AnnotationFile(annotations)
        order = np.argsort(file.images.ids, kind="stable")
        positions, unknown = look_up(file.images.ids[order], arrays.image_ids)
        if unknown.any():
            raise ValueError(
                f"regions {path}: image id {arrays.image_ids[unknown][0]} is not in {annotations}; expected its images"
            )
        all_names, all_sizes = _names_and_sizes(file)
        names, sizes = [all_names[row] for row in order[positions]], all_sizes[order[positions]]
        name_of = {category.id: category.class_name for category in file.categories}
        label_names = [name_of.get(category_id, str(category_id)) for category_id in ids.tolist()]
    return proposals.format, Entries(
        names=names,
        offsets=arrays.offsets,
        boxes=arrays.boxes.astype(np.float64),
        labels=None if arrays.labels is None else np.searchsorted(ids, arrays.labels).astype(np.int32),
        label_names=label_names,
        scores=arrays.scores,
        sizes=sizes,
        have_suffix=annotations is not None,
        are_ids=annotations is None,
    )


def _names_and_sizes(file: AnnotationFile) -> tuple[list[tuple[str, ...]], np.ndarray]:
    images = file.images
    text, ends = images.names.tobytes(), images.name_ends.tolist()
    names: list[tuple[str, ...]] = [(text[start:stop].decode(),) for start, stop in zip(ends, ends[1:])]
    return names, np.stack([images.heights, images.widths], axis=1).astype(np.int64)
