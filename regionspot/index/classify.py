"""Naming all regions of an index by any vocabulary; no image is read."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from regionspot.index.store import CHUNK, RegionIndex
from regionspot.modeling.postprocessing import DetectionRule

CLASSIFY_CHUNK = CHUNK // 4  # their logits for 1200 names take 40 MB


@dataclass(frozen=True)
class NamedRegions:
    """Names of n consecutive regions, as ``RegionPredictions`` has them.

    Attributes:
        first: number of the first region.
        boxes: (n, 4) float32, XYXY, original pixels.
        top_classes: (n, k) int64, best first.
        top_scores: (n, k) float32, their probabilities.
        unknown: (n,) bool.
        detection_scores: (n,) float32.
        keys: (n,) int64, see ``IndexedRegion``.
    """

    first: int
    boxes: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    unknown: np.ndarray
    detection_scores: np.ndarray
    keys: np.ndarray


class IndexClassifier:
    """Scores the regions of an index against names, as the model that made it would."""

    def __init__(
        self,
        index: RegionIndex,
        embeddings: torch.Tensor,
        background: torch.Tensor | None = None,
        rule: DetectionRule | None = None,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            index: the index.
            embeddings: (K, D) float, of the names.
            background: (M, D) float, of names that are no objects (``MODEL.REGIONSPOT.UNKNOWN.BACKGROUND``).
            rule: how scores follow from logits; by default as the index says.
            device: that computes.

        Raises:
            ValueError: embeddings of another length.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != index.dim or not len(embeddings):
            raise ValueError(f"embeddings of names: expected shape (K, {index.dim}), got {tuple(embeddings.shape)}")
        self.index, self.num_names, self.device = index, len(embeddings), device
        self.num_background = 0 if background is None else len(background)
        self.rule = rule or stored_rule(index)
        weights = embeddings if background is None else torch.cat([embeddings, background.to(embeddings)])
        # the scale is applied to the names once, not to every logit
        self._weights = (weights.float() * float(np.exp(np.float32(index.manifest["logit_scale"])))).to(device).t()
        self._bias = index.manifest.get("logit_bias", 0.0)

    def logits(self, chunk: int = CLASSIFY_CHUNK) -> Iterator[tuple[int, dict[str, torch.Tensor], torch.Tensor]]:
        """Yield (row of the first region, columns, (n, K + M) float32 logits), a chunk at a time."""
        for first, columns in self.index.chunks(chunk):
            embeddings = columns["embeddings"].to(self.device).float()
            # rounding to float16 changes lengths, too; the classifier's own are normalized
            embeddings = embeddings / (embeddings.norm(dim=1, keepdim=True) + 1e-7)
            logits = embeddings @ self._weights
            yield first, columns, logits.add_(self._bias) if self._bias else logits

    def probabilities(self, chunk: int = CLASSIFY_CHUNK) -> Iterator[tuple[int, dict[str, torch.Tensor], torch.Tensor]]:
        """Yield (row of the first region, columns, (n, K + M) float32 probabilities), a chunk at a time."""
        for first, columns, logits in self.logits(chunk):
            yield first, columns, self.rule.probabilities(logits)

    def classify(self, top_k: int = 1, chunk: int = CLASSIFY_CHUNK) -> Iterator[NamedRegions]:
        """Yield the ``top_k`` best names of all regions, a chunk at a time."""
        for first, columns, probabilities in self.probabilities(chunk):
            unknown = self.rule.is_unknown(probabilities, self.num_background)
            top = probabilities[:, : self.num_names].topk(min(top_k, self.num_names), dim=1)
            best, proposals = top.values[:, 0].cpu(), columns["proposal_scores"]
            detection = best
            if self.rule.score_rule != "class":
                factor = best if self.rule.score_rule == "product" else torch.ones_like(best)
                detection = torch.where(proposals < 0, best, factor * proposals)
            yield NamedRegions(
                first,
                columns["boxes"].numpy(),
                top.indices.cpu().numpy(),
                top.values.cpu().numpy(),
                unknown.cpu().numpy(),
                detection.numpy(),
                columns["keys"].numpy(),
            )


def stored_rule(index: RegionIndex) -> DetectionRule:
    """Return how the model of an index turns logits into scores."""
    scoring = index.manifest["scoring"]
    return DetectionRule(
        score_function=scoring["score_function"],
        score_rule=scoring["score_rule"],
        unknown_thresh=scoring["unknown_threshold"],
    )
