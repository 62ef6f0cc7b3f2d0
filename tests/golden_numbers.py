"""The golden numbers: what a RegionSpot-BB of deterministic weights must compute for one image, on any device."""

from pathlib import Path

import numpy as np
import skimage.data
import torch
from detectron2.modeling import build_model

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.structures import Prompts

from .helpers import ROOT, released_state

EXPECTED = np.load(Path(__file__).parent / "golden" / "bb224_coffee.npz")
CONFIG = ROOT / "configs" / "RegionSpot-BB.yaml"
# Those that agree to a thousandth of their spread; classes and mask areas beside them.
NAMES = ["image_embedding_slice", "clip_featuremap_rows", "text_embeddings", "mask_tokens", "low_res_masks"]
NAMES += ["iou_predictions", "semantic_tokens", "logits", "scores"]


@torch.no_grad()
def compute(directory: Path, device: str) -> dict[str, np.ndarray]:
    """Return everything that the golden file holds, computed from a checkpoint that carries its frozen parts.

    Args:
        directory: for the checkpoint, 700 MB.
        device: to compute on.
    """
    path = directory / "released.pth"
    with torch.device("meta"):
        layout = build_model(load_config(CONFIG, ["MODEL.DEVICE", "meta"]))
    torch.save({"model": released_state(layout)}, path)
    predictor = RegionSpotPredictor(load_config(CONFIG, ["MODEL.WEIGHTS", str(path), "MODEL.DEVICE", device]))
    predictor.set_image(skimage.data.coffee())
    predictions = predictor.predict(boxes=EXPECTED["boxes"], vocabulary=[str(x) for x in EXPECTED["vocabulary"]])
    recognizer, features = predictor.recognizer, predictor._features
    [located] = recognizer.locate(features, [Prompts(boxes=torch.from_numpy(EXPECTED["boxes"]))], with_masks=True)
    [semantic] = recognizer.knowledge_integration([located.tokens], features.feature_map)
    tensors = {
        "image_embedding_slice": features.embeddings[0, ::32, ::8, ::8],
        "clip_featuremap_rows": features.feature_map[0][EXPECTED["clip_rows"]],
        "text_embeddings": recognizer.classifier.embeddings,
        "mask_tokens": located.tokens,
        "low_res_masks": located.masks[:, ::4, ::4],
        "semantic_tokens": semantic,
    }
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()} | {
        "iou_predictions": predictions.predicted_ious[:, None],
        "logits": predictions.logits,
        "scores": predictions.scores,
        "classes": predictions.classes,
        "mask_area": predictions.masks.sum(axis=(1, 2)),
    }


def largest_error(computed: dict[str, np.ndarray]) -> float:
    """Return the largest error of ``NAMES``, each in its own spread."""
    return max(float(np.abs(computed[name] - EXPECTED[name]).max() / np.ptp(EXPECTED[name])) for name in NAMES)
