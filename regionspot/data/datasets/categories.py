"""The categories of an annotation file that a data set's classes stand for."""

import numpy as np
from detectron2.data import MetadataCatalog

from regionspot.data.coco_io import AnnotationFile
from regionspot.vocabulary import dataset_names


def category_ids(name: str) -> np.ndarray:
    """Return the category ids, in the annotation file, of a data set's classes 0, 1, 2, ...

    Metadata list them (``thing_dataset_id_to_contiguous_id``), for all categories or, for a detector of some classes,
    for a part. If they do not, classes of LVIS data sets are the ids less 1, as in Detectron2's ``lvis_v1_*``, and
    those of others are in the order of the ids. Both are checked against the names in the file.

    Args:
        name: a registered data set with K class names.

    Returns:
        (K,) int64.

    Raises:
        FileNotFoundError: no annotation file.
        ValueError: the file's categories are not the data set's classes; it names the first that differs.
    """
    names, metadata = dataset_names(name), MetadataCatalog.get(name)
    mapping, json_file = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("json_file")
    if not json_file:  # without a mapping the ids that Detectron2's convert_to_coco_json writes
        mapping = mapping or {label: label for label in range(len(names))}
        by_label = {label: category for category, label in mapping.items()}
        if without := [names[label] for label in range(len(names)) if label not in by_label]:
            raise ValueError(
                f"data set {name!r}: class {without[0]!r} has no id in the metadata's thing_dataset_id_to_contiguous_id"
            )
        return np.array([by_label[label] for label in range(len(names))], np.int64)
    file = AnnotationFile(json_file, only_categories=True)
    if mapping is None:
        is_lvis = metadata.get("evaluator_type") == "lvis"
        mapping = {c.id: c.id - 1 if is_lvis else position for position, c in enumerate(file.categories)}
    prefix = f"data set {name!r}, {file.name}"
    remedy = "is it the right file? One of your own is named annotations.json:directory_of_images"
    ids: dict[int, int] = {}
    for category in file.categories:
        if (label := mapping.get(category.id)) is None:
            continue
        class_name = names[label] if 0 <= label < len(names) else "no class"
        # Detectron2's names of LVIS are the first synonyms, other people's those of the file.
        if class_name not in (category.class_name, category.name):
            raise ValueError(
                f"{prefix}: category {category.id} is {category.name!r}, but {class_name!r} in metadata; {remedy}"
            )
        if label in ids:
            raise ValueError(
                f"{prefix}: class {class_name!r} has two categories, {ids[label]} and {category.id}; {remedy}"
            )
        ids[label] = category.id
    missing = [label for label in range(len(names)) if label not in ids]
    if missing:
        raise ValueError(
            f"{prefix}: {len(missing)} of {len(names)} classes have no category, the first is {names[missing[0]]!r}; "
            f"{remedy}"
        )
    return np.array([ids[label] for label in range(len(names))], np.int64)
