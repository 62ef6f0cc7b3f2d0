"""Masks of regions: as SAM gives them, each region's once, and never more of them than are asked for."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes
from pycocotools import mask as mask_api
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

from regionspot.modeling import masks as masks_module
from regionspot.modeling.masks import RegionMasks
from regionspot.utils.rle import encode_masks

from ..helpers import as_inputs, extra_memory, tiny_model
from ..peak_memory import PeakMemory

SIZE = (60, 100)


@pytest.fixture(scope="module")
def localizer():
    return tiny_model(names=None).recognizer.localizer


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.nn.functional.interpolate(torch.randn(5, 1, 6, 6), (32, 32), mode="bicubic")[:, 0]


def expected_masks(localizer, logits, size):
    sam = localizer.sam
    return sam.postprocess_masks(logits[:, None], localizer.input_size(SIZE), size)[:, 0] > sam.mask_threshold


@pytest.mark.parametrize("max_pixels", [1, 3 * 60 * 100, 1 << 25])
@pytest.mark.parametrize("size", [SIZE, (31, 47)])
def test_every_form_is_as_sam_gives_it(localizer, logits, size, max_pixels, monkeypatch):
    monkeypatch.setattr(masks_module, "MAX_PIXELS", max_pixels)
    expected = expected_masks(localizer, logits, size)
    assert torch.equal(localizer.upsample_masks(logits, SIZE, size), expected)
    rows = torch.tensor([3, 0, 0, 4, 3])
    masks = RegionMasks(logits, rows, localizer.mask_upsampler(SIZE))
    assert torch.equal(masks.to_bitmasks(None, *size).tensor, expected[rows])
    assert torch.equal(masks[1].to_bitmasks(None, *size).tensor, expected[:1])
    rles = masks.to_rles(*size)
    assert np.array_equal(mask_api.decode(list(rles)).transpose(2, 0, 1), expected[rows].numpy())
    assert rles[0] is rles[4] and rles[1] is rles[2]
    boxes = masks.bounding_boxes(*size)
    assert torch.equal(boxes.tensor, BitMasks(expected[rows]).get_bounding_boxes().tensor)


@pytest.mark.parametrize("pixels", [1, 1 << 19])
@pytest.mark.parametrize("size", [SIZE, (31, 47), (130, 200)])
def test_masks_are_measured_as_segment_anything_does(localizer, logits, size, pixels, monkeypatch):
    monkeypatch.setattr(masks_module, "BAND_PIXELS", pixels)
    logits = logits - logits.flatten(1).quantile(0.98, dim=1)[:, None, None]  # a peak of each is inside
    logits = torch.cat([logits, -torch.ones(1, 32, 32)])  # the last one is empty
    full = localizer.sam.postprocess_masks(logits[:, None], localizer.input_size(SIZE), size)[:, 0]
    upsampler = localizer.mask_upsampler(SIZE)
    boxes, stability = upsampler.measure(logits, upsampler.resizer(logits, size), 0.3)
    expected = batched_mask_to_box(full > 0).float()  # its boxes end at the last pixel inside
    expected[:-1, 2:] += 1
    assert torch.equal(boxes, expected) and not boxes[-1].any()
    assert len(boxes.unique(dim=0)) > 3
    torch.testing.assert_close(stability, calculate_stability_score(full, 0.0, 0.3), equal_nan=True)
    assert upsampler.measure(logits, upsampler.resizer(logits, size))[1] is None


def test_no_masks_have_every_form(localizer, logits):
    masks = RegionMasks(logits[:0], torch.zeros(0, dtype=torch.int64), localizer.mask_upsampler(SIZE))
    assert masks.to_bitmasks(None, *SIZE).tensor.shape == (0, *SIZE) and masks.to_rles(*SIZE) == []
    assert masks.bounding_boxes(*SIZE).tensor.shape == (0, 4)
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_masks_are_indexed_by_any_integer(localizer, logits):
    masks = RegionMasks(logits, torch.arange(5), localizer.mask_upsampler(SIZE))
    expected = masks[3:4].to_bitmasks(None, *SIZE).tensor
    for index in (3, np.int64(3), [3], torch.tensor([3])):
        assert torch.equal(masks[index].to_bitmasks(None, *SIZE).tensor, expected)


def test_pickled_masks_do_not_hold_the_model(localizer, logits):
    masks = RegionMasks(logits, torch.arange(5), localizer.mask_upsampler(SIZE))
    content = pickle.dumps(masks)
    assert len(content) < logits.numel() * 4 + 5000
    again = pickle.loads(content)
    assert torch.equal(again.to_bitmasks(None, *SIZE).tensor, masks.to_bitmasks(None, *SIZE).tensor)


def test_memory_follows_the_requested_masks(localizer, logits, monkeypatch):
    size, number = (1000, 1500), 24  # 36 MB as bool masks, 144 MB as floats
    monkeypatch.setattr(masks_module, "MAX_PIXELS", 2 * size[0] * size[1])
    masks = RegionMasks(logits[torch.arange(number) % 5], torch.arange(number), localizer.mask_upsampler(size))
    assert extra_memory(lambda: masks[:4].to_rles(*size)) < 30e6
    assert extra_memory(lambda: masks.bounding_boxes(*size)) < 30e6
    assert extra_memory(lambda: masks.to_bitmasks(None, *size)) < 60e6
    prompts = torch.ones(number, *size, dtype=torch.bool)
    assert extra_memory(lambda: localizer.mask_prompts(prompts, size)) < 50e6


def test_mask_prompts_of_small_images_are_made_in_chunks(localizer, monkeypatch):
    """They are resized to SAM's input, 64 x 64 here, which is larger than the image."""
    monkeypatch.setattr(masks_module, "MAX_PIXELS", 4 * 64 * 64)
    masks = torch.ones(200, 8, 8, dtype=torch.bool)
    with PeakMemory() as memory:
        prompts = localizer.mask_prompts(masks, (8, 8))
    assert prompts.shape == (200, 1, 32, 32) and memory.peak < 200 * 64 * 64 * 4


def test_detections_of_a_box_share_one_rle():
    model = tiny_model("MODEL.MASK_ON", True)
    inputs = {**as_inputs(0), "height": 96, "width": 128}
    bitmasks = model([inputs])[0]["instances"]
    model.masks = "rle"
    detections = model([inputs])[0]["instances"]
    assert not detections.has("pred_masks") and len(detections) == len(bitmasks)
    for mask, rle in zip(bitmasks.pred_masks, detections.pred_masks_rle):
        assert np.array_equal(mask_api.decode({**rle, "counts": rle["counts"].encode()}), mask.numpy())
    best = detections[detections.scores > detections.scores.median()]
    assert [id(rle) for rle in best.pred_masks_rle] == [id(rle) for rle in detections.pred_masks_rle[: len(best)]]
    number = len({id(rle) for rle in detections.pred_masks_rle})
    assert number == len(inputs["instances"]) < len(detections)


def test_lazy_masks():
    """As in ``GeneralizedRCNN``: its ``inference(..., do_postprocess=False)`` keeps them lazy."""
    model = tiny_model("MODEL.MASK_ON", True).recognizer
    inputs = as_inputs(0)
    [lazy] = model([inputs["image"]], [Boxes(inputs["instances"].gt_boxes.tensor)], masks="lazy")
    [full] = model([inputs["image"]], [Boxes(inputs["instances"].gt_boxes.tensor)], masks="bitmask")
    assert isinstance(lazy.pred_masks, RegionMasks)
    assert torch.equal(lazy[2:5].pred_masks.to_bitmasks(None, 48, 64).tensor, full.pred_masks[2:5])
