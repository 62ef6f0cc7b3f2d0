"""Mask pooling: a region's own features, the same from the image, from a store, and in batches."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes
from PIL import Image

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.data.tokens import TokenStore, get_token_stages
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.export.modules import parts_of
from regionspot.modeling.attention_maps import cross_attention
from regionspot.modeling.knowledge_integration import KnowledgeIntegration
from regionspot.modeling.mask_pooling import COVERAGE_DIM, GRID, mask_coverage, pool_features
from regionspot.modeling.region_groups import RegionGroups
from regionspot.structures import Prompts

from ..helpers import as_inputs, tiny_config, tiny_model, write_dataset

POOLING = ("MODEL.REGIONSPOT.INTEGRATION.MASK_POOLING", True)


def test_coverage_of_known_masks():
    masks = torch.full((3, 64, 64), -5.0)
    masks[0, 8:16, :32] = 5  # of a 64 x 32 image: cells of 4 x 2
    masks[1, 0:2, 0:1] = 5
    coverage = mask_coverage(masks, (1.0, 0.5)).view(3, GRID, GRID)
    assert coverage[0].sum() == 2 * GRID and (coverage[0, 2:4] == 1).all()
    assert coverage[1, 0, 0] == 0.25 and coverage[1].sum() == 0.25
    assert not coverage[2].any()
    masks[2, :, 32:] = 5  # padding
    assert not mask_coverage(masks, (1.0, 0.5))[2].any()


@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("grid", [4, 7, 16, 24])
def test_pooled_features_are_means_over_masks(class_token, grid):
    feature_map = torch.randn(2, class_token + grid**2, 6)
    patches = feature_map[:, class_token:].view(2, grid, grid, 6)
    coverage = torch.zeros(4, GRID, GRID)
    coverage[0] = 1
    coverage[1, : GRID // 2], coverage[2, :, : GRID // 4] = 1, 0.5
    pooled = pool_features(coverage.flatten(1), feature_map, RegionGroups([1, 3], torch.device("cpu")))
    torch.testing.assert_close(pooled[0], patches[0].mean(dim=(0, 1)))
    half = torch.cat([torch.ones(grid // 2), torch.full((grid % 2,), 0.5), torch.zeros(grid // 2)])  # of the rows
    torch.testing.assert_close(pooled[1], (patches[1].mean(dim=1) * half[:, None]).sum(dim=0) / half.sum())
    assert pooled[3].eq(0).all()


def test_class_token_is_told_from_patches():
    assert all(math.isqrt(1 + grid**2) == grid == math.isqrt(grid**2) for grid in range(1, 100))


def test_the_mask_changes_the_logits():
    model = tiny_model(*POOLING)
    integration, inputs = model.recognizer.knowledge_integration, as_inputs(0)
    tokens = model.recognizer.position_tokens([inputs["image"]], [inputs["instances"].gt_boxes])
    feature_map = model.recognizer.vision_language.encode_images([inputs["image"]])
    assert tokens[0].shape[1] == integration.to_clip.in_features + COVERAGE_DIM
    other = tokens[0].clone()
    other[:, -COVERAGE_DIM:] = 1 - other[:, -COVERAGE_DIM:]
    with torch.no_grad():
        [one], [two] = integration(tokens, feature_map), integration([other], feature_map)
    assert (one - two).abs().max() > 1e-3
    assert cross_attention(integration, tokens[0], feature_map).shape == (len(one), 4, 4)


def test_batches_equal_single_images_with_and_without_masks():
    model = tiny_model(*POOLING)
    inputs = [as_inputs(i) for i in range(3)]
    together, alone = model(inputs), [model([x])[0] for x in inputs]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a["regions"].top_scores, b["regions"].top_scores, atol=1e-5, rtol=0)
    images, boxes = [x["image"] for x in inputs], [x["instances"].gt_boxes for x in inputs]
    for plain, masked in zip(model.recognizer(images, boxes), model.recognizer(images, boxes, masks="bitmask")):
        torch.testing.assert_close(plain.scores, masked.scores)
        assert masked.has("pred_masks") and not plain.has("pred_masks")
    assert model.recognizer(images[:1], [Boxes(torch.zeros(0, 4))])[0].scores.shape == (0,)


def test_stored_tokens_equal_the_image(tmp_path, register):
    dataset = register("test_pooling", write_dataset(tmp_path / "data", 2), tmp_path / "data" / "images")
    model = tiny_model(*POOLING, names=None)
    stages = get_token_stages(tiny_config(*POOLING))
    assert stages == ("transformer", "mask")
    extract_tokens(model.recognizer, dataset, tmp_path / "store", Extraction(stages), show_progress=False)
    store, record = TokenStore(tmp_path / "store", *stages), DatasetCatalog.get(dataset)[0]
    boxes, _ = store.regions(record["image_id"])
    stored = store.get(record["image_id"], boxes)["tokens"]
    [tokens] = model.recognizer.position_tokens([read(record)], [Boxes(boxes)])
    torch.testing.assert_close(stored, tokens, atol=2e-3, rtol=2e-3)
    extract_tokens(model.recognizer, dataset, tmp_path / "plain", Extraction(), show_progress=False)
    torch.testing.assert_close(stored[:, :-COVERAGE_DIM], TokenStore(tmp_path / "plain").get(1, boxes)["tokens"])
    assert stored.shape[1] == model.recognizer.localizer.token_dim + COVERAGE_DIM
    assert stored[:, -COVERAGE_DIM:].min() >= 0 and stored[:, -COVERAGE_DIM:].max() <= 1
    with pytest.raises(ValueError, match="has no tokens of stage 'mask'"):
        TokenStore(tmp_path / "plain", *stages)


def read(record):
    return torch.from_numpy(np.array(Image.open(record["file_name"]).convert("RGB"))).permute(2, 0, 1)


def test_stages_are_those_that_were_asked_for_in_their_order():
    recognizer, inputs = tiny_model(*POOLING).recognizer, as_inputs(0)
    features = recognizer.encode_images([inputs["image"]])
    prompts = [Prompts(boxes=inputs["instances"].gt_boxes.tensor)]
    for stages in (("mask",), ("mask", "transformer"), ("mlp", "mask")):
        assert tuple(recognizer.locate(features, prompts, stages=stages)[0].stage_tokens) == stages


def test_checkpoint_is_loaded_again(tmp_path):
    saved, loaded = tiny_model(*POOLING), tiny_model(*POOLING)
    RegionSpotCheckpointer(saved, str(tmp_path)).save("mine", is_last=False)
    for parameter in loaded.recognizer.knowledge_integration.parameters():
        torch.nn.init.normal_(parameter)
    RegionSpotCheckpointer(loaded).load(str(tmp_path / "mine.pth"))
    for key, value in saved.recognizer.state_dict().items():
        assert torch.equal(loaded.recognizer.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"pool_norm.weight is not known"):
        RegionSpotCheckpointer(tiny_model()).load(str(tmp_path / "mine.pth"))


def test_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"MASK_POOLING: expected CLIP.FEATURES other than none"):
        tiny_model(*POOLING, "MODEL.REGIONSPOT.CLIP.FEATURES", "none")
    with pytest.raises(ValueError, match="MASK_POOLING has no export form"):
        parts_of(tiny_model(*POOLING).recognizer)


def test_pre_norm_of_depth_one_is_torchs():
    sizes = {"token_dim": 8, "clip_width": 32, "text_dim": 16, "num_heads": 4, "ffn_dim": 48}
    torch.manual_seed(0)
    model = KnowledgeIntegration(**sizes, depth=2, pre_norm=True).eval()
    layer = torch.nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, norm_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(32)).eval()
    decoder.load_state_dict(model.decoder.state_dict())
    tokens, feature_map = torch.randn(5, 8), torch.randn(1, 9, 32)
    with torch.no_grad():
        expected = model.projector(decoder(model.to_clip(tokens)[None], feature_map))[0]
        torch.testing.assert_close(model([tokens], feature_map)[0], expected, atol=1e-5, rtol=1e-5)
