"""Generated annotations and detections to evaluate."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

SIZE = (480, 640)


def write_case(
    directory: Path, images: int, detections: int, categories: int, masks: bool = False, seed: int = 0
) -> tuple[Path, Path]:
    """Write annotations like LVIS val's (12 boxes an image, 3 classes and 15 verified ones) and detections.

    A tenth of the detections lie about an annotation; of the others half are of classes that the image was verified
    for, half of any. Every 50th annotation is a crowd, for COCO's rules.

    Returns:
        The annotation file and the file of results.
    """
    rng, (height, width) = np.random.default_rng(seed), SIZE
    directory.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    annotations: list[dict] = []
    with (directory / "results.json").open("w") as file:
        file.write("[")
        for image in tqdm(range(1, images + 1), desc="drawing detections", unit="image"):
            verified = (rng.choice(categories, 18, replace=False) + 1).tolist()
            corner = rng.uniform(0, 0.7, (12, 2)) * (width, height)
            truths = np.hstack([corner, rng.uniform(0.02, 0.3, (12, 2)) * (width, height)]).round(2)
            labels = rng.choice(verified[:3], 12)
            for (x, y, w, h), label in zip(truths.tolist(), labels.tolist()):
                entry = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": [x, y, w, h]}
                outline = [x, y, x + w, y, x + w, y + h, x, y + h]
                crowd = int(len(annotations) % 50 == 49)
                annotations.append(entry | {"area": w * h, "segmentation": [outline], "iscrowd": crowd})
            record = {"id": image, "height": height, "width": width, "file_name": f"{image}.jpg"}
            verified_absent = {"neg_category_ids": verified[3:], "not_exhaustive_category_ids": verified[:1]}
            records.append(record | verified_absent)

            near = rng.integers(12, size=detections)
            boxes = truths[near] * np.exp(rng.normal(0, 0.08, (detections, 4)))
            kind = rng.random(detections)
            category = np.where(kind < 0.55, rng.choice(verified, detections), rng.integers(1, categories, detections))
            category = np.where(kind < 0.1, labels[near], category)
            boxes[kind >= 0.1, :2] = rng.uniform(0, 0.7, ((kind >= 0.1).sum(), 2)) * (width, height)
            scores = rng.random(detections)
            rles = mask_utils.frPyObjects(boxes, height, width) if masks else []
            entries = []
            for index, values in enumerate(zip(boxes.tolist(), category.tolist(), scores.tolist())):
                entry = {"image_id": image, "category_id": values[1], "bbox": values[0], "score": values[2]}
                if masks:
                    entry["segmentation"] = {"size": [height, width], "counts": rles[index]["counts"].decode()}
                entries.append(json.dumps(entry))
            file.write(("," if image > 1 else "") + ",".join(entries))
        file.write("]")
    frequencies = rng.choice(["r", "c", "f"], categories, p=[0.28, 0.38, 0.34]).tolist()
    classes = [{"id": i + 1, "name": f"thing {i}", "frequency": f} for i, f in enumerate(frequencies)]
    content = {"info": {}, "images": records, "annotations": annotations, "categories": classes}
    (directory / "annotations.json").write_text(json.dumps(content))
    return directory / "annotations.json", directory / "results.json"
