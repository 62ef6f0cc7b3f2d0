"""The predictor: prompts of every kind, and the same numbers as the meta-architecture."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from regionspot import RegionSpotPredictor
from regionspot.modeling.masks import MaskUpsampler
from regionspot.modeling.proposal_sources import to_proposals

from .helpers import NAMES, as_inputs, draw_scene, spread_tokens, tiny_config

IMAGE, BOXES, _ = draw_scene(0)
POINTS = np.array([[[10, 10], [50, 40]], [[30, 20], [0, 0]]])
LABELS = np.array([[1, 0], [1, -1]])


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    predictor = RegionSpotPredictor(tiny_config("MODEL.MASK_ON", True))
    predictor.set_vocabulary(NAMES)
    predictor.set_image(IMAGE)
    return predictor


@pytest.fixture
def predictor(original):
    return copy.deepcopy(original)


def test_equals_the_meta_architecture(predictor):
    predictions = predictor.predict(boxes=BOXES, top_k=len(NAMES))
    instances = predictor.model([as_inputs(0)])[0]["instances"]
    for region in range(len(BOXES)):
        detected = instances[instances.region_indices == region]
        scores = predictions.top_scores[region][np.argsort(predictions.top_classes[region])]
        np.testing.assert_allclose(scores, detected.scores[detected.pred_classes.argsort()], atol=1e-5)
        np.testing.assert_array_equal(predictions.masks[region], detected.pred_masks[0])


def test_result_is_numpy_in_documented_shapes(predictor):
    predictions = predictor.predict(boxes=BOXES, top_k=3)
    n = len(BOXES)
    assert len(predictions) == n and predictions.vocabulary == NAMES
    assert predictions.boxes.tolist() == BOXES.tolist()
    shapes = {
        "classes": (n,),
        "scores": (n,),
        "top_classes": (n, 3),
        "top_scores": (n, 3),
        "logits": (n, 4),
        "predicted_ious": (n,),
        "masks": (n, 48, 64),
    }
    assert {name: getattr(predictions, name).shape for name in shapes} == shapes
    assert predictions.class_names == [NAMES[i] for i in predictions.logits.argmax(axis=1)]
    assert predictor.predict(boxes=BOXES, with_masks=False).masks is None
    assert predictor.predict(boxes=BOXES, top_k=np.int64(3)).top_classes.shape == (n, 3)


def test_image_encoders_run_once(predictor, monkeypatch):
    monkeypatch.setattr(predictor.recognizer, "encode_images", lambda *_: pytest.fail("encoded again"))
    first = predictor.predict(boxes=BOXES)
    second = predictor.predict(boxes=BOXES[::-1], vocabulary="zebra,cup")
    assert first.logits.shape[1] == 4 and second.logits.shape[1] == 2 and predictor.vocabulary == ["zebra", "cup"]


def test_points_masks_and_combinations(predictor):
    points = predictor.predict(points=POINTS, point_labels=LABELS)
    assert points.boxes.shape == (2, 4) and points.masks.shape == (2, 48, 64)
    for box, mask in zip(points.boxes, points.masks):  # the box is the one around the mask
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        assert not len(rows) or box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    masks = np.zeros((2, 48, 64), bool)
    masks[0, 5:20, 8:30], masks[1, 30:40, 40:60] = True, True
    by_mask = predictor.predict(masks=masks)
    assert by_mask.boxes.tolist() == [[8, 5, 30, 20], [40, 30, 60, 40]]
    both = predictor.predict(boxes=by_mask.boxes, masks=masks)
    np.testing.assert_allclose(both.logits, by_mask.logits, atol=1e-5)
    assert not np.allclose(predictor.predict(boxes=by_mask.boxes).logits, both.logits, atol=1e-4)
    assert len(predictor.predict(boxes=BOXES[:2], points=POINTS)) == 2


def test_masks_are_computed_on_demand(predictor, monkeypatch):
    original, shown = MaskUpsampler.chunks, []

    def chunks(self, logits, rows, size, column_major=False):
        shown.extend(rows.tolist())
        return original(self, logits, rows, size, column_major)

    monkeypatch.setattr(MaskUpsampler, "chunks", chunks)
    predictions = predictor.predict(boxes=BOXES)
    assert not shown
    single = predictions.mask(1)
    assert single.shape == (48, 64) and single.dtype == bool and shown == [1]
    assert np.array_equal(predictions.masks[1], single) and predictions.masks is predictions.masks
    assert np.array_equal(mask_api.decode(predictions.rles).transpose(2, 0, 1), predictions.masks)
    again = pickle.dumps(predictor.predict(boxes=BOXES))
    assert len(again) < 100_000 and np.array_equal(pickle.loads(again).masks, predictions.masks)
    without = predictor.predict(points=POINTS, with_masks=False)
    assert without.masks is None and without.rles is None
    with pytest.raises(ValueError, match="with_masks"):
        without.mask(0)


def test_threads_equal_one_thread(predictor):
    """Images, sizes, prompts and vocabularies differ from call to call, and nothing was encoded before."""
    scenes = [draw_scene(i, size) for i, size in enumerate([(48, 64), (64, 40), (50, 50), (90, 130)] * 2)]
    vocabularies = [[f"name {i}", "cup", *NAMES[: i % 4]] for i in range(len(scenes))]
    vocabularies[3] = None  # the one in use
    start = Barrier(len(scenes))

    def recognize(i):
        image, boxes, _ = scenes[i]
        start.wait()
        results = []
        for _ in range(3):
            features = predictor.encode(image)
            results.append(predictor.predict(boxes, vocabulary=vocabularies[i], features=features, top_k=2))
        return results

    with ThreadPoolExecutor(len(scenes)) as pool:
        answers = list(pool.map(recognize, range(len(scenes))))
    assert predictor.vocabulary == NAMES
    for (image, boxes, _), vocabulary, results in zip(scenes, vocabularies, answers):
        alone = predictor.predict(boxes, vocabulary=vocabulary, features=predictor.encode(image))
        for result in results:
            assert result.vocabulary == (vocabulary or NAMES) and result.image_size == image.shape[:2]
            np.testing.assert_allclose(result.logits, alone.logits, atol=1e-4)
            assert (result.masks != alone.masks).mean() < 1e-3


def test_features_belong_to_the_call(predictor):
    other, boxes, _ = draw_scene(5)
    features = predictor.encode(other)
    of_other = predictor.predict(boxes, features=features)
    own = predictor.predict(BOXES, vocabulary={"vessel": ["cup", "mug"]}, features=predictor.encode(IMAGE))
    assert own.vocabulary == ["vessel"] and predictor.vocabulary == NAMES
    again = predictor.predict(BOXES)  # of set_image
    predictor.set_image(other)
    np.testing.assert_allclose(predictor.predict(boxes).logits, of_other.logits, atol=1e-5)
    predictor.set_image(IMAGE)
    np.testing.assert_allclose(predictor.predict(BOXES).logits, again.logits, atol=1e-5)
    for wrong in (IMAGE, [features]):
        with pytest.raises(ValueError, match=r"expected what encode\(image\) returned"):
            predictor.predict(boxes, features=wrong)


def test_synonyms_are_averaged(predictor):
    cup, mug = predictor.recognizer.classifier.text_encoder(["cup", "mug"])
    predictions = predictor.predict(BOXES, vocabulary={"vessel": ["cup", "mug"], "cup": ["cup"]})
    assert predictions.vocabulary == predictor.vocabulary == ["vessel", "cup"]
    expected = torch.nn.functional.normalize(torch.stack([cup + mug, cup]), dim=1)
    torch.testing.assert_close(predictor.recognizer.classifier.embeddings, expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_paths_equal_pil_images(predictor, tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).convert(mode).save(path, exif=exif)
    upright = Image.fromarray(IMAGE).convert(mode).convert("RGB")
    upright = upright.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else upright
    expected = predictor.encode(np.asarray(upright))
    with Image.open(path) as image:
        for source in (path, str(path), image):
            features = predictor.encode(source)
            assert features.sizes == [upright.size[::-1]]
            assert torch.equal(features.embeddings, expected.embeddings)


@pytest.mark.parametrize(
    ("image", "image_format", "expected"),
    [
        (IMAGE[..., ::-1], "BGR", IMAGE),
        (np.dstack([IMAGE, IMAGE[..., :1]]), "RGB", IMAGE),
        (np.dstack([IMAGE[..., ::-1], IMAGE[..., :1]]), "BGR", IMAGE),
        (IMAGE[..., 0], "RGB", IMAGE[..., [0, 0, 0]]),
        (IMAGE[..., :1], "BGR", IMAGE[..., [0, 0, 0]]),
    ],
    ids=["BGR", "RGBA", "BGRA", "gray", "gray with channel"],
)
def test_arrays_of_any_channels(predictor, image, image_format, expected):
    encoded, straight = predictor.encode(image, image_format), predictor.encode(np.ascontiguousarray(expected))
    assert torch.equal(encoded.embeddings, straight.embeddings)
    assert torch.equal(encoded.feature_map, straight.feature_map)
    with pytest.raises(ValueError, match="expected RGB or BGR, got 'rgb'"):
        predictor.set_image(image, "rgb")


def test_embeddings_give_the_logits(predictor):
    predictions = predictor.predict(boxes=BOXES)
    np.testing.assert_allclose(np.linalg.norm(predictions.embeddings, axis=1), 1, atol=1e-5)
    text = predictor.recognizer.classifier.embeddings.numpy()
    scale = predictor.recognizer.vision_language.clip_model.logit_scale.exp().item()
    np.testing.assert_allclose(scale * predictions.embeddings @ text.T, predictions.logits, atol=1e-4)


def test_rows_of_predictions(predictor):
    predictions = predictor.predict(boxes=BOXES)
    assert len(predictions.masks) == len(BOXES) > 2  # cached: a part must not take it over
    for rows in ([2, 0], np.array([2, 0]), slice(1, None), np.arange(len(BOXES)) == 1, [], np.zeros(len(BOXES), bool)):
        part, index = predictions[rows], np.arange(len(BOXES))[rows if len(np.shape(rows)) != 1 or len(rows) else []]
        index = index if isinstance(rows, slice) or len(rows) else np.arange(0)
        assert part.class_names == [predictions.class_names[i] for i in index] and part.vocabulary == NAMES
        for name in ("boxes", "scores", "logits", "embeddings", "masks", "unknown"):
            np.testing.assert_array_equal(getattr(part, name), getattr(predictions, name)[index.astype(int)])
        assert part.rles == [predictions.rles[i] for i in index]


def test_several_images_equal_single_images(predictor):
    scenes = [draw_scene(i, size) for i, size in enumerate([(48, 64), (64, 40), (50, 50)])]
    images, boxes = [scene[0] for scene in scenes], [scenes[0][1], np.zeros((0, 4)), scenes[2][1]]
    results = predictor.predict_images(images, boxes, vocabulary="zebra,cup", top_k=2)
    assert predictor.vocabulary == NAMES  # the call's vocabulary is its own
    for image, image_boxes, result in zip(images, boxes, results):
        alone = predictor.predict(image_boxes, vocabulary="zebra,cup", top_k=2, features=predictor.encode(image))
        assert result.image_size == image.shape[:2] and result.class_names == alone.class_names
        np.testing.assert_allclose(result.logits, alone.logits, atol=1e-4)
        assert np.array_equal(result.masks, alone.masks) and result.proposal_scores is None
        np.testing.assert_array_equal(result.detection_scores, result.scores)
    assert predictor.predict_images([]) == []


def test_proposal_scores_rank_detections(predictor):
    scores = np.linspace(0.1, 1, len(BOXES)).astype(np.float32)
    [result] = predictor.predict_images([IMAGE], [BOXES], [scores], with_masks=False)
    np.testing.assert_allclose(result.detection_scores, result.scores * scores, atol=1e-6)
    assert result.proposal_scores.tolist() == scores.tolist() and result.masks is None


def test_regions_are_found_where_none_are_given(predictor):
    predictor.model.proposal_source = lambda images, *_: [
        to_proposals(torch.tensor([[2.0, 3, 30, 40], [0, 0, 9, 9]]), torch.tensor([0.5, 0.25]), image.shape[1:])
        for image in images
    ]
    proposed, provided = predictor.predict_images([IMAGE, IMAGE], [None, BOXES])
    assert proposed.boxes.tolist() == [[2, 3, 30, 40], [0, 0, 9, 9]] and proposed.proposal_scores.tolist() == [
        0.5,
        0.25,
    ]
    assert provided.boxes.tolist() == BOXES.tolist() and provided.proposal_scores is None
    predictor.model.top_k_proposals = 1
    assert len(predictor.predict_images([IMAGE])[0]) == 1


@pytest.mark.parametrize(
    ("images", "boxes", "scores", "message"),
    [
        ([IMAGE, IMAGE], [BOXES], None, "for each of 2 images, got 1"),
        ([IMAGE, IMAGE], [BOXES, [[5, 5, 2, 9]]], None, "boxes of image 1: number 0.*no area"),
        ([IMAGE], [BOXES], [[2.0] * len(BOXES)], r"scores of image 0: expected numbers in \[0, 1\]"),
        ([IMAGE], [[[1, 2, 3]]], None, r"image 0: expected shape \(N, 4\)"),
        ([IMAGE], None, None, "no boxes: give them, or set MODEL.REGIONSPOT.PROPOSALS.SOURCE"),
    ],
)
def test_invalid_batches_are_refused(predictor, images, boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict_images(images, boxes, scores)


def test_no_boxes(predictor):
    predictions = predictor.predict(boxes=[])
    assert len(predictions) == 0 and predictions.masks.shape == (0, 48, 64) and predictions.logits.shape == (0, 4)


def test_background_names_make_regions_unknown():
    background = ["sky", "wall"]
    cfg = tiny_config("MODEL.REGIONSPOT.UNKNOWN.BACKGROUND", tuple(background))
    torch.manual_seed(0)
    predictor = RegionSpotPredictor(cfg)
    spread_tokens(predictor.recognizer, as_inputs(0))
    predictor.set_image(IMAGE)
    predictions = predictor.predict(boxes=BOXES, vocabulary=NAMES, with_masks=False)
    predictor.recognizer.background = []  # the same names, as ordinary classes
    wider = predictor.predict(boxes=BOXES, vocabulary=NAMES + background, with_masks=False)
    expected = wider.logits.argmax(axis=1) >= len(NAMES)
    assert 0 < expected.sum() < len(expected)
    assert predictions.unknown.tolist() == expected.tolist() and not wider.unknown.any()
    for label, unknown, best in zip(predictions.class_names, expected, predictions.logits.argmax(axis=1)):
        assert label == ("unknown" if unknown else NAMES[best])
    assert predictions.vocabulary == NAMES and predictions.classes.max() < len(NAMES)
    np.testing.assert_allclose(predictions.logits, wider.logits[:, : len(NAMES)], atol=1e-5)
    shares = np.exp(wider.logits) / np.exp(wider.logits).sum(axis=1, keepdims=True)  # the background has a share, too
    np.testing.assert_allclose(predictions.scores, shares[:, : len(NAMES)].max(axis=1), atol=1e-5)


def test_arrays_of_any_strides(predictor):
    straight = predictor.predict(boxes=BOXES)
    predictor.set_image(np.ascontiguousarray(IMAGE[..., ::-1])[..., ::-1])
    flipped = predictor.predict(boxes=BOXES[::-1])
    np.testing.assert_allclose(flipped.logits[::-1], straight.logits, atol=1e-4)


def test_box_is_clipped_to_the_image(predictor):
    assert predictor.predict(boxes=[[-5, -5, 30, 30]]).boxes.tolist() == [[0, 0, 30, 30]]


def test_bool_labels_and_masks_of_255(predictor):
    np.testing.assert_array_equal(
        predictor.predict(points=POINTS[:, :1], point_labels=[[True], [False]]).logits,
        predictor.predict(points=POINTS[:, :1], point_labels=[[1], [0]]).logits,
    )
    mask = np.zeros((1, 48, 64), np.uint8)
    mask[0, 5:20, 8:30] = 255
    np.testing.assert_array_equal(predictor.predict(masks=mask).logits, predictor.predict(masks=mask > 0).logits)


def test_results_own_their_vocabulary(predictor):
    predictor.predict(boxes=BOXES).vocabulary.append("more")
    assert predictor.vocabulary == NAMES


def test_old_argument_name_works_with_a_warning(predictor):
    expected = predictor.predict(points=POINTS, point_labels=LABELS)
    with pytest.warns(DeprecationWarning, match=r"predict\(labels=...\) is deprecated.*use point_labels=..."):
        predictions = predictor.predict(points=POINTS, labels=LABELS)
    assert np.array_equal(predictions.logits, expected.logits)
    with pytest.raises(TypeError, match="labels is the old name of point_labels"):
        predictor.predict(points=POINTS, labels=LABELS, point_labels=LABELS)


@pytest.mark.parametrize(("old", "new"), [("labels", "class_names"), ("iou", "predicted_ious")])
def test_old_attribute_name_works_with_a_warning(predictor, old, new):
    predictions = predictor.predict(boxes=BOXES)
    with pytest.warns(DeprecationWarning, match=f"RegionPredictions.{old} is deprecated.*use {new}"):
        assert getattr(predictions, old) is getattr(predictions, new)


def test_predict_needs_an_image():
    predictor = RegionSpotPredictor(tiny_config())
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(boxes=BOXES)
    predictor.set_image(IMAGE)
    with pytest.raises(ValueError, match="no vocabulary"):
        predictor.predict(boxes=BOXES)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompts"),
        ({"boxes": [[1, 2, 3]]}, r"\(N, 4\)"),
        ({"boxes": [1, 2, 3, 4]}, r"\(N, 4\)"),
        ({"boxes": [[1, 2], [3, 4, 5]]}, "expected numbers"),
        ({"boxes": "cup"}, "expected numbers"),
        ({"boxes": [[0, 0, np.nan, 5]]}, "NaN"),
        ({"boxes": [[5, 5, 2, 9]]}, "no area"),
        ({"boxes": [[100, 5, 120, 9]]}, "outside the image"),
        ({"points": [[1, 2]]}, r"\(N, P, 2\)"),
        ({"points": [[[70, 2]]]}, "outside the image"),
        ({"points": [[[np.nan, 2]]]}, "outside the image"),
        ({"points": [[[7, 2]]], "point_labels": [[2]]}, "1 .foreground"),
        ({"points": [[[7, 2]]], "point_labels": [1]}, "one for each point"),
        ({"point_labels": [[1]], "boxes": BOXES}, "without points"),
        ({"boxes": BOXES, "points": POINTS[:1]}, "as many boxes, points and masks as regions"),
        ({"masks": np.full((1, 48, 64), -8.0)}, "threshold logits at 0"),
        ({"boxes": BOXES, "top_k": 0}, "at least 1, got 0"),
        ({"boxes": BOXES, "top_k": True}, "at least 1, got True"),
        ({"boxes": BOXES, "top_k": 2.0}, "at least 1, got 2.0"),
        ({"boxes": BOXES, "top_k": "3"}, "at least 1, got '3'"),
        ({"boxes": BOXES, "top_k": None}, "at least 1, got None"),
        ({"points": [[[7, 2]]], "point_labels": [[-1]]}, "at least one point"),
        ({"masks": np.ones((1, 5, 5), bool)}, r"\(N, 48, 64\)"),
        ({"masks": np.zeros((1, 48, 64), bool)}, "number 0 is empty"),
        ({"boxes": BOXES, "vocabulary": []}, "at least one"),
    ],
)
def test_invalid_prompts_are_refused(predictor, prompts, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompts)


@pytest.mark.parametrize(
    "image",
    [np.zeros(4, np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_invalid_images_are_refused(predictor, image):
    with pytest.raises(ValueError, match=r"uint8 array, \(H, W, 3\)"):
        predictor.set_image(image)
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.predict(boxes=BOXES)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="expects RegionSpot or CropBaseline, got RegionSpotRCNN"):
        RegionSpotPredictor(tiny_config("MODEL.META_ARCHITECTURE", "RegionSpotRCNN"))


@pytest.mark.parametrize("masked", [False, True])
def test_crop_baseline_equals_the_meta_architecture(masked):
    torch.manual_seed(0)
    cfg = tiny_config("MODEL.META_ARCHITECTURE", "CropBaseline", "MODEL.REGIONSPOT.CROP.MASKED", masked)
    predictor = RegionSpotPredictor(cfg)
    predictor.set_vocabulary(NAMES)
    [expected] = predictor.model([as_inputs(0)])
    predictor.set_image(IMAGE)
    [from_batch] = predictor.predict_images([IMAGE], [BOXES], with_masks=False)
    for predictions in (predictor.predict(BOXES), from_batch):
        np.testing.assert_allclose(predictions.top_scores, expected["regions"].top_scores, atol=1e-5)
        np.testing.assert_array_equal(predictions.classes, expected["regions"].top_classes[:, 0])
    around = predictor.predict(points=POINTS, point_labels=LABELS)
    assert np.isfinite(around.scores).all() and around.boxes.shape == (2, 4) and from_batch.masks is None
