"""Tiny data sets in the official formats, ids and directory trees: what a user's downloads look like.

Nothing here is read by the code that is tested: paths and ids are written down as the data sets' authors have them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from PIL import Image
from pycocotools import mask as mask_api

from miniworld.annotate import categories as miniworld_categories
from miniworld.annotate import write_scene
from regionspot_cli.prepare import PREPARE

from .helpers import draw_scene

ANNOTATIONS = "annotations_without_background.json"
VOC_NAMES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
# ODinW: directory of the validation images, directory of the training images, class names.
ODINW = {
    "AerialMaritimeDrone": ("large/valid", "large/train", ["boat", "car", "dock", "jetski", "lift"]),
    "Aquarium": (
        "Aquarium Combined.v2-raw-1024.coco/valid",
        "Aquarium Combined.v2-raw-1024.coco/train",
        ["fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"],
    ),
    "CottontailRabbits": ("valid", "train", ["Cottontail-Rabbit"]),
    "EgoHands": ("generic/mini_val", "generic/train", ["hand"]),
    "NorthAmericaMushrooms": (
        "North American Mushrooms.v1-416x416.coco/valid",
        "North American Mushrooms.v1-416x416.coco/train",
        ["CoW", "chanterelle"],
    ),
    "Packages": ("Raw/valid", "Raw/train", ["package"]),
    "PascalVOC": ("valid", "train", VOC_NAMES),
    "Raccoon": ("Raccoon.v2-raw.coco/valid", "Raccoon.v2-raw.coco/train", ["raccoon"]),
    "ShellfishOpenImages": ("raw/valid", "raw/train", ["Crab", "Lobster", "Shrimp"]),
    "VehiclesOpenImages": ("416x416/mini_val", "416x416/train", ["Ambulance", "Bus", "Car", "Motorcycle", "Truck"]),
    "pistols": ("export", "export", ["pistol"]),
    "pothole": ("valid", "train", ["pothole"]),
    "thermalDogsAndPeople": ("valid", "train", ["dog", "person"]),
}
ODD_NAMES = (
    "IMG_2274_jpeg_jpg.rf.2f319e949748145fb22dcb52bb325a0c.jpg",
    "photo (1) of #3 & more.jpg",
    "Ünïcode näme – ½.jpeg",
    "it's 100% [odd]; really, yes.JPG",
)
V3DET_NAMES = ["bird's-foot trefoil", 'sign, "STOP"', "mouse (rodent)", "mouse (computer)", "Škoda, car", "[unknown]"]
OBJECTS365_NAMES = ["Person", "Cabinet/shelf", "Pen/Pencil", "Gas stove", "Extractor/Range hood", "Trash bin Can"]


@dataclass
class OfficialTrees:
    """Directory trees below a root that ``$DETECTRON2_DATASETS`` may name.

    Attributes:
        root: of the trees.
        files: for each registered name its annotation file and the directory that its ``file_name`` is relative to;
            a file of one's own has "annotations.json:directory" for a name.
        images: for each such name and image id the path of the image.
    """

    root: Path
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    images: dict[str, dict[int, Path]] = field(default_factory=dict)
    scenes: count = field(default_factory=count)

    def save(self, path: Path, names: Sequence[str]) -> Path:
        """Write where the named data sets lie, for ``load`` in another process."""
        images = {name: {i: str(p) for i, p in self.images[name].items()} for name in names}
        path.write_text(json.dumps([str(self.root), {n: list(map(str, self.files[n])) for n in names}, images]))
        return path

    @classmethod
    def load(cls, path: str) -> "OfficialTrees":
        root, files, images = json.loads(Path(path).read_text())
        paths = {name: {int(i): Path(p) for i, p in part.items()} for name, part in images.items()}
        return cls(Path(root), {name: (Path(a), Path(b)) for name, (a, b) in files.items()}, paths)

    def draw(self, path: Path) -> tuple[int, int, np.ndarray]:
        """Write the next scene, each of another size; return height, width and boxes (N, 4) XYXY."""
        index = next(self.scenes)
        size = (48 + index % 7, 64 + index % 11)
        image, boxes, _ = draw_scene(index, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, "JPEG")
        boxes += np.random.default_rng(index).uniform(0, 1, (len(boxes), 1)).astype(np.float32)  # no whole pixels
        return *size, boxes.clip(0, [size[1], size[0], size[1], size[0]])

    def add(self, name, json_file, image_root, paths, categories, **options):
        """Write a data set; ``paths`` are those of its images on the disk, below ``image_root``.

        Options: ``file_name(path)``, the image's entry in the file (None: by its ``coco_url``); ``masks``: polygons;
        ``crowd``: an RLE beside the first image's boxes; ``lvis``: what LVIS's images have; ``extra``: of annotations.
        """
        first, images, annotations, paths_by_id = 1000 * (len(self.files) + 1), [], [], {}
        labels = class_order(len(categories))
        for image_id, path in enumerate(paths, first):
            height, width, boxes = self.draw(image_root / path)
            paths_by_id[image_id] = image_root / path
            image = {"id": image_id, "height": height, "width": width}
            if options.get("file_name", str) is None:
                image["coco_url"] = f"http://images.cocodataset.org/{path}"
            else:
                image["file_name"] = options.get("file_name", str)(path)
            chosen = [categories[next(labels)] for _ in boxes]
            for box, category in zip(boxes.tolist(), chosen):
                entry = {"id": len(annotations) + first, "image_id": image_id, "category_id": category["id"]}
                annotations.append({**entry, **shape_of(box, options.get("masks")), **options.get("extra", {})})
            if options.get("lvis"):
                absent = [c["id"] for c in categories[:50] if c not in chosen]
                image |= {"neg_category_ids": absent[:20], "not_exhaustive_category_ids": [chosen[0]["id"]]}
            images.append(image)
        if options.get("crowd"):
            annotations.append(crowd_of(images[0], len(annotations) + first, categories[0]["id"]))
        self.write(name, json_file, image_root, images, annotations, categories, paths_by_id)

    def write(self, name, json_file, image_root, images, annotations, categories, paths):
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content))
        self.files[name], self.images[name] = (json_file, image_root), paths


def class_order(number):
    """Yield the first class, the last and some between, over and over."""
    some = [0, number - 1, number // 2, 1 % number, number // 3]
    while True:
        yield from dict.fromkeys(some)


def shape_of(box, masks):
    x0, y0, x1, y1 = box
    shape = {"bbox": [round(x, 2) for x in (x0, y0, x1 - x0, y1 - y0)], "area": (x1 - x0) * (y1 - y0)}
    if masks:  # a diamond
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        shape |= {"segmentation": [[x, y0, x1, y, x, y1, x0, y]], "area": (x1 - x0) * (y1 - y0) / 2}
    return shape


def crowd_of(image, number, category_id):
    """COCO's crowds have uncompressed RLE."""
    height, width = image["height"], image["width"]
    rle = {"size": [height, width], "counts": [height, 5 * height, height * (width - 6)]}
    entry = {"id": number, "image_id": image["id"], "category_id": category_id, "iscrowd": 1}
    return {**entry, "bbox": [1, 0, 5, height], "area": 5 * height, "segmentation": rle}


def write_official_trees(root: Path) -> OfficialTrees:
    """Write every data set that the project or Detectron2 registers for it, a few images each."""
    trees = OfficialTrees(root)
    write_coco_and_lvis(trees)
    write_objects365(trees)
    write_v3det(trees)
    write_openimages(trees)
    write_odinw(trees)
    write_miniworld(trees)
    return trees


def write_coco_and_lvis(trees):
    coco, lvis = trees.root / "coco", trees.root / "lvis"
    things = [{"id": c["id"], "name": c["name"], "supercategory": "x"} for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "val"):
        paths = [f"{split}2017/{index:012d}.jpg" for index in (139, 285, 632)]
        json_file, options = coco / f"annotations/instances_{split}2017.json", {"masks": True, "extra": {"iscrowd": 0}}
        inside = [Path(path).name for path in paths]
        trees.add(f"coco_2017_{split}", json_file, coco / f"{split}2017", inside, things, crowd=True, **options)
        # LVIS v1's validation images are in both of COCO's directories
        paths = [f"{split}2017/{index:012d}.jpg" for index in (397133, 37777, 252219)]
        paths += [f"train2017/{index:012d}.jpg" for index in (15335, 23751)] if split == "val" else []
        entries = [{**c, "image_count": 1, "instance_count": 1} for c in LVIS_CATEGORIES]
        options = {"masks": True, "lvis": True, "file_name": None}
        trees.add(f"lvis_v1_{split}", lvis / f"lvis_v1_{split}.json", coco, paths, entries, **options)
    PREPARE["lvis_minival"].call("--root", str(trees.root))
    trees.files["lvis_v1_minival"] = (lvis / "lvis_v1_minival.json", coco)
    trees.images["lvis_v1_minival"] = trees.images["lvis_v1_val"]


def write_objects365(trees):
    names = OBJECTS365_NAMES + [f"Object {index}" for index in range(7, 366)]
    categories = [{"id": index, "name": name} for index, name in enumerate(names, 1)]
    extra = {"iscrowd": 0, "isfake": 0, "isreflected": 0}
    for split in ("train", "val"):
        directory = trees.root / "objects365"
        paths = [f"obj365_{split}_{index:012d}.jpg" for index in (86, 1013)]
        json_file = directory / f"objects365_{split}.json"
        trees.add(f"objects365_v1_{split}", json_file, directory / split, paths, categories, extra=extra)
        directory = trees.root / "objects365_v2"
        paths = [f"patch{index}/objects365_v{1 + index // 16}_{split}{index:08d}.jpg" for index in (8, 43)]
        json_file = directory / f"zhiyuan_objv2_{split}.json"
        file_name = "images/v1/{}".format
        name = f"objects365_v2_{split}"
        trees.add(name, json_file, directory / split, paths, categories, extra=extra, file_name=file_name)


def write_v3det(trees):
    directory = trees.root / "v3det"
    names = [f"kind {index}" for index in range(13204)]
    for place, name in zip((0, 1, 4401, 6602, 8000, 13203), V3DET_NAMES):
        names[place] = name
    categories = [{"id": index, "name": name, "cat_info": "", "novel": False} for index, name in enumerate(names, 1)]
    for split in ("train", "val"):
        paths = [f"images/n0{index}/{index}_{split}_a45.jpg" for index in (1440764, 7749)]
        json_file = directory / f"v3det_2023_v1_{split}.json"
        trees.add(f"v3det_{split}", json_file, directory, paths, categories, extra={"iscrowd": 0})


def write_openimages(trees):
    """The official CSVs, and what prepare_openimages.py makes of them."""
    directory = trees.root / "openimages"
    directory.mkdir()
    labels = {f"/m/0{index:04x}": f"Thing {index}" for index in range(601)}
    labels |= {"/m/00000": 'Bow, and "arrow"', "/m/00258": "Zucchini"}
    lines = [f'{key},"{name.replace(chr(34), 2 * chr(34))}"' for key, name in labels.items()]
    (directory / "class-descriptions-boxable.csv").write_text("\n".join(lines) + "\n")
    for split, csv, image_directory in (
        ("train", "oidv6-train-annotations-bbox.csv", "train"),
        ("val", "validation-annotations-bbox.csv", "validation"),
    ):
        names = ["000595fe6fee6369", "ffffe7bd6bd9ba3b"]  # ids follow their order
        rows = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"]
        order = class_order(601)
        for name in names:
            height, width, boxes = trees.draw(directory / image_directory / f"{name}.jpg")
            for x0, y0, x1, y1 in boxes:
                sides = f"{x0 / width:.6f},{x1 / width:.6f},{y0 / height:.6f},{y1 / height:.6f}"
                rows.append(f"{name},xclick,{list(labels)[next(order)]},1,{sides},0,0,0,0")
            rows.append(f"{name},xclick,/m/00003,1,0,1,0,1,0,0,1,0")  # a group
        (directory / csv).write_text("\n".join(rows) + "\n")
        trees.files[f"openimages_v6_{split}"] = (directory / f"openimages_v6_{split}.json", directory / image_directory)
        trees.images[f"openimages_v6_{split}"] = {
            index: directory / image_directory / f"{name}.jpg" for index, name in enumerate(names, 1)
        }
    PREPARE["openimages"].call("--root", str(trees.root), "--workers", "1")


def write_odinw(trees):
    """ANNOTATIONS for all but Aquarium, which comes as Roboflow exports it, with a background that has id 0.

    PascalVOC has no images for testing.
    """
    for name, (valid, train, classes) in ODINW.items():
        categories = [{"id": index, "name": c, "supercategory": "all"} for index, c in enumerate(classes, 1)]
        tested = valid if valid == "export" else str(Path(valid).parent / "test")
        splits = {"val": valid, "train": train, "test": tested}
        if name == "PascalVOC":
            del splits["test"]
        for split, relative in splits.items():
            directory = trees.root / "odinw" / name / relative
            json_file = directory / (f"{split}_{ANNOTATIONS}" if name == "pistols" else ANNOTATIONS)
            paths = [f"{split} {path}" for path in ODD_NAMES[len(name) % 2 :: 2]]
            extra = {"iscrowd": 0, "segmentation": []}
            trees.add(f"odinw_{name}_{split}", json_file, directory, paths, categories, extra=extra)
            if name == "Aquarium":
                content = json.loads(json_file.read_text())
                content["categories"].insert(0, {"id": 0, "name": "all", "supercategory": "none"})
                json_file.unlink()
                (directory / "_annotations.coco.json").write_text(json.dumps(content))
    for listing in (trees.files, trees.images):
        listing["odinw_PascalVOC_test"] = listing["odinw_PascalVOC_val"]
    PREPARE["odinw"].call("--root", str(trees.root))


def write_miniworld(trees):
    directory = trees.root / "miniworld"
    for split in ("train", "val", "test"):
        (directory / split).mkdir(parents=True)
        scenes = [write_scene((str(directory), split, index, 0)) for index in range(2)]
        images = [image for image, _ in scenes]
        annotations = [{"id": i, **entry} for i, entry in enumerate((a for _, part in scenes for a in part), 1)]
        paths = {image["id"]: directory / image["file_name"] for image in images}
        classes = miniworld_categories(split, annotations)
        trees.write(f"miniworld_{split}", directory / f"{split}.json", directory, images, annotations, classes, paths)


class Truth:
    """What is annotated in the images of ``OfficialTrees``, by name, straight from the JSON."""

    def __init__(self, trees: OfficialTrees) -> None:
        self.boxes: dict[str, np.ndarray] = {}
        self.names: dict[str, list[set[str]]] = {}
        self.masks: dict[str, list[dict | None]] = {}
        self.others: dict[str, list[set[str]]] = {}  # for each another class of the same data set, if there is one
        for name, (json_file, _) in trees.files.items():
            self._read(json.loads(json_file.read_text()), trees.images[name])

    def _read(self, content, paths):
        categories = {c["id"]: c for c in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        present = sorted({annotation["category_id"] for annotation in content["annotations"]})
        following = dict(zip(present, present[1:] + present[:1]))
        for image_id, image in images.items():
            kept = [a for a in content["annotations"] if a["image_id"] == image_id and not a.get("iscrowd", 0)]
            path = str(paths[image_id].resolve())
            boxes = np.array([a["bbox"] for a in kept], float)
            self.boxes[path] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            self.names[path] = [self.known_as(categories[a["category_id"]]) for a in kept]
            others = [categories[following[a["category_id"]]] for a in kept]
            self.others[path] = [self.known_as(category) for category in others]
            self.masks[path] = [as_rle(a.get("segmentation"), image["height"], image["width"]) for a in kept]

    @staticmethod
    def known_as(category):
        """LVIS's "bull" is called "horned_cow", its first synonym, in Detectron2's metadata."""
        return {category["name"], *category.get("synonyms", [])[:1]}

    def annotations_of(self, file_name: str, boxes: np.ndarray) -> list[int]:
        """Return which annotation of an image each (N, 4) XYXY box is."""
        distances = np.abs(boxes[:, None] - self.boxes[str(Path(file_name).resolve())][None]).max(axis=2)
        assert len(boxes) == 0 or distances.min(axis=1).max() < 0.01, "boxes that nobody annotated"
        return distances.argmin(axis=1).tolist()


def as_rle(segmentation, height, width):
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    return {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else counts}
