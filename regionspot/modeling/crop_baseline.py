"""CLIP on crops, the paper's baselines: no module is trained, each region is cut out and shown to CLIP alone."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from torch.nn import functional as F

from regionspot.modeling.localizer import LocalizerOutput
from regionspot.modeling.meta_arch import RegionSpot
from regionspot.modeling.recognizer import ImageFeatures, RegionRecognizer
from regionspot.structures import Prompts


class CropRecognizer(RegionRecognizer):
    """A recogniser whose logits are CLIP's own image-text similarities of crops.

    A box is cut out and brought to CLIP's square as whole images are (aspect ratio not kept); for mask crops what is
    not under SAM's mask of the box is blanked with CLIP's mean colour.
    """

    @configurable
    def __init__(self, *, masked: bool = False, batch_size: int = 64, **arguments: object) -> None:
        """
        Args:
            masked: mask crops instead of box crops.
            batch_size: crops encoded at once.
            arguments: as ``RegionRecognizer``'s.
        """
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.masked = masked
        self.batch_size = batch_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT.CROP
        return {**RegionRecognizer.from_config(cfg), "masked": node.MASKED, "batch_size": node.BATCH_SIZE}

    def region_logits(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        features: ImageFeatures,
        located: list[LocalizerOutput],
    ) -> list[torch.Tensor]:
        logits = []
        for i, (image, image_boxes) in enumerate(zip(images, boxes)):
            masks = self._masks(features, i, image_boxes, located[i].masks) if self.masked else None
            parts = [
                self._encode([self._crop(image, box, None if masks is None else masks[n]) for n, box in part])
                for part in _chunks(list(enumerate(image_boxes.tensor.tolist())), self.batch_size)
            ]
            empty = [self.vision_language.pixel_mean.new_zeros(0, self.vision_language.text_dim)]
            logits.append(self.score(torch.cat(parts or empty), with_background=True))
        return logits

    def _masks(
        self, features: ImageFeatures, index: int, boxes: Boxes, masks: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return each box's mask at the image's size, from SAM's logits ``masks`` if they were decoded before."""
        if masks is None:
            single = ImageFeatures(features.embeddings[index : index + 1], None, [features.sizes[index]])
            [output] = self.locate(single, [Prompts(boxes=boxes.tensor)], with_masks=True)
            masks = output.masks
        assert masks is not None
        size = features.sizes[index]
        return list(self.localizer.upsample_masks(masks, size, size))

    def _crop(self, image: torch.Tensor, box: list[float], mask: torch.Tensor | None) -> torch.Tensor:
        height, width = image.shape[-2:]
        x0, y0 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
        x1, y1 = min(max(round(box[2]), x0 + 1), width), min(max(round(box[3]), y0 + 1), height)
        crop = image[:, y0:y1, x0:x1].to(self.vision_language.pixel_mean.device, torch.float32)
        if mask is not None:
            crop = torch.where(mask[y0:y1, x0:x1].to(crop.device), crop, self.vision_language.pixel_mean * 255)
        return self.vision_language.preprocess(crop)

    def _encode(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return F.normalize(self.vision_language.clip_model.encode_image(torch.stack(crops)).float(), dim=1)


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@META_ARCH_REGISTRY.register()
class CropBaseline(RegionSpot):
    """CLIP on box crops or mask crops (paper, table 1), on the same boxes, vocabulary and evaluators as RegionSpot."""

    @classmethod
    def build_recognizer(cls, cfg: CfgNode) -> RegionRecognizer:
        return CropRecognizer(cfg)
