"""The module's class probabilities and CLIP's own of a region, as a geometric mean.

As in F-VLM (arXiv 2209.15639), ODISE (arXiv 2303.04803) and FC-CLIP (arXiv 2308.02487). CLIP's own come from dense
features in the manner of MaskCLIP (arXiv 2112.01071), averaged inside SAM's mask of the region. Nothing is trained.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from torch.nn import functional as F

from regionspot.modeling.mask_pooling import pool_features
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.modeling.region_groups import RegionGroups
from regionspot.modeling.vision_language import VisionLanguageModel
from regionspot.vocabulary import load_vocabulary

KEY = "MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE"


@dataclass(frozen=True)
class GeometricEnsemble:
    """How the module's and CLIP's own probabilities of a class become one: p_module^(1 - e) * p_CLIP^e.

    Attributes:
        alpha: the exponent e of base names.
        beta: the exponent e of all other names.
        base_names: those that the module learned from; empty if that is unknown, and then ``beta`` is for all names.
    """

    alpha: float
    beta: float
    base_names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, exponent in (("ALPHA", self.alpha), ("BETA", self.beta)):
            if not 0 <= exponent <= 1:
                raise ValueError(f"{KEY}.{name}: expected an exponent from 0 to 1, got {exponent}")
        if self.alpha and not self.base_names:
            raise ValueError(
                f"{KEY}.ALPHA is for the names of BASE_VOCABULARY, which is empty; set it, or use BETA alone, which is "
                "for all other names"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "GeometricEnsemble | None":
        """Return the configured one, None with exponents of 0."""
        node = cfg.MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE
        base_names = load_vocabulary(node.BASE_VOCABULARY) if node.BASE_VOCABULARY else []
        ensemble = cls(float(node.ALPHA), float(node.BETA), frozenset(base_names))
        return ensemble if ensemble.alpha or ensemble.beta else None

    def check(self, vision_language: VisionLanguageModel, rule: DetectionRule | None) -> None:
        """Refuse a vision-language model without dense features, and scores that are no softmax."""
        if not vision_language.has_dense_features:
            raise ValueError(
                f"{KEY}: {type(vision_language).__name__} with this MODEL.REGIONSPOT.CLIP.NAME has no dense features; "
                "expected OpenAI's CLIP, or one of open_clip's own vision transformers without attention pooling"
            )
        if rule is not None and rule.score_function != "softmax":
            raise ValueError(
                f"{KEY}: expected MODEL.REGIONSPOT.SCORE_FUNCTION softmax, got {rule.score_function!r}: CLIP's own "
                "scores are probabilities among the names alone"
            )

    def describe(self) -> str:
        """Return what scores and embeddings depend on."""
        base = f" and {self.alpha} for {len(self.base_names)} base names" if self.base_names else ""
        return f"geometric ensemble with exponent {self.beta}{base}"

    def exponents(self, names: Sequence[str]) -> torch.Tensor:
        """Return the (K,) float32 exponents of CLIP's own probabilities of names."""
        is_base = torch.tensor([name in self.base_names for name in names], dtype=torch.bool)
        if self.base_names and not is_base.any():
            log_first_n(
                logging.WARNING,
                f"{KEY}: none of the {len(names)} names in use is in BASE_VOCABULARY; all have the exponent BETA",
            )
        return torch.where(is_base, self.alpha, self.beta)

    def combine(self, logits: torch.Tensor, clip_logits: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Return (N, K) logits whose softmax is the geometric mean of both softmaxes, divided by its sum over names.

        Args:
            logits: (N, K) float32, the module's.
            clip_logits: (N, K) float32, CLIP's own.
            names: K of the columns; of fewer, the last columns are no base names.
        """
        exponents = F.pad(self.exponents(names), (0, logits.shape[1] - len(names)), value=self.beta).to(logits)
        return (1 - exponents) * logits.log_softmax(dim=1) + exponents * clip_logits.log_softmax(dim=1)

    def blend(self, semantic_tokens: torch.Tensor, clip_features: torch.Tensor) -> torch.Tensor:
        """Return one (N, C) embedding of each region, which ranks names as the geometric mean with ``beta`` does.

        Its dot product with a name's embedding is the same mean of both logits, but for the logit scale.
        """
        tokens, features = F.normalize(semantic_tokens.float(), dim=1), F.normalize(clip_features.float(), dim=1)
        return (1 - self.beta) * tokens + self.beta * features


def pool_dense_features(coverage: Sequence[torch.Tensor], dense_features: torch.Tensor) -> list[torch.Tensor]:
    """Return the mean of CLIP's dense features inside each mask.

    Args:
        coverage: for each of B images (N_i, COVERAGE_DIM) float of its regions, see ``mask_coverage``.
        dense_features: (B, grid^2, C) float.

    Returns:
        B tensors, (N_i, C) float, 0 for an empty mask.
    """
    lengths = [len(image_coverage) for image_coverage in coverage]
    if not sum(lengths):
        return [dense_features.new_zeros(0, dense_features.shape[2]) for _ in lengths]
    groups = RegionGroups(lengths, dense_features.device)
    return list(pool_features(torch.cat(list(coverage)), dense_features, groups).split(lengths))
