import io

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from regionspot.modeling.proposal_sources import to_proposals
from regionspot.prediction import RegionBatchPredictor, RegionFilter

from ..helpers import NAMES, draw_scene, tiny_config

SCENES = [draw_scene(i, size) for i, size in enumerate([(48, 64), (64, 40), (50, 50)])]
IMAGES, BOXES = [scene[0] for scene in SCENES], [scene[1] for scene in SCENES]


@pytest.fixture(scope="module")
def batch_predictor():
    torch.manual_seed(0)
    return RegionBatchPredictor(tiny_config(), NAMES, with_embeddings=True)


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["path", "bytes", "image"])
def test_columns_equal_the_predictor(batch_predictor, tmp_path, kind):
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    columns = {"path": paths, "bytes": [encoded(image) for image in IMAGES], "image": IMAGES}[kind]
    result = batch_predictor({kind: columns, "boxes": BOXES, "key": np.array([7, 8, 9])})
    assert result["key"] == [7, 8, 9] and result["error"] == [None] * 3 and ("path" in result) == (kind == "path")
    assert not {"bytes", "image"} & set(result)
    for row, (image, boxes) in enumerate(zip(IMAGES, BOXES)):
        alone = batch_predictor.predictor.predict(boxes, features=batch_predictor.predictor.encode(image))
        assert (result["height"][row], result["width"][row]) == image.shape[:2]
        assert result["class_names"][row] == alone.class_names and result["boxes"][row] == boxes.tolist()
        np.testing.assert_allclose(result["scores"][row], alone.scores, atol=1e-5)
        np.testing.assert_allclose(result["embeddings"][row], alone.embeddings, atol=1e-5)
        rles = [{"size": image.shape[:2], "counts": counts} for counts in result["masks"][row]]
        assert np.array_equal(mask_api.decode(rles).transpose(2, 0, 1), alone.masks)


def test_one_bad_image_costs_itself_alone(batch_predictor, tmp_path):
    expected = batch_predictor({"image": IMAGES[:1], "boxes": BOXES[:1]})
    huge = b"P5 65535 65535 255 "  # the header of a PGM file, which Pillow takes for a decompression bomb
    batch = {"bytes": [encoded(IMAGES[0]), b"not an image", encoded(IMAGES[1]), encoded(IMAGES[1])[:60], huge]}
    result = batch_predictor({**batch, "boxes": [BOXES[0], BOXES[0], [[5, 5, 2, 9]], BOXES[1], BOXES[1]]})
    assert result["class_names"][0] == expected["class_names"][0] and result["error"][0] is None
    assert [bool(error) for error in result["error"]] == [False, True, True, True, True]
    assert "cannot be read" in result["error"][1] and "boxes of the image: number 0" in result["error"][2]
    assert "image cannot be read: Image size (4294836225 pixels)" in result["error"][4]
    for row in (1, 2, 3, 4):
        assert result["boxes"][row] == result["masks"][row] == result["class_names"][row] == []
    missing = batch_predictor({"path": [str(tmp_path / "none.png")], "boxes": BOXES[:1]})
    assert "no such file" in missing["error"][0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [({"name": ["a"]}, "column 'path', 'bytes' or 'image'"), ({"image": IMAGES[:1]}, "expected the column 'boxes'")],
)
def test_batches_without_images_or_boxes_are_refused(batch_predictor, batch, message):
    with pytest.raises(ValueError, match=message):
        batch_predictor(batch)


def test_no_names_are_refused():
    with pytest.raises(ValueError, match="no vocabulary"):
        RegionBatchPredictor(tiny_config())


def regions(batch_predictor, boxes, proposal_scores):
    [result] = batch_predictor.predictor.predict_images([IMAGES[0]], [boxes], [proposal_scores])
    return result


def test_filter_keeps_the_best_in_their_order(batch_predictor):
    boxes = [[2, 2, 20, 20], [2, 2, 20, 21], [30, 10, 60, 40], [5, 5, 9, 9]]
    result = regions(batch_predictor, boxes, [0.5, 0.9, 0.1, 0.7])
    result.classes[:] = 1
    scores = result.detection_scores
    assert RegionFilter()(result).boxes.tolist() == boxes
    assert RegionFilter(nms_thresh=0.5)(result).boxes.tolist() == boxes[1:]
    result.classes[0] = 2  # suppression is by class
    assert len(RegionFilter(nms_thresh=0.5)(result)) == 4
    best = np.sort(np.argsort(-scores)[:2])
    assert RegionFilter(top_k=2)(result).boxes.tolist() == [boxes[i] for i in best]
    assert len(RegionFilter(top_k=0)(result)) == 0
    threshold = float(np.sort(scores)[1])
    assert (
        RegionFilter(score_thresh=threshold)(result).detection_scores.tolist() == scores[scores >= threshold].tolist()
    )


def test_filter_of_unknown_regions(batch_predictor):
    result = regions(batch_predictor, BOXES[0], np.full(len(BOXES[0]), 0.5))
    result.unknown[0] = True
    assert len(RegionFilter(score_thresh=1.0)(result)) == 1  # unknown regions have no score to compare
    assert len(RegionFilter(keep_unknown=False)(result)) == len(BOXES[0]) - 1
    assert RegionFilter(keep_unknown=False)(result).rles == result.rles[1:]


@pytest.mark.parametrize(("name", "value"), [("score_thresh", -0.1), ("nms_thresh", 1.5), ("top_k", -2)])
def test_invalid_filters_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        RegionFilter(**{name: value})


def test_images_without_boxes_get_proposals(batch_predictor, monkeypatch):
    def propose(images, *_):
        return [
            to_proposals(torch.tensor([[2.0, 3, 30, 40]]), torch.tensor([0.5]), image.shape[1:]) for image in images
        ]

    monkeypatch.setattr(batch_predictor.predictor.model, "proposal_source", propose)
    result = batch_predictor({"image": IMAGES[:2], "boxes": [None, BOXES[1]]})
    assert result["boxes"] == [[[2, 3, 30, 40]], BOXES[1].tolist()]
