"""The detector around a RegionSpot head: frozen while the head learns."""

from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.roi_heads.roi_heads import RegionSpotROIHeads


@META_ARCH_REGISTRY.register()
class RegionSpotRCNN(GeneralizedRCNN):
    """A ``GeneralizedRCNN`` with a RegionSpot head, in which only the knowledge integration learns.

    Everything beside the head takes no gradient and stays in eval mode (no running means, no dropout, no losses of its
    own), unless the head's ``freeze`` is False (``MODEL.REGIONSPOT.HEAD.FREEZE_HOST``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.roi_heads, RegionSpotROIHeads):
            raise ValueError(
                "MODEL.META_ARCHITECTURE RegionSpotRCNN: expected MODEL.ROI_HEADS.NAME RegionSpotROIHeads, got "
                f"{type(self.roi_heads).__name__}; a detector with other heads is a GeneralizedRCNN"
            )
        self.train(self.training)

    def train(self, mode: bool = True) -> "RegionSpotRCNN":
        super().train(mode)
        if self.roi_heads.freeze:
            _freeze_parts(self)
        return self


def freeze_host(model: nn.Module) -> None:
    """Freeze a detector around its ``RegionRecognizer``; only the knowledge integration learns.

    The children of ``model`` that do not hold the recognizer take no gradient and stay in eval mode, also after
    ``model.train()``. A ``RegionSpotRCNN`` does this by itself.
    """
    _freeze_parts(model)
    model.register_forward_pre_hook(_freeze_parts)  # model.train() has set all parts to train


def _freeze_parts(model: nn.Module, _: Any = None) -> None:
    for child in model.children():
        if not any(isinstance(module, RegionRecognizer) for module in child.modules()):
            child.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, RegionSpotROIHeads):
            module.host_is_frozen = True
