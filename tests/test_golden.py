"""The heart of it: a RegionSpot-BB from a file in the released layout computes the golden numbers."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from detectron2.modeling import build_model

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.structures import Prompts

from .helpers import ROOT, released_state

GOLDEN = np.load(Path(__file__).parent / "golden" / "bb224_coffee.npz")


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Everything the golden file holds, computed from a checkpoint that carries its frozen parts."""
    folder = tmp_path_factory.mktemp("golden")
    with torch.device("meta"):
        layout = build_model(load_config(ROOT / "configs/RegionSpot-BB.yaml", ["MODEL.DEVICE", "meta"]))
    torch.save({"model": released_state(layout)}, folder / "released.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(folder))
        cfg = load_config(
            ROOT / "configs/RegionSpot-BB.yaml", ["MODEL.WEIGHTS", str(folder / "released.pth"), "MODEL.DEVICE", "cpu"]
        )
        predictor = RegionSpotPredictor(cfg)
        predictor.set_image(skimage.data.coffee())
        predictions = predictor.predict(boxes=GOLDEN["boxes"], vocabulary=[str(name) for name in GOLDEN["vocabulary"]])
    recognizer, features = predictor.recognizer, predictor._features
    [located] = recognizer.locate(features, [Prompts(boxes=torch.from_numpy(GOLDEN["boxes"]))], with_masks=True)
    with torch.no_grad():
        [semantic] = recognizer.knowledge_integration([located.tokens], features.feature_map)
    return {
        "image_embedding_slice": features.embeddings[0, ::32, ::8, ::8],
        "clip_featuremap_rows": features.feature_map[0][GOLDEN["clip_rows"]],
        "text_embeddings": recognizer.classifier.embeddings,
        "mask_tokens": located.tokens,
        "low_res_masks": located.masks[:, ::4, ::4],
        "iou_predictions": predictions.iou[:, None],
        "semantic_tokens": semantic,
        "logits": predictions.logits,
        "scores": predictions.scores,
        "classes": predictions.classes,
        "mask_area": predictions.masks.sum(axis=(1, 2)),
    }


@pytest.mark.parametrize(
    "name",
    ["image_embedding_slice", "clip_featuremap_rows", "text_embeddings", "mask_tokens", "low_res_masks"]
    + ["iou_predictions", "semantic_tokens", "logits", "scores"],
)
def test_agrees_to_a_thousandth_of_the_spread(computed, name):
    expected = GOLDEN[name]
    assert computed[name].shape == expected.shape
    assert np.abs(np.asarray(computed[name]) - expected).max() <= 1e-3 * np.ptp(expected)


def test_classes_and_mask_areas_agree(computed):
    assert computed["classes"].tolist() == GOLDEN["classes"].tolist()
    np.testing.assert_allclose(computed["mask_area"], GOLDEN["mask_area"], rtol=0.005)
