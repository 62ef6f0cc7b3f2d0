"""Writes splits of the miniature world in LVIS format."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api
from tqdm import tqdm

from miniworld.categories import FREQUENCIES, NAMES
from miniworld.generator import SIZE, draw_scene, drawing_pool, is_annotated
from regionspot.utils.files import atomic_path


def write_split(directory: Path, split: str, num_scenes: int, seed: int = 0, workers: int = 1) -> Path:
    """Draw the first scenes of a split into ``directory/<split>``, annotated in ``directory/<split>.json``.

    Args:
        directory: of the data set.
        split: "train", "val" or "test".
        num_scenes: of the split.
        seed: of the world.
        workers: drawing processes; 1 draws in this one.

    Returns:
        The annotation file; an existing one for the same number and seed is kept.
    """
    path = directory / f"{split}.json"
    info = {"description": "miniature world", "split": split, "number": num_scenes, "seed": seed}
    if path.is_file() and json.loads(path.read_text())["info"] == info:
        return path
    (directory / split).mkdir(parents=True, exist_ok=True)
    arguments = [(str(directory), split, index, seed) for index in range(num_scenes)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with ExitStack() as stack:
        drawn: Iterable = map(write_scene, arguments)
        if workers > 1:  # starting them takes as long as a few hundred scenes
            drawn = stack.enter_context(drawing_pool(workers)).imap(write_scene, arguments, chunksize=32)
        for image, objects in tqdm(drawn, total=num_scenes, desc=f"drawing {split}"):
            images.append(image)
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, **entry})
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "info": info,
                    "images": images,
                    "annotations": annotations,
                    "categories": categories(split, annotations),
                }
            )
        )
    return path


def write_scene(arguments: tuple[str, str, int, int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the image of a (directory, split, index, seed); return its image record and its annotations."""
    directory, split, index, seed = arguments
    scene = draw_scene(split, index, seed)
    name = f"{split}/{index:06d}.png"
    with atomic_path(Path(directory) / name) as temporary:
        Image.fromarray(scene.image).save(temporary, format="PNG", compress_level=1)
    annotations = []
    for label, mask, (x0, y0, x1, y1) in zip(scene.classes.tolist(), scene.masks, scene.boxes.tolist()):
        if not is_annotated(split, label):
            continue
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "image_id": index + 1,
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "iscrowd": 0,
            }
        )
    return image_record(split, index, name, sorted(set(scene.classes.tolist()))), annotations


def image_record(split: str, index: int, name: str, present: list[int]) -> dict[str, Any]:
    """Return LVIS's image record.

    As in LVIS, an image is verified for some categories only: a few that it does not contain (negative), and one
    that it contains may be declared as annotated incompletely (not exhaustive).
    """
    rng = np.random.default_rng([index, 7])
    absent = [i for i in range(len(NAMES)) if i not in present and is_annotated(split, i)]
    shown = [i for i in present if is_annotated(split, i)]
    loose = [shown[rng.integers(len(shown))] + 1] if shown and rng.random() < 0.05 else []
    return {
        "id": index + 1,
        "file_name": name,
        "height": SIZE,
        "width": SIZE,
        "neg_category_ids": sorted(int(i) + 1 for i in rng.choice(absent, 30, replace=False)),
        "not_exhaustive_category_ids": loose,
    }


def categories(split: str, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return LVIS's category records: "r" are the novel ones.

    Training does not know the names of novel categories either: as negatives of every region they would be unlearned.
    """
    instances = [0] * len(NAMES)
    images: list[set[int]] = [set() for _ in NAMES]
    for annotation in annotations:
        instances[annotation["category_id"] - 1] += 1
        images[annotation["category_id"] - 1].add(annotation["image_id"])
    return [
        {
            "id": i + 1,
            "name": name,
            "synonyms": [name],
            "synset": name.replace(" ", "_") + ".n.01",
            "def": f"a {name}",
            "frequency": FREQUENCIES[i],
            "instance_count": instances[i],
            "image_count": len(images[i]),
        }
        for i, name in enumerate(NAMES)
        if is_annotated(split, i)
    ]
