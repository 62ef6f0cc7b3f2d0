"""What the page shows of a recognition: a table, choices, and a COCO file."""

from typing import Any

from regionspot.app.recognition import Recognition
from regionspot.modeling.region_predictions import UNKNOWN
from regionspot.utils.rle import mask_areas

HEADERS = ["#", "Name", "Score", "Mask IoU", "Best names"]
TYPES = ["number", "str", "number", "number", "str"]  # "str" cells are text, never HTML
WIDTHS = ["8%", "22%", "14%", "14%", "42%"]


def to_rows(recognition: Recognition) -> list[list[Any]]:
    """Return a row for each region: number, name, score, SAM's estimate of its mask's IoU, and its best names."""
    predictions = recognition.predictions
    rows = []
    for index, name in enumerate(predictions.class_names):
        best = zip(predictions.top_classes[index], predictions.top_scores[index])
        text = ", ".join(f"{predictions.vocabulary[label]} {score:.3f}" for label, score in best)
        score, iou = predictions.scores[index], predictions.predicted_ious[index]
        rows.append([index + 1, name, round(float(score), 3), round(float(iou), 3), text])
    return rows


def to_choices(recognition: Recognition) -> list[tuple[str, int]]:
    """Return the regions as choices: what is shown, and the index."""
    return [(f"{i + 1}: {name}", i) for i, name in enumerate(recognition.predictions.class_names)]


def to_coco(recognition: Recognition) -> dict[str, Any]:
    """Return the regions as COCO annotations: boxes, masks as compressed RLE, scores, all names as categories.

    Unknown regions have a category of their own, the last, which is there only if there are any.
    """
    predictions = recognition.predictions
    height, width = predictions.image_size
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(predictions.vocabulary)]
    if predictions.unknown.any():
        categories.append({"id": len(categories) + 1, "name": UNKNOWN})
    rles = predictions.rles
    assert rles is not None
    areas, annotations = mask_areas(rles), []
    for index, (x0, y0, x1, y1) in enumerate(predictions.boxes.tolist()):
        annotations.append(
            {
                "id": index + 1,
                "image_id": 1,
                "category_id": len(categories) if predictions.unknown[index] else int(predictions.classes[index]) + 1,
                "bbox": [round(x0, 3), round(y0, 3), round(x1 - x0, 3), round(y1 - y0, 3)],
                "area": float(areas[index]),
                "segmentation": rles[index],
                "iscrowd": 0,
                "score": float(predictions.scores[index]),
                "predicted_iou": float(predictions.predicted_ious[index]),
            }
        )
    image = {"id": 1, "file_name": recognition.image.name, "height": height, "width": width}
    return {"images": [image], "annotations": annotations, "categories": categories}
