"""Small detectors with a RegionSpot head, and their inputs."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from regionspot.config import load_config

from ...helpers import NAMES, ROOT, as_inputs

HEAD = "MODEL.REGIONSPOT.HEAD."
REFINED = (HEAD + "BOXES", "refined")
GIVEN = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
NO_HEAD = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
NO_NMS = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0)


def rcnn_config(*overrides):
    vocabulary = ("MODEL.REGIONSPOT.VOCABULARY", ",".join(NAMES))
    return load_config(ROOT / "tests" / "tiny_rcnn.yaml", [*vocabulary, *overrides])


def rcnn(*overrides):
    torch.manual_seed(0)
    return build_model(rcnn_config(*overrides)).eval()


def bgr(inputs):
    return {**inputs, "image": inputs["image"].flip(0)}


def with_proposals(index, size=(48, 64), output=None):
    """Return a drawn scene with its boxes as scored proposals, in a host's format."""
    inputs = as_inputs(index, size)
    proposals = Instances(size, proposal_boxes=inputs["instances"].gt_boxes)
    proposals.objectness_logits = torch.linspace(2, -1, len(proposals))
    height, width = output or size
    return {**inputs, "proposals": proposals, "height": height, "width": width}


def train(model, batches=3, rate=1e-2):
    """Train all parameters that take a gradient, as a host does; return the losses."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.1)
    losses = []
    for step in range(batches):
        with EventStorage():
            losses.append(model([bgr(as_inputs(2 * step)), bgr(as_inputs(2 * step + 1))]))
        optimizer.zero_grad()
        sum(losses[-1].values()).backward()
        optimizer.step()
    return losses
