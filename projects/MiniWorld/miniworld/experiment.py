"""RegionSpot trained and evaluated in the miniature world, through the ordinary trainer, mapper and evaluators."""

import contextlib
import io
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from miniworld.annotate import write_split
from miniworld.categories import BASE, NAMES, NOVEL
from miniworld.generator import SIZE, Scene, draw_scene
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.config import load_config
from regionspot.data import register_json_dataset
from regionspot.data.box_jitter import jitter_boxes
from regionspot.data.tokens import get_token_stages
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.modeling import RegionRecognizer, RegionSpot
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.structures import ImageFeatures, Prompts
from regionspot.utils.files import atomic_path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG = CONFIGS / "RegionSpot-mini.yaml"
JITTER_COPIES = 3  # of each box that training draws from, with INPUT.BOX_JITTER
WEIGHTS = Path(__file__).resolve().parent / "weights"


def miniworld_config(config_file: Path, output: Path, seed: int = 0, overrides: list[str] | None = None) -> CfgNode:
    """Return a config of this project, or of another in this world, that works from any directory."""
    cfg = load_config(config_file, ["OUTPUT_DIR", str(output), "SEED", str(seed), *(overrides or [])])
    for part in (cfg.MODEL.REGIONSPOT.SAM, cfg.MODEL.REGIONSPOT.CLIP):
        for key in ("NAME", "WEIGHTS"):
            if part[key].startswith("projects/MiniWorld/miniworld/weights/"):
                part[key] = str(WEIGHTS / Path(part[key]).name)
    cfg.freeze()
    return cfg


def draw_data(root: Path, sizes: dict[str, int], workers: int) -> None:
    """Draw the splits under ``root`` and register them, in place of those of $DETECTRON2_DATASETS."""
    for split, num_scenes in sizes.items():
        path = write_split(root / "miniworld", split, num_scenes, workers=workers)
        name = f"miniworld_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_json_dataset(name, path, root / "miniworld")


def store_path(cfg: CfgNode, directory: Path, split: str) -> Path:
    """Return the directory of a split's features; one store for each choice of frozen models and features."""
    node = cfg.MODEL.REGIONSPOT
    parts = [split, *(Path(part.WEIGHTS).stem for part in (node.SAM, node.CLIP)), *get_token_stages(cfg)]
    parts.append(node.CLIP.FEATURES)
    if cfg.INPUT.BOX_JITTER:
        parts.append(f"jitter-{cfg.INPUT.BOX_JITTER}")
    return directory / "-".join(parts)


def extract(cfg: CfgNode, features: Path, split: str = "train") -> Path:
    """Extract the frozen features of a split unless they exist; return their store."""
    path = store_path(cfg, features, split)
    model = build_model(cfg).eval()
    RegionSpotCheckpointer.from_config(cfg, model).load("")
    extraction = Extraction(
        get_token_stages(cfg),
        jitter=cfg.INPUT.BOX_JITTER,
        jitter_copies=JITTER_COPIES if cfg.INPUT.BOX_JITTER else 0,
        feature_maps=True,
        batch_size=16,
    )
    while not extract_tokens(model.recognizer, f"miniworld_{split}", path, extraction):
        time.sleep(2)  # another run is writing the last shards
    return path


def train(cfg: CfgNode, features: Path) -> RegionSpot:
    """Train on the frozen features of ``miniworld_train``, which are extracted unless they exist; return the model."""
    torch.manual_seed(cfg.SEED)
    path = extract(cfg, features)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TOKEN_STORES_TRAIN = (str(path),)
    cfg.DATASETS.TEST = ()
    cfg.freeze()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer.model.eval()


def region_accuracies(recognizer: RegionRecognizer, scenes: list[Scene]) -> dict[str, float]:
    """Return accuracies of annotated boxes, of jittered ones (``jittered_...``), and the IoU of masks (``sam_iou``)."""
    results = recognize_scenes(recognizer, scenes)
    jittered = recognize_scenes(recognizer, scenes, jittered=True)
    return {**results.accuracies(), "sam_iou": float(np.mean(results.ious)), **jittered.accuracies("jittered_")}


def measure(cfg: CfgNode, model: RegionSpot, split: str, num_scenes: int) -> dict[str, float]:
    """Return ``region_accuracies`` and ``average_precision`` of a split."""
    accuracies = region_accuracies(model.recognizer, test_scenes(split, num_scenes))
    return {**accuracies, **average_precision(cfg, model, split)}


@dataclass
class RegionResults:
    """Logits or similarities of regions, on the CPU, with their classes; filled scene by scene."""

    logits: list[torch.Tensor] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    ious: list[float] = field(default_factory=list)

    def accuracies(self, prefix: str = "") -> dict[str, float]:
        """Return top-1 of all regions, top-1 and top-5 of base and of novel ones, and novel top-1 over novel names."""
        logits, targets = torch.cat(self.logits), torch.tensor(self.targets)
        result = {f"{prefix}top1": float((logits.argmax(dim=1) == targets).float().mean())}
        for group, members in (("base", BASE), ("novel", NOVEL)):
            rows = torch.isin(targets, torch.tensor(members))
            ranked = logits[rows].topk(5, dim=1).indices == targets[rows, None]
            result[f"{prefix}{group}_top1"] = float(ranked[:, 0].float().mean())
            result[f"{prefix}{group}_top5"] = float(ranked.any(dim=1).float().mean())
        rows = torch.isin(targets, torch.tensor(NOVEL))
        best = torch.tensor(NOVEL)[logits[rows][:, NOVEL].argmax(dim=1)]
        result[f"{prefix}novel_top1_novel_vocabulary"] = float((best == targets[rows]).float().mean())
        return result


def test_scenes(split: str, num_scenes: int, seed: int = 0) -> list[Scene]:
    """Return the first scenes of a split, as ``miniworld draw`` writes them."""
    return [draw_scene(split, index, seed) for index in range(num_scenes)]


def jitter(boxes: np.ndarray, rng: np.random.Generator, strength: float = 0.08) -> np.ndarray:
    """Move the sides of (N, 4) boxes by a share of their lengths, like the errors of a detector."""
    return jitter_boxes(boxes, (SIZE, SIZE), strength, rng, min_side=4).astype(np.float32)


@torch.no_grad()
def recognize_scenes(recognizer: RegionRecognizer, scenes: list[Scene], jittered: bool = False) -> RegionResults:
    """Classify the objects of scenes by their boxes, and compare the masks with the visible parts."""
    recognizer.set_vocabulary(NAMES)
    results, rng = RegionResults(), np.random.default_rng(5)
    for scene in scenes:
        boxes = jitter(scene.boxes, rng) if jittered else scene.boxes
        features, located, mask_tensor = locate_boxes(recognizer, scene, boxes)
        regions = [Boxes(torch.from_numpy(boxes))]
        embeddings = recognizer.region_embeddings([to_tensor(scene)], regions, features, [located])
        dense = recognizer.dense_embeddings(features, [located])
        logits = recognizer.score_images(embeddings, with_background=True, dense_embeddings=dense)
        results.logits += [image_logits.cpu() for image_logits in logits]
        results.targets += scene.classes.tolist()
        masks = mask_tensor.cpu().numpy()
        overlap, union = (masks & scene.masks).sum(axis=(1, 2)), (masks | scene.masks).sum(axis=(1, 2))
        results.ious += (overlap / np.maximum(union, 1)).tolist()
    return results


def locate_boxes(
    recognizer: RegionRecognizer, scene: Scene, boxes: np.ndarray, scale: int = 1
) -> tuple[ImageFeatures, LocalizerOutput, torch.Tensor]:
    """Return a scene's features and, for (N, 4) boxes, SAM's output and bool masks at ``scale`` times the size."""
    features = recognizer.encode_images([to_tensor(scene)])
    [located] = recognizer.locate(features, [Prompts(boxes=torch.from_numpy(boxes))], with_masks=True)
    assert located.masks is not None
    masks = recognizer.localizer.upsample_masks(located.masks, (SIZE, SIZE), (SIZE * scale, SIZE * scale))
    return features, located, masks


def to_tensor(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(scene.image).permute(2, 0, 1)


def write_proposals(scenes: list[Scene], path: Path) -> None:
    """Write a proposal file of a mediocre detector: jittered boxes of the objects, and as many of background."""
    rng, entries = np.random.default_rng(11), {}
    for index, scene in enumerate(scenes):
        corners = rng.uniform(0, SIZE - 45, (len(scene.boxes), 2))
        background = np.concatenate([corners, corners + rng.uniform(20, 45, corners.shape)], axis=1)
        boxes = np.concatenate([jitter(scene.boxes, rng), background])
        scores = np.concatenate([rng.uniform(0.5, 1, len(scene.boxes)), rng.uniform(0, 0.6, len(background))])
        entries[str(index + 1)] = {"boxes": boxes.round(2).tolist(), "scores": scores.round(4).tolist()}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries))


def average_precision(cfg: CfgNode, model: RegionSpot, split: str, proposals: Path | None = None) -> dict[str, float]:
    """Return LVIS's AP, APr, APc, APf and mask_AP of a split, by the ordinary evaluation, which leaves its files.

    They are in ``OUTPUT_DIR/inference``, and those of a proposal file in a directory of its name beside it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if proposals:
        cfg.OUTPUT_DIR = str(proposals.with_suffix(""))
    cfg.DATASETS.TEST = (f"miniworld_{split}",)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(proposals),) if proposals else ()
    cfg.freeze()
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # lvis prints all its numbers
        metrics: dict[str, Any] = RegionSpotTrainer.test(cfg, model)
    result = {key: float(metrics["bbox"][key]) for key in ("AP", "APr", "APc", "APf")}
    return {**result, "mask_AP": float(metrics["segm"]["AP"])}
