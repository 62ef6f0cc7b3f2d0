"""Extracting frozen features of a data set into a token store."""

from pathlib import Path

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from regionspot.data.build import build_test_loader
from regionspot.data.token_store import TokenStore
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import Prompts
from regionspot.weights import fingerprint


def token_origin(recognizer: RegionRecognizer, dataset_name: str) -> dict[str, str]:
    """Return what features of a data set by ``recognizer`` depend on."""
    return {
        "data set": dataset_name,
        "SAM": fingerprint(recognizer.localizer.sam.state_dict()),
        "CLIP": fingerprint(recognizer.vision_language.clip_model.visual.state_dict()),
        "token stage": f"{recognizer.localizer.token_stage}, multimask {recognizer.localizer.multimask}",
        "CLIP features": recognizer.vision_language.features,
    }


@torch.no_grad()
def extract_features(cfg: CfgNode, recognizer: RegionRecognizer, dataset_name: str, path: Path) -> None:
    """Write tokens and feature maps of all annotated boxes of a data set; images without boxes are left out.

    A file that is there and of the same frozen parts is kept.
    """
    origin = token_origin(recognizer, dataset_name)
    if path.is_file():
        try:
            TokenStore(path, origin)
            return
        except ValueError:
            pass  # of other parts, or damaged: written anew
    images = []
    loader = build_test_loader(cfg, dataset_name, batch_size=16)
    for batch in tqdm(loader, desc=f"extracting {dataset_name}", unit="batch"):
        kept = [inputs for inputs in batch if len(inputs["instances"])]
        if not kept:
            continue
        features = recognizer.encode_images([inputs["image"] for inputs in kept])
        boxes = [inputs["instances"].gt_boxes.tensor for inputs in kept]
        located = recognizer.locate(features, [Prompts(boxes=image_boxes) for image_boxes in boxes])
        for i, inputs in enumerate(kept):
            feature_map = None if features.feature_map is None else features.feature_map[i].half().cpu()
            entry = {"image_id": inputs["image_id"], "boxes": boxes[i], "tokens": located[i].tokens.half().cpu()}
            images.append({**entry, "feature_map": feature_map})
    TokenStore.write(path, images, origin)
