"""PIL's resize on any device."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from regionspot.modeling.localizers.pil_resize import resize_bytes

SIZES = [
    ((48, 64), (768, 1024)),
    ((427, 640), (683, 1024)),
    ((60, 37), (60, 90)),
    ((33, 50), (90, 50)),
    ((9, 1), (9, 1)),
]
SIZES += [((200, 300), (67, 100)), ((301, 97), (64, 21)), ((77, 1200), (66, 1024)), ((1, 50), (1, 1024))]


@pytest.mark.parametrize(("size", "output"), SIZES, ids=str)
def test_equals_pil(size, output):
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[:, : size[0] // 3] = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None]  # and flat areas
    rows = to_pil_image(image).resize((output[1], size[0]), Image.Resampling.BILINEAR)
    expected = pil_to_tensor(rows.resize(output[::-1], Image.Resampling.BILINEAR))
    result = resize_bytes(image, output)
    assert result.dtype == torch.uint8 and torch.equal(result, expected)
    whole = pil_to_tensor(to_pil_image(image).resize(output[::-1], Image.Resampling.BILINEAR))
    assert (result.int() - whole.int()).abs().max() <= 1
