"""The recognizer, which all ways in share: localizer, vision-language model and knowledge integration in one module."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from regionspot.checkpoint.loading import PARTS, frozen_sources, load_weights
from regionspot.modeling.classifier import TextClassifier
from regionspot.modeling.geometric_ensemble import KEY as ENSEMBLE
from regionspot.modeling.geometric_ensemble import GeometricEnsemble, pool_dense_features
from regionspot.modeling.knowledge_integration import KnowledgeIntegration
from regionspot.modeling.localizers import Localizer, LocalizerOutput, build_localizer
from regionspot.modeling.localizers.localizer import MASK_STAGE
from regionspot.modeling.losses import region_focal_loss
from regionspot.modeling.mask_pooling import locate_with_coverage
from regionspot.modeling.masks import RegionMasks, check_mask_format
from regionspot.modeling.open_vocabulary import BACKGROUND, OpenVocabulary
from regionspot.modeling.postprocessing import DetectionRule, Recognition
from regionspot.modeling.vision_language import VisionLanguageModel, build_vision_language_model
from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.structures import ImageFeatures, Prompts, check_regions
from regionspot.utils.images import check_deep_range
from regionspot.vocabulary import load_vocabulary


class RegionRecognizer(OpenVocabulary):
    """Images and regions in, class logits of the regions out."""

    needs_masks = False  # a baseline may recognize masks

    @configurable
    def __init__(
        self,
        *,
        localizer: Localizer,
        vision_language: VisionLanguageModel,
        knowledge_integration: KnowledgeIntegration,
        text_encoder: TextEncoder,
        vocabulary: list[str] | None = None,
        rule: DetectionRule | None = None,
        background: list[str] | None = None,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        with_embeddings: bool = False,
        ensemble: GeometricEnsemble | None = None,
        deep_range: Sequence[float] = (),
    ) -> None:
        """
        Args:
            localizer: frozen SAM.
            vision_language: frozen CLIP.
            knowledge_integration: the trained module.
            text_encoder: encoder of class names, over the same CLIP.
            vocabulary: class names to start with.
            rule: how detections follow from logits.
            background: names of what is no object ("sky"): a region whose best name is one of them is unknown.
            focal_alpha, focal_gamma: of the training loss.
            with_embeddings: add ``region_embeddings`` to all ``Instances``.
            ensemble: how CLIP's own scores of dense features join the module's at inference; None for the module alone.
            deep_range: of the images that are examples of a vocabulary, see ``decode_image``.
        """
        super().__init__()
        if ensemble is not None:
            ensemble.check(vision_language, rule)
        self.ensemble = ensemble
        self.localizer = localizer
        self.vision_language = vision_language
        self.knowledge_integration = knowledge_integration
        self.classifier = TextClassifier(text_encoder)
        self.rule = rule or DetectionRule()
        self.background = list(background or [])
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.with_embeddings = with_embeddings
        self.deep_range = check_deep_range(deep_range)
        if background:
            self.classifier.add(BACKGROUND, background)
        if vocabulary:  # encoded when first needed: CLIP's weights are still to come
            self.classifier.add("default", vocabulary)
            self.classifier.active = "default"
        vision_language.clip_model.register_load_state_dict_post_hook(self._clip_has_changed)
        self.weight_sources = dict.fromkeys(PARTS, "")  # the file that each part was loaded from

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT
        if node.PRECISION == "fp16" and cfg.MODEL.DEVICE == "cpu":
            raise ValueError("MODEL.REGIONSPOT.PRECISION: fp16 needs a CUDA device; on a CPU use bf16 or float32")
        localizer, vision_language = build_localizer(cfg), build_vision_language_model(cfg)
        return {
            "localizer": localizer,
            "vision_language": vision_language,
            "knowledge_integration": KnowledgeIntegration(
                cfg, token_dim=localizer.token_dim, clip_width=vision_language.width, text_dim=vision_language.text_dim
            ),
            "text_encoder": TextEncoder(
                vision_language, node.CLIP.TEMPLATES, node.CLIP.NAME_STYLE, node.CLIP.TEXT_BATCH_SIZE
            ),
            "vocabulary": load_vocabulary(node.VOCABULARY) if node.VOCABULARY else None,
            "rule": DetectionRule.from_config(cfg),
            "background": list(node.UNKNOWN.BACKGROUND),
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
            "with_embeddings": node.REGION_EMBEDDINGS,
            "ensemble": GeometricEnsemble.from_config(cfg),
            "deep_range": cfg.INPUT.DEEP_RANGE,
        }

    @classmethod
    def from_pretrained(cls, cfg: CfgNode, weights: str = "", **arguments: Any) -> "RegionRecognizer":
        """Build the recognizer of ``cfg`` with SAM's and CLIP's weights and a RegionSpot checkpoint, "" for none.

        ``arguments`` are the constructor's, in place of those that follow from ``cfg``.
        """
        recognizer = cls(cfg, **arguments)
        load_weights(recognizer, weights, frozen_sources(cfg))
        return recognizer.to(cfg.MODEL.DEVICE)

    @property
    def settings(self) -> dict[str, Any]:
        """What the trained module learned with, beside weights and shapes; a checkpoint records it."""
        inputs = {"TOKEN_STAGE": self.localizer.token_stage, "FEATURES": self.vision_language.features}
        return {**self.knowledge_integration.settings, **inputs}

    def _clip_has_changed(self, *_: object) -> None:
        self.classifier.forget_embeddings()

    def encode_images(
        self, images: list[torch.Tensor], with_embeddings: bool = True, with_feature_map: bool = True
    ) -> ImageFeatures:
        """Run the image encoders of SAM and CLIP on (3, H, W) RGB images in [0, 255], of any sizes."""
        feature_map = dense_features = None
        if with_feature_map and self.ensemble is not None:
            feature_map, dense_features = self.vision_language.encode_images_densely(images)
        elif with_feature_map:
            feature_map = self.vision_language.encode_images(images)
        embeddings = self.localizer.encode_images(images) if with_embeddings else None
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageFeatures(embeddings, feature_map, sizes, dense_features=dense_features)

    def position_tokens(self, images: list[torch.Tensor], boxes: Sequence[Boxes]) -> list[torch.Tensor]:
        """Return the position-aware tokens of boxes, as ``classify`` takes them; CLIP is not run."""
        features = self.encode_images(images, with_feature_map=False)
        return [output.tokens for output in self.locate(features, _box_prompts(boxes))]

    def locate(
        self,
        features: ImageFeatures,
        prompts: list[Prompts],
        with_masks: bool = False,
        stages: Sequence[str] = (),
        with_iou: bool = False,
    ) -> list[LocalizerOutput]:
        """Decode each image's prompts (boxes and points in that image's own pixels; boxes are clipped to it).

        The other arguments are ``Localizer.forward``'s; ``stages`` are by default those that ``classify`` takes.
        """
        assert features.embeddings is not None
        device, scaled = features.embeddings.device, []
        for (height, width), image_prompts in zip(features.sizes, prompts, strict=True):
            input_height, input_width = self.localizer.input_size((height, width))
            clipped = image_prompts.to(device).clip((height, width))
            # the sides of SAM's input are whole pixels: x and y have factors of their own
            scaled.append(clipped.scale(input_width / width, input_height / height))
        with_coverage = not stages and features.dense_features is not None
        if not stages:
            own_stage = self.localizer.token_stage
            stages = (own_stage, MASK_STAGE) if self.knowledge_integration.mask_pooling else (own_stage,)
        if with_coverage or MASK_STAGE in stages:
            return locate_with_coverage(self.localizer, features, scaled, with_masks, stages, with_iou)
        return self.localizer(features.embeddings, scaled, with_masks, stages, with_iou)

    def classify(
        self,
        tokens: list[torch.Tensor],
        feature_map: torch.Tensor | None,
        vocabularies: Sequence[str | torch.Tensor] = (),
        with_background: bool = False,
    ) -> list[torch.Tensor]:
        """Return the logits of regions (paper, sections 3.3 and 3.4).

        Args:
            tokens: B tensors, (N_i, D) float, the stages of ``get_token_stages`` side by side.
            feature_map: (B, L, width) float semantic feature map, or None without CLIP's features.
            vocabularies: for each image the key of its vocabulary or its embeddings; "" is the one in use, as is an
                empty sequence for all images.
            with_background: append the logits of the background names.

        Returns:
            B tensors, (N_i, K_i) float32.
        """
        return self.score_images(self.knowledge_integration(tokens, feature_map), vocabularies, with_background)

    def loss(
        self,
        images: list[torch.Tensor],
        boxes: Sequence[Boxes],
        classes: Sequence[torch.Tensor],
        vocabularies: Sequence[str] = (),
        tokens: list[torch.Tensor] | None = None,
        feature_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the training loss, a scalar, of regions whose classes are known (paper, section 3.4).

        Args:
            images: B images, (3, H, W) RGB in [0, 255]; not needed with both ``tokens`` and ``feature_map``.
            boxes: B ``Boxes``, N_i each, XYXY in the image's own pixels; not needed with ``tokens``.
            classes: B tensors, (N_i,) int64, the regions' indices in their image's vocabulary.
            vocabularies: keys, as for ``classify``.
            tokens: stored position-aware tokens, as for ``classify``; SAM is then not run.
            feature_map: stored semantic feature map, as for ``classify``; CLIP's image encoder is then not run.
        """
        if tokens is None:
            tokens = self.position_tokens(images, boxes)
        if feature_map is None:
            feature_map = self.vision_language.encode_images(images)
        logits = self.classify(tokens, feature_map, vocabularies)
        targets = [image_classes.to(x.device, non_blocking=True) for image_classes, x in zip(classes, logits)]
        return region_focal_loss(logits, targets, self.focal_alpha, self.focal_gamma)

    def forward(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        proposal_scores: list[torch.Tensor | None] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
        masks: str = "",
        classes: torch.Tensor | None = None,
    ) -> list[Instances]:
        """Recognize the boxes of images.

        Args:
            images: B images, (3, H, W) RGB, uint8 or float in [0, 255], of any sizes.
            boxes: B ``Boxes``, N_i each, XYXY in the image's own pixels; N_i may be 0.
            proposal_scores: for each image (N_i,) float scores of its boxes in [0, 1], or None.
            output_sizes: (height, width) of the output's boxes and masks; the images' own by default.
            masks: "bitmask" and "lazy" give ``pred_masks``, too, "rle" ``pred_masks_rle``, "" neither.
            classes: (K,) bool, which classes of the vocabulary may become detections; all by default.

        Returns:
            B ``Instances``, see ``Recognition.detections``; on request with ``pred_masks`` (bool, at output size;
            "lazy": a ``RegionMasks``, which Detectron2's ``detector_postprocess`` takes) or ``pred_masks_rle`` (COCO's
            compressed RLE; the detections of a box share one).

        Raises:
            ValueError: not as many of each, or an invalid image, box or score.
        """
        check_regions(images, boxes, proposal_scores)
        results = self.recognize(images, boxes, proposal_scores, output_sizes, masks, classes)
        return [result.detections for result in results]

    @torch.no_grad()
    def recognize(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        proposal_scores: list[torch.Tensor | None] | None = None,
        output_sizes: list[tuple[int, int]] | None = None,
        masks: str = "",
        classes: torch.Tensor | None = None,
        features: ImageFeatures | None = None,
    ) -> list[Recognition]:
        """Recognize the boxes of images, which the caller has checked, and report all regions.

        Arguments are as for ``forward``, and ``features`` of the images if they are known already.
        """
        check_mask_format(masks)
        features, located = self.locate_boxes(images, boxes, bool(masks), features)
        embeddings = self.region_embeddings(images, boxes, features, located)
        dense = self.dense_embeddings(features, located)
        # (N_i, K + background)
        logits = self.score_images(embeddings, with_background=True, dense_embeddings=dense)
        results = []
        for i, (image_logits, output) in enumerate(zip(logits, located)):
            size = features.sizes[i]
            output_size = output_sizes[i] if output_sizes else size
            scaled = boxes[i].clone()
            scaled.scale(output_size[1] / size[1], output_size[0] / size[0])
            scaled.clip(output_size)
            scaled = Boxes(scaled.tensor.to(image_logits.device, non_blocking=True))
            scores = proposal_scores[i] if proposal_scores else None
            result = self.rule.detect(scaled, image_logits, scores, output_size, len(self.background), classes)
            rows = result.detections.region_indices
            if self.with_embeddings:
                result.regions.region_embeddings = F.normalize(embeddings[i].float(), dim=1)
                result.detections.region_embeddings = result.regions.region_embeddings[rows]
            if masks:
                assert output.masks is not None
                RegionMasks(output.masks, rows, self.localizer.mask_upsampler(size)).attach(result.detections, masks)
            results.append(result)
        return results

    def locate_boxes(
        self, images: list[torch.Tensor], boxes: list[Boxes], with_masks: bool, features: ImageFeatures | None
    ) -> tuple[ImageFeatures, list[LocalizerOutput]]:
        """Run the frozen parts on images and boxes, as far as a recognizer needs them."""
        features = features or self.encode_images(images)
        return features, self.locate(features, _box_prompts(boxes), with_masks)

    def region_embeddings(
        self,
        images: list[torch.Tensor],
        boxes: list[Boxes],
        features: ImageFeatures,
        located: list[LocalizerOutput],
    ) -> list[torch.Tensor]:
        """Return the (N_i, text_dim) semantic tokens of each image's regions; a baseline may have others."""
        return self.knowledge_integration([output.tokens for output in located], features.feature_map)

    def dense_embeddings(self, features: ImageFeatures, located: list[LocalizerOutput]) -> list[torch.Tensor] | None:
        """Return CLIP's own (N_i, text_dim) embeddings of each image's regions for the ensemble; None without one.

        Raises:
            ValueError: the images were encoded by a recognizer without an ensemble.
        """
        if self.ensemble is None:
            return None
        if features.dense_features is None:
            raise ValueError(f"{ENSEMBLE}: the images were encoded without it; encode them again with this model")
        coverage = [output.coverage for output in located]
        assert all(x is not None for x in coverage)
        return pool_dense_features(coverage, features.dense_features)  # type: ignore[arg-type]


def _box_prompts(boxes: Sequence[Boxes]) -> list[Prompts]:
    return [Prompts(boxes=image_boxes.tensor) for image_boxes in boxes]
