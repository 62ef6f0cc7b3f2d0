"""The recognizer: loss, boxes in the right frame and size, invalid inputs."""

import pytest
import torch
from detectron2.structures import Boxes
from segment_anything.utils.transforms import ResizeLongestSide

from regionspot.structures import Prompts

from ..helpers import NAMES, as_inputs, tiny_config, tiny_model
from .test_losses import plain_focal_loss

BEYOND = torch.tensor([[-5.0, -3.0, 30.0, 20.0], [40.0, 30.0, 80.0, 60.0], [-9.0, 10.0, 70.0, 20.0]])
INSIDE = torch.tensor([[0.0, 0.0, 30.0, 20.0], [40.0, 30.0, 64.0, 48.0], [0.0, 10.0, 64.0, 20.0]])


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 2.0), (0.25, 0.5)])
def test_focal_alpha_and_gamma_reach_the_loss(alpha, gamma):
    loss = "MODEL.REGIONSPOT.LOSS."
    recognizer = tiny_model(loss + "FOCAL_ALPHA", alpha, loss + "FOCAL_GAMMA", gamma).recognizer
    tokens, feature_map = [torch.randn(3, 32), torch.randn(1, 32)], torch.randn(2, 17, 64)
    classes = [torch.tensor([2, 0, 3]), torch.tensor([1])]
    with torch.no_grad():
        logits = recognizer.classify(tokens, feature_map)
        loss = recognizer.loss([], [], classes, tokens=tokens, feature_map=feature_map)
    expected = sum(plain_focal_loss(x, y, alpha, gamma) for x, y in zip(logits, classes)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_defaults_of_the_paper():
    node = tiny_config().MODEL.REGIONSPOT.LOSS
    assert (node.FOCAL_ALPHA, node.FOCAL_GAMMA) == (0.25, 2.0)


@pytest.mark.parametrize(("output", "factors"), [(None, (1, 1)), ((96, 256), (4, 2))], ids=["own size", "other size"])
def test_predicted_boxes_are_clipped(output, factors):
    boxes = Boxes(BEYOND.clone())
    sizes = output and [output]
    [result] = tiny_model().recognizer.recognize([as_inputs(0)["image"]], [boxes], output_sizes=sizes)
    detections, regions = result.detections, result.regions
    expected = INSIDE * torch.tensor(factors).repeat(2)
    assert torch.equal(regions.pred_boxes.tensor, expected)
    assert len(detections) == len(BEYOND) * len(NAMES)
    assert torch.equal(detections.pred_boxes.tensor, expected[detections.region_indices])
    assert torch.equal(boxes.tensor, BEYOND)  # the caller's boxes stay as they are


def test_prompt_boxes_are_clipped():
    recognizer, images = tiny_model().recognizer, [as_inputs(0)["image"]]
    [cut], [whole] = (recognizer.position_tokens(images, [Boxes(boxes)]) for boxes in (INSIDE, BEYOND))
    torch.testing.assert_close(whole, cut)


@pytest.mark.parametrize("size", [(130, 90), (41, 100)])
def test_prompt_coordinates_equal_sams(size):
    """The longest side becomes SAM's, the other one whole pixels: x and y have factors of their own."""
    recognizer, image = tiny_model().recognizer, as_inputs(0, size)["image"]
    boxes = torch.tensor([[3.0, 5.0, 30.5, 20.0], [20.0, 1.0, 88.0, 40.0]])
    points, labels = torch.tensor([[[9.0, 30.0]], [[60.0, 7.5]]]), torch.ones(2, 1)
    transform = ResizeLongestSide(64)
    scaled = Prompts(transform.apply_boxes_torch(boxes, size), transform.apply_coords_torch(points, size), labels)
    features = recognizer.encode_images([image])
    [output] = recognizer.locate(features, [Prompts(boxes, points, labels)])
    [expected] = recognizer.localizer(features.embeddings, [scaled])
    torch.testing.assert_close(output.tokens, expected.tokens, atol=1e-6, rtol=0)


def test_classes_restrict_detections():
    recognizer, boxes = tiny_model().recognizer, [Boxes(INSIDE)]
    images, asked = [as_inputs(0)["image"]], torch.tensor([False, True, False, True])
    [detections], [some] = recognizer(images, boxes), recognizer(images, boxes, classes=asked)
    kept = detections[asked[detections.pred_classes]]
    assert 0 < len(kept) < len(detections)
    assert torch.equal(some.pred_classes, kept.pred_classes) and torch.equal(some.scores, kept.scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [torch.tensor([[0.0, 0, 9, 9]])]}, "expected detectron2's Boxes, got Tensor"),
        ({"boxes": [Boxes([[0, 0, 9, 9]])] * 2}, "for each of 1 images, got 2"),
        ({"boxes": [Boxes([[90, 90, 99, 99]])]}, "boxes of image 0.*outside the image"),
        ({"images": [torch.zeros(48, 64, 3)]}, r"expected shape \(3, H, W\)"),
        ({"proposal_scores": [torch.ones(2)]}, r"expected shape \(1,\), got \(2,\)"),
        ({"proposal_scores": [torch.tensor([7.0])]}, r"numbers in \[0, 1\]"),
        ({"proposal_scores": [torch.tensor([float("nan")])]}, r"numbers in \[0, 1\]"),
        ({"masks": "yes"}, "masks: expected one of"),
    ],
)
def test_invalid_regions_are_refused(changes, message):
    right = {"images": [as_inputs(0)["image"]], "boxes": [Boxes([[0, 0, 9, 9]])], "proposal_scores": [torch.ones(1)]}
    recognizer = tiny_model().recognizer
    assert not recognizer(**right)[0].scores.requires_grad
    with pytest.raises(ValueError, match=message):
        recognizer(**{**right, **changes})


@pytest.mark.parametrize("name", ["RegionSpot", "CropBaseline"])
def test_region_embeddings_of_instances(name):
    """Those of a detection are its region's, and give its class probabilities."""
    key = "MODEL.REGIONSPOT.REGION_EMBEDDINGS"
    model = tiny_model("MODEL.META_ARCHITECTURE", name, key, True)
    [output] = model([as_inputs(0)])
    regions, detections = output["regions"], output["instances"]
    embeddings = regions.region_embeddings
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(regions)))
    assert torch.equal(detections.region_embeddings, embeddings[detections.region_indices])
    recognizer = model.recognizer
    scale = recognizer.vision_language.clip_model.logit_scale.exp()
    probabilities = (scale * embeddings @ recognizer.classifier.embeddings.t()).softmax(dim=1)
    torch.testing.assert_close(regions.top_scores, probabilities.sort(dim=1, descending=True).values, atol=1e-5, rtol=0)
    [plain] = tiny_model("MODEL.META_ARCHITECTURE", name)([as_inputs(0)])
    assert not plain["instances"].has("region_embeddings") and not plain["regions"].has("region_embeddings")
