import io
import logging
import struct
from collections import Counter

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as read_as_detectron2
from PIL import Image

from regionspot.utils.images import FORMATS, decode_image, to_rgb_array

from ..helpers import draw_scene

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
GRADIENT = np.linspace(1000, 3000, 48 * 64).reshape(48, 64)


def exif_bytes(kind: int, value: bytes) -> bytes:
    """Return EXIF with an orientation tag of a TIFF type (3 is the right one, short) and four bytes of value."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


@pytest.mark.parametrize(("least", "side"), [(0, 96), (12, 12), (13, 24), (90, 96)])
def test_jpeg_is_decoded_at_reduced_size(tmp_path, least, side):
    scene = Image.fromarray(np.kron(draw_scene(0)[0], np.ones((2, 2, 1), np.uint8)))  # 96 high, 128 wide
    scene.save(tmp_path / "a.jpg")
    scene.save(tmp_path / "a.png")
    image, size = decode_image(tmp_path / "a.jpg", "RGB", least)
    assert image.shape == (side, side * 4 // 3, 3) and size == (96, 128)
    assert decode_image(tmp_path / "a.png", "RGB", least)[0].shape == (96, 128, 3)


def test_rotated_image_has_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw_scene(0, (64, 96))[0]).save(tmp_path / "a.jpg", exif=exif)
    for least, shape in ((0, (96, 64, 3)), (32, (48, 32, 3))):
        image, size = decode_image(tmp_path / "a.jpg", "RGB", least)
        assert image.shape == shape and size == (96, 64)


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_matches_detectron2(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(draw_scene(0)[0]).save(path, exif=exif)
    expected = read_as_detectron2(str(path), "RGB")
    assert (to_rgb_array(path) == expected).all() and (to_rgb_array(str(path)) == expected).all()
    with Image.open(path) as image:
        assert (to_rgb_array(image) == expected).all()
    assert (to_rgb_array(expected) == expected).all()
    assert (decode_image(path, "BGR")[0] == expected[..., ::-1]).all()


@pytest.mark.parametrize(
    "exif",
    [
        exif_bytes(2, b"6\0\0\0"),  # text
        exif_bytes(5, struct.pack("<I", 200)),  # a fraction that lies behind the end
        exif_bytes(12, b"\xff" * 4),
        exif_bytes(3, struct.pack("<I", 6))[:18],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0not TIFF",
    ],
)
def test_malformed_exif_means_upright(tmp_path, exif):
    path, scene = tmp_path / "a.jpg", draw_scene(0)[0]
    Image.fromarray(scene).save(path, quality=95, exif=exif)
    image, size = decode_image(path, "RGB")
    assert size == image.shape[:2] == (48, 64)
    Image.fromarray(scene).save(tmp_path / "plain.jpg", quality=95)
    assert (image == to_rgb_array(tmp_path / "plain.jpg")).all()


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")])
def test_deep_image_is_scaled_by_its_range(tmp_path, caplog, dtype, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRADIENT.astype(dtype)).save(path)
    with caplog.at_level(logging.INFO):
        image = to_rgb_array(path)
    assert np.abs(image[..., 0] - (GRADIENT - 1000) / 2000 * 255).max() < 0.7 and (image == image[..., :1]).all()
    image = to_rgb_array(path, (2000, 4000))
    assert np.abs(image[..., 0] - np.clip((GRADIENT - 2000) / 2000 * 255, 0, 255)).max() < 0.7
    with Image.open(path) as opened:
        assert (to_rgb_array(opened, (2000, 4000)) == image).all()


@pytest.fixture
def records(monkeypatch):
    """What the module logs, also where a command has set up the project's loggers in this process."""
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    logger, handler, records = logging.getLogger("regionspot.utils.images"), logging.Handler(), []
    handler.emit = records.append
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_deep_image_scaling_is_logged_once(tmp_path, records):
    Image.fromarray(GRADIENT.astype(np.uint16)).save(tmp_path / "a.png")
    for _ in range(3):
        to_rgb_array(tmp_path / "a.png")
    [record] = records
    assert "more than 8 bits" in record.getMessage() and "1000 to 3000" in record.getMessage()


def test_deep_image_without_contrast_is_black(tmp_path):
    for name, values in (("flat", np.full((4, 5), 7.0)), ("nan", np.full((4, 5), np.nan))):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tiff")
        assert not to_rgb_array(tmp_path / f"{name}.tiff").any()
    Image.fromarray(np.array([[np.inf, 0, 1, np.nan]], np.float32)).save(tmp_path / "mixed.tiff")
    assert to_rgb_array(tmp_path / "mixed.tiff")[0, :, 0].tolist() == [255, 0, 255, 0]


@pytest.mark.parametrize("deep_range", [(1,), (5, 5), (9, 2), (0, float("nan")), (0, 1, 2)])
def test_deep_range_is_checked(tmp_path, deep_range):
    Image.fromarray(draw_scene(0)[0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="DEEP_RANGE: expected .lowest, highest."):
        to_rgb_array(tmp_path / "a.png", deep_range)


@pytest.mark.parametrize("kind", ["EPS", "AVIF", "ICO", "TGA"])
def test_other_formats_are_refused_unread(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(draw_scene(0)[0]).save(path, format=kind)
    for read in (to_rgb_array, lambda path: decode_image(path, "BGR", 8)):
        with pytest.raises(ValueError, match=f"a.{kind.lower()} cannot be read: expected one of JPEG, PNG"):
            read(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        to_rgb_array(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_raise_value_error(tmp_path, kind):
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(draw_scene(0)[0]).save(buffer, format=kind)
    whole, path, refused = np.frombuffer(buffer.getvalue(), np.uint8), tmp_path / "a", 0
    for trial in range(60):
        data = whole.copy()
        places = rng.integers(0, min(len(data), 400), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data[: rng.integers(1, len(data)) if trial % 4 == 0 else None].tobytes())
        try:
            assert to_rgb_array(path).ndim == 3
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("array", [np.zeros((4, 5)), np.zeros((4, 5, 3)), np.zeros((0, 5, 3), np.uint8), np.uint8(3)])
def test_array_of_wrong_shape_is_refused(array):
    with pytest.raises(ValueError, match="expected a path, a PIL image"):
        to_rgb_array(array)
