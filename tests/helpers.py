"""What several tests need: tiny models, drawn images, a generated data set, deterministic weights."""

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from regionspot.checkpoint.key_layout import to_released_key
from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer, RegionSpot
from tools.benchmarks.memory import process_memory, reset_peak

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).with_name("tiny.yaml")
NAMES = ["red square", "green disc", "blue square", "white disc"]
COLORS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220], [240, 240, 240]])


def tiny_config(*overrides: object) -> CfgNode:
    return load_config(TINY, list(overrides))


@functools.cache
def _plain_model() -> tuple[RegionSpot, torch.Tensor]:
    """Return the tiny model without overrides or names, and the state of the random generator after its weights."""
    torch.manual_seed(0)
    return build_model(tiny_config()).eval(), torch.get_rng_state()


def tiny_model(*overrides: object, names: list[str] | None = NAMES) -> RegionSpot:
    if overrides:
        torch.manual_seed(0)
        model = build_model(tiny_config(*overrides)).eval()
    else:  # copied, in a third of the time
        original, random_state = _plain_model()
        model = copy.deepcopy(original)
        torch.set_rng_state(random_state)
    if names:
        model.set_vocabulary(names)
    return model


@torch.no_grad()
def spread_tokens(recognizer: RegionRecognizer, inputs: dict) -> None:
    """Let a model with random weights tell the regions of ``inputs`` apart: without this one name is best for all."""
    integration, images = recognizer.knowledge_integration, [inputs["image"]]
    tokens = recognizer.position_tokens(images, [inputs["instances"].gt_boxes])
    [semantic] = integration(tokens, recognizer.vision_language.encode_images(images))
    integration.projector.bias -= semantic.mean(dim=0)


def deterministic_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden numbers' weights: drawn from a generator that the released key (without "model.") seeds."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if key.endswith("logit_scale"):
        return np.full(shape, np.log(100.0), dtype=np.float32)
    if len(shape) == 1 and key.endswith("weight"):
        return 1 + 0.1 * values
    if len(shape) == 1 or key.endswith("bias"):
        return 0.02 * values
    if len(shape) > 1 and "positional_encoding_gaussian_matrix" not in key:
        values /= np.sqrt(np.prod(shape[1:]), dtype=np.float32)  # in place: no copies of a gigabyte of weights
    return values


def released_state(model: RegionSpot, parts: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """Return deterministic weights for ``model`` in the released key layout."""
    state = {}
    for key, value in model.recognizer.state_dict().items():
        released = to_released_key(key)
        if value.is_floating_point() and released.removeprefix("model.").startswith(parts):
            state[released] = torch.from_numpy(deterministic_array(released.removeprefix("model."), tuple(value.shape)))
    return state


def draw_scene(index: int, size: tuple[int, int] = (48, 64)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw 2 to 4 objects; return image (H, W, 3) uint8, boxes (N, 4) XYXY and classes (N,) into ``NAMES``."""
    rng = np.random.default_rng(index)
    height, width = size
    image = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
    boxes, classes = [], []
    for column in rng.permutation(4)[: rng.integers(2, 5)]:
        side = int(rng.integers(8, min(14, width // 4)))
        x = int(column * width // 4 + rng.integers(0, width // 4 - side + 1))
        y = int(rng.integers(0, height - side))
        label = int(rng.integers(4))
        rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
        inside = np.ones((side, side), bool) if label % 2 == 0 else rows**2 + columns**2 <= (side / 2) ** 2
        image[y : y + side, x : x + side][inside] = COLORS[label]
        boxes.append([x, y, x + side, y + side])
        classes.append(label)
    return image, np.array(boxes, np.float32), np.array(classes)


def as_inputs(index: int, size: tuple[int, int] = (48, 64), num_objects: int | None = None) -> dict:
    """Return a drawn scene as Detectron2's model input."""
    image, boxes, classes = draw_scene(index, size)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes[:num_objects]))
    instances.gt_classes = torch.from_numpy(classes[:num_objects])
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "height": size[0],
        "width": size[1],
        "instances": instances,
        "file_name": f"scene {index}",
    }


def write_dataset(
    directory: Path,
    num_scenes: int = 8,
    category_ids: tuple[int, ...] = (3, 1, 10, 7),
    names: list[str] = NAMES,
    first: int = 0,
) -> Path:
    """Write drawn scenes as a data set in LVIS format; return the annotation file.

    Args:
        directory: the data set's.
        num_scenes: number of scenes.
        category_ids: of the four classes, in the order of ``NAMES``; by default with gaps.
        names: what the four classes are called.
        first: index of the first scene.
    """
    (directory / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(num_scenes):
        image, boxes, classes = draw_scene(first + index)
        Image.fromarray(image).save(directory / "images" / f"{index}.png")
        present = sorted({category_ids[label] for label in classes})
        images.append(
            {
                "id": index + 1,
                "file_name": f"{index}.png",
                "height": image.shape[0],
                "width": image.shape[1],
                "neg_category_ids": [i for i in category_ids if i not in present],
                "not_exhaustive_category_ids": [],
            }
        )
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), classes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": i, "name": name, "frequency": "rcff"[k], "image_count": 1, "instance_count": 1}
        for k, (i, name) in enumerate(zip(category_ids, names))
    ]
    path = directory / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_frozen_parts(recognizer: RegionRecognizer, directory: Path) -> None:
    """Write SAM's and CLIP's weights as files, so that several processes have the same."""
    torch.save(recognizer.localizer.sam.state_dict(), directory / "sam.pth")
    torch.save(recognizer.vision_language.clip_model.state_dict(), directory / "clip.pth")


def write_user_files(directory: Path, *overrides: object) -> RegionSpot:
    """Write a user's my.json, my_val.json, my_images and the frozen weights of a model without names; return it."""
    model = tiny_model(*overrides, names=None)
    write_frozen_parts(model.recognizer, directory)
    path = write_dataset(directory / "data")
    (directory / "data" / "images").rename(directory / "my_images")
    content = json.loads(path.read_text())
    (directory / "my.json").write_text(path.read_text())
    for category in content["categories"]:
        del category["frequency"]  # COCO's format
    (directory / "my_val.json").write_text(json.dumps(content))
    return model


def frozen_overrides(directory: Path) -> list[str]:
    """Return the config overrides that name what ``write_frozen_parts`` wrote."""
    files = {"SAM": directory / "sam.pth", "CLIP": directory / "clip.pth"}
    return [part for name, path in files.items() for part in (f"MODEL.REGIONSPOT.{name}.WEIGHTS", str(path))]


def flat(node: object, prefix: str = "") -> dict:
    """Return a config's values under their whole names."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {name: value for key in node for name, value in flat(node[key], f"{prefix}.{key}".strip(".")).items()}


def load_program(path: Path) -> ModuleType:
    """Return a program as a module of a name of its own: there is a train_net.py in tools/ and in each project."""
    name = f"{path.parent.name}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # processes that it starts look for its functions there
    spec.loader.exec_module(module)
    return module


def run(directory: Path, *command: object) -> str:
    """Run a program in ``directory``, with one thread, and return what it says; it must succeed."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=directory,
        env=env,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def extra_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes this process grows, at the most, while ``call`` runs a second time (Linux)."""
    call()  # what is set up once does not count
    before = reset_peak()
    call()
    return process_memory("VmHWM") - before
