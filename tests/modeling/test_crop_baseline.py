"""The baseline's logits equal those of CLIP itself on the same crops."""

import pytest
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

from regionspot.modeling import CropBaseline
from regionspot.modeling.crop_baseline import CropRecognizer

from ..helpers import NAMES, as_inputs, tiny_config, tiny_model


def baseline(*overrides):
    torch.manual_seed(0)
    model = build_model(tiny_config("MODEL.META_ARCHITECTURE", "CropBaseline", *overrides)).eval()
    model.set_vocabulary(NAMES)
    assert isinstance(model, CropBaseline)
    return model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [2, 64])
def test_equals_clip_itself(masked, batch):
    model = baseline("MODEL.REGIONSPOT.CROP.MASKED", masked, "MODEL.REGIONSPOT.CROP.BATCH_SIZE", batch)
    batch = [as_inputs(3, (48, 64)), as_inputs(4, (60, 40)), as_inputs(5, (50, 50), 0)]
    outputs = model(batch)
    vision, clip_model = model.recognizer.vision_language, model.recognizer.vision_language.clip_model
    for inputs, output in zip(batch, outputs):
        boxes = inputs["instances"].gt_boxes
        masks = None
        if masked and len(boxes):
            model.masks = "bitmask"
            [detections] = model.recognizer([inputs["image"]], [boxes], masks="bitmask")
            masks = [detections.pred_masks[detections.region_indices == i][0] for i in range(len(boxes))]
        for i, (x0, y0, x1, y1) in enumerate(boxes.tensor.int().tolist()):
            crop = inputs["image"][:, y0:y1, x0:x1].float()
            if masks is not None:
                crop = torch.where(masks[i][y0:y1, x0:x1], crop, vision.pixel_mean * 255)
            with torch.no_grad():
                seen = F.normalize(clip_model.encode_image(vision.preprocess(crop)[None]), dim=1)
                logits = clip_model.logit_scale.exp() * seen @ model.recognizer.classifier.embeddings.t()
            expected = logits.softmax(dim=1)[0].sort(descending=True)
            torch.testing.assert_close(output["regions"].top_scores[i], expected.values, atol=1e-5, rtol=0)
            assert output["regions"].top_classes[i, 0] == expected.indices[0]
        assert len(output["instances"]) == len(boxes) * len(NAMES)


def test_crops_of_all_images_fill_batches():
    model, batch_sizes = baseline("MODEL.REGIONSPOT.CROP.BATCH_SIZE", 3), []
    batch = [as_inputs(i, (48, 64), num_objects) for i, num_objects in enumerate((1, 0, 3, 2, 4))]
    alone = [model([inputs])[0]["regions"] for inputs in batch]
    visual = model.recognizer.vision_language.clip_model.visual
    visual.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(output)))
    for regions, output in zip(alone, model(batch)):
        torch.testing.assert_close(output["regions"].top_scores, regions.top_scores, atol=1e-6, rtol=0)
        assert torch.equal(output["regions"].top_classes, regions.top_classes)
    num_boxes = sum(len(inputs["instances"]) for inputs in batch)
    assert num_boxes == 8 and batch_sizes == [3, 3, 2]


def test_crop_rounding():
    model, inputs = baseline(), as_inputs(3)
    inputs["instances"] = inputs["instances"][:2]
    inputs["instances"].gt_boxes.tensor[:] = torch.tensor([[3.6, 4.4, 20.6, 22.7], [9.9, 8.1, 30.4, 31.2]])
    vision = model.recognizer.vision_language
    crops = [inputs["image"][:, 4:23, 3:21], inputs["image"][:, 8:31, 9:30]]
    with torch.no_grad():
        seen = vision.clip_model.encode_image(torch.stack([vision.preprocess(crop.float()) for crop in crops]))
    logits = vision.clip_model.logit_scale.exp() * F.normalize(seen, dim=1) @ model.recognizer.classifier.embeddings.t()
    [output] = model([inputs])
    expected = logits.softmax(dim=1).sort(dim=1, descending=True).values
    torch.testing.assert_close(output["regions"].top_scores, expected, atol=1e-5, rtol=0)


def test_crops_at_the_border_and_below_a_pixel():
    model = baseline()
    inputs = as_inputs(0)
    inputs["instances"].gt_boxes.tensor[:2] = torch.tensor([[63.2, 47.1, 63.4, 47.2], [-5.0, -5, 0.4, 0.4]])
    [output] = model([inputs])
    assert output["instances"].scores.isfinite().all()


@pytest.mark.parametrize("architecture", ["box crops", "mask crops", "box crops with masks"])
def test_sam_runs_for_masks_only(architecture, monkeypatch):
    masked, with_masks = architecture == "mask crops", architecture == "box crops with masks"
    model = baseline("MODEL.REGIONSPOT.CROP.MASKED", masked, "MODEL.MASK_ON", with_masks)
    calls = []
    for name in ("encode_images", "forward"):
        original = getattr(model.recognizer.localizer, name)
        monkeypatch.setattr(
            model.recognizer.localizer,
            name,
            lambda *args, original=original, name=name: calls.append(name) or original(*args),
        )
    [output] = model([as_inputs(0)])
    assert output["instances"].has("pred_masks") == with_masks
    assert calls == (["encode_images", "forward"] if masked or with_masks else [])


@pytest.mark.parametrize("masked", [False, True])
def test_baseline_over_the_parts_of_another_recognizer(masked):
    model = baseline("MODEL.REGIONSPOT.CROP.MASKED", masked)
    shared = CropRecognizer.sharing(tiny_model().recognizer, masked)  # of the same seed
    shared.set_vocabulary(NAMES)
    inputs = as_inputs(3)
    [expected] = model([inputs])
    [result] = shared.recognize([inputs["image"]], [inputs["instances"].gt_boxes])
    torch.testing.assert_close(result.regions.top_scores, expected["regions"].top_scores, atol=1e-5, rtol=0)
    assert torch.equal(result.regions.top_classes, expected["regions"].top_classes)
