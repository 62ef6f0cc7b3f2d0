"""What the page computes: the same as the predictor, whatever the order and the kinds of the regions."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from regionspot.app import recognition as module
from regionspot.app.prompts import parse_regions
from regionspot.app.results import to_choices, to_coco, to_rows
from regionspot.app.session import Session

from ..helpers import NAMES, draw_scene

BOXES = [[2, 3, 20, 30], [30, 10, 60, 45]]
REGIONS = [{"box": BOXES[0]}, {"points": [[40.5, 20.5, 1], [3, 3, 0]]}, {"box": BOXES[1]}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(draw_scene(0)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def image(model, path):
    return model.encode(path)


@pytest.fixture(scope="module")
def recognition(model, image):
    return model.recognize(image, parse_regions(REGIONS), NAMES)


def test_regions_keep_the_order_in_which_they_were_drawn(model, image, recognition):
    boxes = model.predictor.predict(boxes=BOXES, vocabulary=NAMES, features=image.features)
    points = model.predictor.predict(
        points=[[[40.5, 20.5], [3, 3]]], point_labels=[[1, 0]], vocabulary=NAMES, features=image.features
    )
    for name in ("boxes", "scores", "top_classes", "logits", "predicted_ious", "masks", "embeddings"):
        expected = [getattr(boxes, name)[0], getattr(points, name)[0], getattr(boxes, name)[1]]
        np.testing.assert_array_equal(getattr(recognition.predictions, name), expected, err_msg=name)
    assert recognition.predictions.class_names == [boxes.class_names[0], points.class_names[0], boxes.class_names[1]]
    assert recognition.predictions.rles == [boxes.rles[0], points.rles[0], boxes.rles[1]]


def test_names_of_one_session_leave_others_alone(model, image):
    regions = parse_regions(REGIONS)
    assert model.recognize(image, regions, ["a", "b, c"]).predictions.vocabulary == ["a", "b, c"]
    assert model.recognize(image, regions, ["d"]).predictions.vocabulary == ["d"]
    with pytest.raises(ValueError, match="vocabulary"):
        model.predictor.vocabulary  # noqa: B018 - none is set in the model itself


def test_table_and_choices(recognition):
    predictions = recognition.predictions
    for index, row in enumerate(to_rows(recognition)):
        assert row[:2] == [index + 1, predictions.class_names[index]]
        assert row[2:4] == pytest.approx([predictions.scores[index], predictions.predicted_ious[index]], abs=6e-4)
        best = [NAMES[label] for label in predictions.top_classes[index]]
        assert [text.rsplit(" ", 1)[0] for text in row[4].split(", ")] == best and len(best) == 4
    assert to_choices(recognition) == [(f"{i + 1}: {name}", i) for i, name in enumerate(predictions.class_names)]


def test_coco_file(recognition, model, path, tmp_path):
    session = Session()
    session.set_image(model, path)
    session.recognize(model, REGIONS, "\n".join(NAMES))
    file = session.write_coco()
    assert file.endswith("scene_coco.json")
    assert json.loads(Path(file).read_text()) == to_coco(recognition)
    coco, predictions = COCO(file), recognition.predictions
    assert coco.imgs == {1: {"id": 1, "file_name": "scene.png", "height": 48, "width": 64}}
    assert [category["name"] for category in coco.loadCats([1, 2, 3, 4])] == NAMES
    for index, annotation in enumerate(coco.loadAnns([1, 2, 3])):
        np.testing.assert_array_equal(coco.annToMask(annotation), predictions.masks[index])
        x, y, width, height = annotation["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(predictions.boxes[index].tolist(), abs=2e-3)
        assert annotation["area"] == predictions.masks[index].sum()
        assert annotation["category_id"] == predictions.classes[index] + 1
        assert annotation["score"] == pytest.approx(float(predictions.scores[index]))


def test_unknown_regions_have_a_category_of_their_own(recognition):
    unknown = np.array([False, True, False])
    changed = module.replace(recognition.predictions, unknown=unknown)
    content = to_coco(module.Recognition(recognition.image, recognition.regions, changed))
    assert content["categories"][-1] == {"id": 5, "name": "unknown"}
    assert [a["category_id"] == 5 for a in content["annotations"]] == unknown.tolist()


def test_everything_finds_the_boxes_of_sams_masks(model, image):
    regions = model.find_regions(image)
    assert len(regions) == 4  # PROPOSALS.TOP_K of the config
    assert all(0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 48 for x0, y0, x1, y1 in (region.box for region in regions))
    assert len(model.recognize(image, regions, NAMES).predictions) == 4


def test_everything_finds_nothing(model, image, monkeypatch):
    monkeypatch.setattr(model._source, "pred_iou_thresh", 1e9)
    with pytest.raises(ValueError, match="everything: no objects were found"):
        model.find_regions(image)


def test_drawings_have_the_size_of_the_view(model, image, recognition):
    assert image.view.shape == (450, 600, 3)  # enlarged
    attention = [model.draw_attention(recognition, index) for index in range(3)]
    assert all(drawing.shape == (450, 600, 3) for drawing in attention)
    assert not np.array_equal(attention[0], attention[1])
    assert model.draw(recognition).shape == (450, 600, 3)


def test_exif_rotation_turns_the_image_before_it_is_shown(model, tmp_path):
    array = draw_scene(1, (48, 80))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a rotation by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    image = model.encode(tmp_path / "turned.png")
    np.testing.assert_array_equal(image.array, np.rot90(array, -1))
    assert image.view.shape == (600, 360, 3) and image.features.sizes == [(80, 48)]


def test_example_names_regions_like_it(model, path):
    session = Session()
    session.set_image(model, path)
    session.recognize(model, REGIONS, "cup, spoon")
    embeddings = session.recognition.predictions.embeddings
    session.add_example(2, "my gadget")
    predictions = session.recognize(model, REGIONS, "cup, spoon").predictions
    assert predictions.vocabulary == ["cup", "spoon", "my gadget"]
    scale = model.predictor.recognizer.vision_language.clip_model.logit_scale.exp().item()
    np.testing.assert_allclose(predictions.logits[:, 2] / scale, embeddings @ embeddings[2], atol=1e-5)
    plain = model.recognize(session.image, session.recognition.regions, ["cup", "spoon"]).predictions
    np.testing.assert_allclose(predictions.logits[:, :2], plain.logits, rtol=1e-4, atol=1e-4)
    assert predictions.class_names[2] == "my gadget" and predictions.scores[2] == predictions.top_scores[2, 0]
    assert [predictions.vocabulary[i] for i in predictions.classes] == predictions.class_names


def test_examples_are_averaged_and_replace_a_typed_name(model, path):
    session = Session()
    session.set_image(model, path)
    embeddings = session.recognize(model, REGIONS, "cup, spoon").predictions.embeddings
    for index in (0, 1):
        session.add_example(index, '"cup"')
    mean = embeddings[:2].mean(axis=0)
    similarity = embeddings @ (mean / np.linalg.norm(mean))
    for text, names in (("cup, spoon", ["cup", "spoon"]), ("", ["cup"])):  # no name has to be typed
        predictions = session.recognize(model, REGIONS, text).predictions
        assert predictions.vocabulary == names
        scale = model.predictor.recognizer.vision_language.clip_model.logit_scale.exp().item()
        np.testing.assert_allclose(predictions.logits[:, 0] / scale, similarity, atol=1e-5)
    text_again = model.recognize(session.image, session.recognition.regions, ["cup", "spoon"]).predictions
    assert not np.allclose(text_again.logits[:, 0] / scale, similarity, atol=1e-3)  # the encoder's own is not changed


def test_examples_need_a_region_and_one_name(model, path):
    session = Session()
    with pytest.raises(ValueError, match="no regions: recognize some first"):
        session.add_example(0, "cup")
    session.set_image(model, path)
    session.recognize(model, REGIONS, "cup")
    for text in ("", "cup, spoon"):
        with pytest.raises(ValueError, match="expected the name of the region"):
            session.add_example(0, text)
    assert session.examples == {}


def test_large_images_are_shown_smaller(model, tmp_path):
    Image.new("RGB", (2400, 1200)).save(tmp_path / "large.png")
    assert model.encode(tmp_path / "large.png").view.shape == (500, 1000, 3)


def write_png_header(path, width, height):
    """Write a PNG that says it is huge, in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize(
    ("width", "message"),
    [(9000, "expected at most 64 million pixels, got 9000 x 9000; resize it"), (20000, "too large")],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused(model, tmp_path, width, message):
    write_png_header(tmp_path / "bomb.png", width, width)
    with pytest.raises(ValueError, match=f"^image bomb.png: {message}") as error:
        model.encode(tmp_path / "bomb.png")
    assert str(tmp_path) not in str(error.value)


def test_session_without_an_image(model, path, tmp_path):
    session = Session()
    with pytest.raises(ValueError, match="no image: upload one first"):
        session.recognize(model, REGIONS, "cup")
    session.set_image(model, path)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="^image text.jpg cannot be read"):
        session.set_image(model, tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="no image: upload one first"):  # the image before is not used
        session.find_regions(model)


@pytest.mark.parametrize(
    ("regions", "names", "message"),
    [
        ([], "cup", "no regions"),
        (REGIONS, " ,", "no names"),
        ([{"box": [70, 3, 80, 10]}], "cup", "lies outside the image"),
        ([{"points": [[64, 10, 1]]}], "cup", "outside the image"),
        (REGIONS, "cup " * 100, "too long|tokens"),
    ],
)
def test_mistakes_are_one_line(model, path, regions, names, message):
    session = Session()
    session.set_image(model, path)
    with pytest.raises(ValueError, match=message) as error:
        session.recognize(model, regions, names)
    assert "\n" not in str(error.value) and session.recognition is None
