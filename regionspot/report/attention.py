"""Attention maps of the objects that a model gets wrong."""

import numpy as np
import torch

from regionspot.drawing import draw_attention
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.attention_maps import cross_attention
from regionspot.report.panels import EmbeddedImage, embed
from regionspot.report.worst_images import ImageErrors
from regionspot.structures import Prompts

MAX_MAPS = 4  # of an image
MAX_SIDE = 320  # pixels


class AttentionMaps:
    """Draws what the regions of objects attend to in the feature map (paper, figure 4)."""

    def __init__(self, recognizer: RegionRecognizer) -> None:
        """
        Raises:
            ValueError: a model without CLIP's features, which has no cross-attention.
        """
        if not recognizer.knowledge_integration.with_features:
            raise ValueError("attention maps: this model has no feature map to attend to (CLIP.FEATURES none)")
        self.recognizer = recognizer

    @torch.no_grad()
    def __call__(self, array: np.ndarray, image: ImageErrors) -> list[EmbeddedImage]:
        """Return the attention maps of an image's objects, those that were not found first.

        Args:
            array: the image, (H, W, 3) uint8 RGB.
            image: its objects.
        """
        corners = np.array([region.box for region in image.objects], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]  # XYXY
        is_right = [region.kind == "right" for region in image.objects]
        chosen = np.argsort(is_right, kind="stable")[:MAX_MAPS].tolist()
        if not chosen:
            return []
        features = self.recognizer.encode_images([torch.from_numpy(array.copy()).permute(2, 0, 1)])
        assert features.feature_map is not None
        [located] = self.recognizer.locate(features, [Prompts(boxes=torch.from_numpy(corners))])
        integration = self.recognizer.knowledge_integration
        maps = cross_attention(integration, located.tokens, features.feature_map, chosen).float().cpu().numpy()
        return [
            EmbeddedImage(embed(draw_attention(array, weights, corners[row]), MAX_SIDE), image.objects[row].name)
            for row, weights in zip(chosen, maps)
        ]
