"""Damaged RLEs are told from masks."""

import random

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch

from regionspot.utils.rle import check_rles, encode_masks, mask_areas, mask_boxes

from ..simulated_device import simulated_device


def is_mask(text, pixels):
    """Read it as pycocotools' C code does, one sign after the other."""
    counts, position = [], 0
    while position < len(text):
        value, digit, more = 0, 0, True
        while more:
            if position >= len(text) or not 48 <= text[position] < 112 or digit == 7:
                return False
            sign = text[position] - 48
            value |= (sign & 31) << (5 * digit)
            more = bool(sign & 32)
            position, digit = position + 1, digit + 1
        if sign & 16:
            value -= 1 << (5 * digit)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return all(0 <= count < 2**32 for count in counts) and sum(counts) == pixels


def damaged_mask(rng):
    height, width = rng.randrange(1, 40), rng.randrange(1, 40)
    drawn = np.random.default_rng(rng.randrange(10**9)).random((height, width)) < rng.choice([0, 0.1, 0.5, 1])
    text = bytearray(mask_utils.encode(np.asfortranarray(drawn.astype(np.uint8)))["counts"])
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.choice([rng.randrange(256), rng.randrange(48, 112)])
    if rng.random() < 0.1:
        text += bytes(rng.randrange(48, 112) for _ in range(rng.randrange(20)))
    return {"size": [height, width], "counts": bytes(text)}


def test_first_damaged_mask_is_named():
    rng = random.Random(0)
    validity = []
    for _ in range(600):
        rles = [damaged_mask(rng) for _ in range(rng.randrange(1, 6))]
        good = [is_mask(rle["counts"], rle["size"][0] * rle["size"][1]) for rle in rles]
        validity += good
        if all(good):
            check_rles(rles, str)
        else:
            with pytest.raises(ValueError, match=f"^{good.index(False)}: the mask's RLE is damaged"):
                check_rles(rles, str)
    assert 300 < sum(validity) < len(validity) - 300


@pytest.mark.parametrize("num_masks", [255, 256, 257, 600])
def test_many_masks(num_masks):
    rle = mask_utils.encode(np.ones((30, 20), np.uint8, order="F"))
    check_rles([rle] * num_masks, str)
    with pytest.raises(ValueError, match=f"^{num_masks - 1}: "):
        check_rles([rle] * (num_masks - 1) + [{**rle, "size": [30, 21]}], str)


@pytest.mark.parametrize("num_masks", [1, 254, 255, 256, 600])
def test_areas_and_boxes_in_batches(num_masks):
    drawn = np.random.default_rng(num_masks).random((num_masks, 12, 17)) < 0.02
    rles = [mask_utils.encode(np.asfortranarray(mask, np.uint8)) for mask in drawn]
    assert mask_areas(rles).tolist() == drawn.sum(axis=(1, 2)).tolist()
    assert mask_boxes(rles).tolist() == [mask_utils.toBbox(rle).tolist() for rle in rles]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (12, 17), (64, 48)])
def test_encoding_on_a_device_equals_pycocotools(size, share):
    masks = torch.from_numpy(np.random.default_rng(0).random((5, *size)) < share)
    masks[0, 0, 0], masks[1, -1, -1] = True, True
    expected = encode_masks(masks)
    with simulated_device() as device:
        assert encode_masks(masks.to(device)) == expected
    for mask, rle in zip(masks, expected):
        assert np.array_equal(mask_utils.decode(rle), mask.numpy())


def test_expected_sizes():
    rle = mask_utils.encode(np.ones((30, 20), np.uint8, order="F"))
    check_rles([rle], str, np.array([[30, 20]]))
    with pytest.raises(ValueError, match=r"height and width \[20, 30\], got \[30, 20\]"):
        check_rles([rle], str, np.array([[20, 30]]))
