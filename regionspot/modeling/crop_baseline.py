"""CLIP on crops, the paper's baselines (table 1): nothing is trained, CLIP sees each region's crop alone."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from torch.nn import functional as F

from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.modeling.meta_arch import RegionSpot
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import ImageFeatures


class CropRecognizer(RegionRecognizer):
    """A recognizer whose logits are CLIP's own image-text similarities of crops.

    A box is cropped and resized to CLIP's square as whole images are (aspect ratio not kept); in a mask crop the pixels
    outside SAM's mask of the box are set to CLIP's mean color.
    """

    @configurable
    def __init__(self, *, masked: bool = False, batch_size: int = 64, **arguments: object) -> None:
        """Take mask crops if ``masked``, ``batch_size`` at once; ``arguments`` are those of ``RegionRecognizer``."""
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.masked, self.batch_size = masked, batch_size
        self.needs_masks = masked

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT.CROP
        if GeometricEnsemble.from_config(cfg) is not None:
            raise ValueError(
                "CropBaseline: MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE is for RegionSpot; set ALPHA and BETA to 0"
            )
        return {**RegionRecognizer.from_config(cfg), "masked": node.MASKED, "batch_size": node.BATCH_SIZE}

    @classmethod
    def sharing(cls, recognizer: RegionRecognizer, masked: bool = False) -> "CropRecognizer":
        """Return CLIP on crops over the frozen parts of ``recognizer``, in eval mode; vocabularies are not shared."""
        return cls(
            localizer=recognizer.localizer,
            vision_language=recognizer.vision_language,
            knowledge_integration=recognizer.knowledge_integration,
            text_encoder=recognizer.classifier.text_encoder,
            rule=recognizer.rule,
            deep_range=recognizer.deep_range,
            masked=masked,
        ).eval()

    def encode_images(
        self, images: list[torch.Tensor], with_embeddings: bool = True, with_feature_map: bool = False
    ) -> ImageFeatures:
        """Run SAM's image encoder alone by default: crops of the images take the place of the feature map."""
        return replace(super().encode_images(images, with_embeddings, with_feature_map), images=images)

    def locate_boxes(
        self, images: list[torch.Tensor], boxes: list[Boxes], with_masks: bool, features: ImageFeatures | None
    ) -> tuple[ImageFeatures, list[LocalizerOutput]]:
        """Run SAM for masks only, and CLIP on crops only."""
        if features is None:
            features = self.encode_images(images, with_masks or self.masked)
        if not with_masks and not self.masked:
            return features, [LocalizerOutput({}, None, None) for x in boxes]
        return super().locate_boxes(images, boxes, True, features)

    def region_embeddings(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        features: ImageFeatures,
        located: list[LocalizerOutput],
    ) -> list[torch.Tensor]:
        # crops of all images together fill a batch; one batch, and a chunk of masks at full size, is alive at a time
        crops = self._crops(images, boxes, features.sizes, located)
        embeddings = [self.vision_language.pixel_mean.new_zeros(0, self.vision_language.text_dim)]
        while batch := list(itertools.islice(crops, self.batch_size)):
            embeddings.append(self._encode(batch))
        return list(torch.cat(embeddings).split([len(image_boxes) for image_boxes in boxes]))

    def _crops(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        sizes: list[tuple[int, int]],
        located: list[LocalizerOutput],
    ) -> Iterator[torch.Tensor]:
        """Yield the preprocessed crop of each box of each image."""
        for image, image_boxes, size, output in zip(images, boxes, sizes, located):
            for box, mask in zip(image_boxes.tensor.tolist(), self._masks(output, size)):
                yield self._crop(image, box, mask)

    def _masks(self, output: LocalizerOutput, size: tuple[int, int]) -> Iterator[torch.Tensor | None]:
        """Yield each box's mask at the image's size, or None forever for box crops."""
        if not self.masked:
            return itertools.repeat(None)
        assert output.masks is not None
        chunks = self.localizer.mask_upsampler(size).chunks(output.masks, None, size)
        return itertools.chain.from_iterable(chunks)

    def _crop(self, image: torch.Tensor, box: list[float], mask: torch.Tensor | None) -> torch.Tensor:
        height, width = image.shape[-2:]
        # at least one pixel, inside the image, also for a box between two pixels or past the border
        x0, y0 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
        x1, y1 = min(max(round(box[2]), x0 + 1), width), min(max(round(box[3]), y0 + 1), height)
        crop = image[:, y0:y1, x0:x1].to(self.vision_language.pixel_mean.device, torch.float32)
        if mask is not None:
            crop = torch.where(mask[y0:y1, x0:x1].to(crop.device), crop, self.vision_language.pixel_mean * 255)
        return self.vision_language.preprocess(crop)

    def _encode(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return F.normalize(self.vision_language.embed_images(torch.stack(crops)).float(), dim=1)


@META_ARCH_REGISTRY.register()
class CropBaseline(RegionSpot):
    """CLIP on box crops or mask crops (paper, table 1), on the same boxes, vocabulary and evaluators as RegionSpot."""

    @classmethod
    def build_recognizer(cls, cfg: CfgNode) -> RegionRecognizer:
        return CropRecognizer(cfg)
