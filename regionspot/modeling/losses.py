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
    # images of one vocabulary at once: a GPU would spend its time on starting many small operations
    sizes = [x.shape[1] for x in logits]
    total = logits[0].new_zeros(())
    for size in dict.fromkeys(sizes):
        rows = [i for i, x in enumerate(sizes) if x == size]
        counts = torch.tensor([len(targets[i]) for i in rows])
        weights = (1 / counts).repeat_interleave(counts).to(logits[0].device, non_blocking=True)  # one per region
        together = torch.cat([logits[i] for i in rows])  # (sum of N_i, K)
        one_hot = F.one_hot(torch.cat([targets[i] for i in rows]), size).to(together)
        losses = sigmoid_focal_loss(together, one_hot, alpha=alpha, gamma=gamma).sum(dim=1)
        total = total + (losses * weights).sum()  # a product of matrices would be rounded to bf16 under autocast
    return total / len(logits)
