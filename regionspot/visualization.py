"""Drawings of recognized regions, and their attention to the feature map."""

import numpy as np
import torch
from detectron2.utils.visualizer import Visualizer

from regionspot.modeling.knowledge_integration import MAX_QUERIES, KnowledgeIntegration, RegionDecoderLayer
from regionspot.predictor import RegionPredictions


def draw_regions(image: np.ndarray, predictions: RegionPredictions, with_masks: bool = True) -> np.ndarray:
    """Draw an image's boxes, class names with scores and, if there are any, masks; (H, W, 3) uint8 RGB in and out."""
    labels = [f"{label} {score:.0%}" for label, score in zip(predictions.class_names, predictions.scores)]
    return draw_labels(image, predictions.boxes, predictions.masks if with_masks else None, labels)


def draw_labels(image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, labels: list[str]) -> np.ndarray:
    """Draw (N, 4) boxes XYXY, (N, H, W) masks and N labels on a (H, W, 3) uint8 RGB image; return the same."""
    escaped = [label.replace("$", r"\$") for label in labels]  # matplotlib would read $...$ as a formula
    return Visualizer(image).overlay_instances(boxes=boxes, masks=masks, labels=escaped).get_image()


@torch.no_grad()
def cross_attention(integration: KnowledgeIntegration, tokens: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
    """Return the last layer's cross-attention of an image's regions to the feature map, averaged over the heads.

    Args:
        integration: the trained module, with a feature map.
        tokens: (N, token_dim) float.
        feature_map: (1, L, width) float, L = grid^2 or 1 + grid^2.

    Returns:
        (N, grid, grid) float, without the weight of the class token.
    """
    if not integration.with_features:
        raise ValueError("cross_attention: this model has no feature map to attend to (CLIP.FEATURES none)")
    layer = integration.decoder.layers[-1]
    assert isinstance(layer, RegionDecoderLayer)
    # the decoder never computes the weights: they are computed from its queries, which the first norm gives
    queries: list[torch.Tensor] = []
    hook = layer.norm1.register_forward_hook(lambda module, args, output: queries.append(output))
    try:
        integration([tokens], feature_map)
    finally:
        hook.remove()
    parts = queries[0].split(MAX_QUERIES) if len(tokens) else ()  # bounds the memory of the heads' weights
    weights = feature_map.new_zeros(0, feature_map.shape[1])
    for part in parts:
        weights = torch.cat([weights, layer.multihead_attn(part[None], feature_map, feature_map)[1][0]])  # (n, L)
    grid = int(weights.shape[1] ** 0.5)  # the same with and without the class token, which comes first
    return weights[:, -grid * grid :].unflatten(1, (grid, grid))
