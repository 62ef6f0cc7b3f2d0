"""Which parameters of a detector with a RegionSpot head learn."""

import copy

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage

from regionspot import RegionSpotRCNN, freeze_host

from ...helpers import as_inputs
from .hosts import HEAD, REFINED, bgr, rcnn, train


def test_training_changes_knowledge_integration_only():
    model = rcnn(*REFINED, "MODEL.ROI_HEADS.NUM_CLASSES", 1)
    before = copy.deepcopy(model.state_dict())  # with the running statistics of BatchNorm
    losses = train(model)
    assert all(set(step) == {"loss_regionspot"} for step in losses)
    after = model.state_dict()
    for key, value in before.items():
        trained = key.startswith("roi_heads.recognizer.knowledge_integration.")
        assert torch.equal(after[key], value) != trained, key


class LateParts(RegionSpotRCNN):
    """A detector that, as ``PanopticFPN``, gets a part after its heads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.late = torch.nn.BatchNorm2d(3)


def test_frozen_host_learns_nothing():
    parts = {key: getattr(rcnn(), key) for key in ("backbone", "proposal_generator", "roi_heads")}
    late = LateParts(**parts, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3).train()
    assert not any(p.requires_grad for p in late.late.parameters()) and not late.late.training
    assert not late.backbone.training and late.roi_heads.training
    free = rcnn(HEAD + "FREEZE_HOST", False).train()
    assert all(p.requires_grad for p in free.backbone.parameters()) and free.backbone.training


def test_plain_rcnn_is_frozen_explicitly_or_refused():
    """Any detector may hold the head; it is never trained by accident."""
    for _ in range(2):
        model = rcnn("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
        assert type(model) is GeneralizedRCNN and len(model([bgr(as_inputs(0))])[0]["instances"])
        assert all(p.requires_grad for p in model.backbone.parameters())
        with EventStorage(), pytest.raises(ValueError, match="not frozen: set MODEL.META_ARCHITECTURE RegionSpotRCNN"):
            model.train()([bgr(as_inputs(0))])
    freeze_host(model)
    learning = [key for key, value in model.named_parameters() if value.requires_grad]
    assert learning and all("knowledge_integration" in key for key in learning)
    [losses] = train(model, 1)
    assert set(losses) == {"loss_regionspot"} and not model.backbone.training
    with pytest.raises(ValueError, match="expected MODEL.ROI_HEADS.NAME RegionSpotROIHeads, got StandardROIHeads"):
        rcnn("MODEL.ROI_HEADS.NAME", "StandardROIHeads")


def test_unfrozen_host_learns():
    model = rcnn(*REFINED, HEAD + "FREEZE_HOST", False)
    before = copy.deepcopy(model.state_dict())
    [losses] = train(model, 1)
    assert set(losses) == {"loss_regionspot", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"backbone", "proposal_generator", "roi_heads"}
    assert torch.equal(
        before["roi_heads.recognizer.localizer.sam.mask_decoder.iou_token.weight"],
        model.roi_heads.recognizer.localizer.sam.mask_decoder.iou_token.weight,
    )
