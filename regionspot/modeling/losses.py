"""The training criterion (paper, section 3.4)."""

import torch
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F


def region_focal_loss(
    logits: list[torch.Tensor], targets: list[torch.Tensor], alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Sigmoid focal loss against one-hot labels: per image the sum over classes, averaged over its regions.

    Args:
        logits: B tensors, (N_i, K_i) float; the vocabularies may differ from image to image.
        targets: B tensors, (N_i,) int64 in [0, K_i).
        alpha: weight of the positive class.
        gamma: focusing exponent; 0 is weighted cross-entropy.

    Returns:
        Scalar: the mean over the B images; an image without regions adds 0 to the sum.
    """
    losses = []
    for image_logits, image_targets in zip(logits, targets):
        one_hot = F.one_hot(image_targets, image_logits.shape[1]).to(image_logits)
        loss = sigmoid_focal_loss(image_logits, one_hot, alpha=alpha, gamma=gamma, reduction="sum")
        losses.append(loss / max(len(image_targets), 1))
    return torch.stack(losses).mean()
