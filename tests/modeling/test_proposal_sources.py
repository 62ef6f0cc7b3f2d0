"""Proposals that are computed at inference; tests/engine/test_evaluate.py evaluates with them."""

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from torch import nn

from regionspot.modeling.proposal_sources import SamAutomaticProposals, build_proposal_source, to_proposals

from ..helpers import as_inputs, tiny_config, tiny_model


def test_proposals_are_clipped_and_have_area():
    boxes = torch.tensor([[-4.0, 2, 10, 60], [70, 5, 90, 9], [3, 3, 3, 8], [1, 1, 5, 5]])
    proposals = to_proposals(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), (48, 64))
    assert proposals.proposal_boxes.tensor.tolist() == [[0, 2, 10, 48], [1, 1, 5, 5]]
    assert proposals.scores.tolist() == pytest.approx([0.9, 0.6]) and proposals.image_size == (48, 64)


@pytest.mark.parametrize(
    ("iou", "stability", "nms"), [(-10.0, -1.0, 0.7), (0.0, 0.0, 1.0), ("median", -1.0, 0.9), (-10.0, "median", 0.5)]
)
def test_sam_automatic_boxes_and_scores(iou, stability, nms):
    localizer, image = tiny_model(names=None).recognizer.localizer, as_inputs(0)["image"]
    settings = {"points_per_side": 5, "pred_iou_thresh": -10.0, "stability_score_thresh": -1.0, "box_nms_thresh": nms}
    masks = SamAutomaticMaskGenerator(localizer.sam, **settings).generate(image.permute(1, 2, 0).numpy())
    for key, measure, value in (("pred_iou", "predicted_iou", iou), ("stability_score", "stability_score", stability)):
        settings[f"{key}_thresh"] = np.median([mask[measure] for mask in masks]) if value == "median" else value
    masks = SamAutomaticMaskGenerator(localizer.sam, **settings).generate(image.permute(1, 2, 0).numpy())
    [proposals] = SamAutomaticProposals(localizer, **settings)([image.float()])
    assert len(proposals) == len(masks) > 0 and proposals.image_size == (48, 64)
    for box, score, mask in zip(proposals.proposal_boxes.tensor, proposals.scores, masks):
        x, y, width, height = mask["bbox"]  # ends at the last pixel inside
        assert box.tolist() == [x, y, min(x + width + 1, 64), min(y + height + 1, 48)]
        assert float(score) == pytest.approx(min(max(mask["predicted_iou"], 0), 1), abs=1e-5)


def test_empty_masks_are_no_proposals(monkeypatch):
    localizer, image = tiny_model(names=None).recognizer.localizer, as_inputs(0)["image"]
    masks = torch.full((2, 16, 16), -5.0)
    masks[1, 2:9, 3:12] = 5.0
    monkeypatch.setattr(localizer, "all_masks", lambda *_: iter([(torch.tensor([0.9, 0.8]), masks)]))
    for stability in (0.0, 0.5):
        settings = {"points_per_side": 5, "pred_iou_thresh": 0, "stability_score_thresh": stability}
        [proposals] = SamAutomaticProposals(localizer, **settings)([image.float()])
        assert proposals.scores.tolist() == pytest.approx([0.8])


def test_sources_are_chosen_by_config():
    node = "MODEL.REGIONSPOT.PROPOSALS.SOURCE"
    localizer = tiny_model(names=None).recognizer.localizer
    assert all(build_proposal_source(tiny_config(node, name), localizer) is None for name in ("auto", "gt", "file"))
    assert isinstance(build_proposal_source(tiny_config(node, "sam_automatic"), localizer), SamAutomaticProposals)
    with pytest.raises(ValueError, match="expected one of auto, gt, file, sam_automatic, detector; got 'grid'"):
        build_proposal_source(tiny_config(node, "grid"), localizer)
    with pytest.raises(ValueError, match="expected SAM as localizer, got Linear"):
        build_proposal_source(tiny_config(node, "sam_automatic"), nn.Linear(1, 1))


def test_sam_encodes_an_image_once(monkeypatch):
    node = "MODEL.REGIONSPOT.PROPOSALS."
    settings = ("SAM_AUTOMATIC.PRED_IOU_THRESH", -10.0, node + "SAM_AUTOMATIC.STABILITY_SCORE_THRESH", -1.0)
    model = tiny_model(node + "SOURCE", "sam_automatic", node + settings[0], *settings[1:])
    localizer, encoded = model.recognizer.localizer, []
    original = localizer.encode_images
    monkeypatch.setattr(localizer, "encode_images", lambda images: encoded.append(len(images)) or original(images))
    outputs = model([as_inputs(0), as_inputs(1, (60, 40))])
    assert encoded == [2] and all(len(output["regions"]) for output in outputs)
