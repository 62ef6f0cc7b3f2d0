"""Data sets whose annotations are COCO or LVIS JSON, with class names and ids taken from the file itself."""

import json
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode


def register_json_dataset(
    name: str, json_file: str | Path, image_root: str | Path, evaluator_type: str = "lvis"
) -> None:
    """Register annotations in COCO or LVIS format; the file is first read when the data set is first used.

    Args:
        name: what the data set is called in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotations.
        image_root: folder that ``file_name`` (or the end of ``coco_url``) is relative to.
        evaluator_type: "lvis" or "coco".
    """
    DatasetCatalog.register(name, lambda: load_json_dataset(name, json_file, image_root))
    MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(image_root), evaluator_type=evaluator_type)


def load_json_dataset(name: str, json_file: str | Path, image_root: str | Path) -> list[dict[str, Any]]:
    """Return the data set in Detectron2's format and set ``thing_classes`` and the id mapping of its metadata.

    Category ids may be any integers: sorted, they become 0, 1, 2, ...

    Raises:
        FileNotFoundError: no such annotation file.
        ValueError: not COCO or LVIS JSON.
    """
    content = _read(Path(json_file))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    mapping = {category["id"]: index for index, category in enumerate(categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[category["name"] for category in categories], thing_dataset_id_to_contiguous_id=mapping
    )
    annotations: dict[Any, list] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in mapping:
            raise ValueError(
                f"{json_file}: annotation {annotation.get('id')} has category id {annotation['category_id']}, "
                "which is not in 'categories'"
            )
        if annotation["image_id"] not in annotations:
            raise ValueError(
                f"{json_file}: annotation {annotation.get('id')} has image id {annotation['image_id']}, "
                "which is not in 'images'"
            )
        annotations[annotation["image_id"]].append(_record_annotation(annotation, mapping))
    return [_record(image, Path(image_root), annotations[image["id"]]) for image in content["images"]]


def _read(json_file: Path) -> dict[str, Any]:
    if not json_file.is_file():
        raise FileNotFoundError(f"annotations {json_file}: no such file")
    try:
        content = json.loads(json_file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"annotations {json_file}: not valid JSON ({error})") from error
    missing = [
        key for key in ("images", "annotations", "categories") if not isinstance(content, dict) or key not in content
    ]
    if missing:
        raise ValueError(f"annotations {json_file}: expected COCO or LVIS JSON, but {', '.join(missing)} is missing")
    return content


def _record_annotation(annotation: dict[str, Any], mapping: dict[int, int]) -> dict[str, Any]:
    return {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": mapping[annotation["category_id"]],
        "iscrowd": annotation.get("iscrowd", 0),
    }


def _record(image: dict[str, Any], image_root: Path, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    # LVIS names no files: its images are COCO's, and the last two parts of the address are split and file.
    if "file_name" not in image and "coco_url" not in image:
        raise ValueError(f"image {image['id']} of the annotations has neither file_name nor coco_url")
    file_name = image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:])
    return {
        "file_name": str(image_root / file_name),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "annotations": annotations,
    }
