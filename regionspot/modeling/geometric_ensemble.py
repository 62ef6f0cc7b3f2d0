"""The module's class probabilities and CLIP's own of a region, as a geometric mean.

As in F-VLM (arXiv 2209.15639), ODISE (arXiv 2303.04803) and FC-CLIP (arXiv 2308.02487). CLIP's own come from dense
features in the manner of MaskCLIP (arXiv 2112.01071), averaged inside SAM's mask of the region. Nothing is trained.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from detectron2.config import CfgNode

from regionspot.modeling.mask_pooling import pool_features
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.modeling.region_groups import RegionGroups
from regionspot.modeling.vision_language import VisionLanguageModel
from regionspot.utils.files import short_hash
from regionspot.vocabulary import clean_name, load_vocabulary

KEY = "MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeometricEnsemble:
    """How the module's and CLIP's own probabilities of a class become one: p_module^(1 - e) * p_CLIP^e.

    Attributes:
        alpha: the exponent e of base names.
        beta: the exponent e of all other names.
        base_names: those that the module learned from, in any spelling that differs in case, spaces and punctuation
            alone; empty if they are unknown, and then ``beta`` is for all names.
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
        if not node.ALPHA and not node.BETA:
            return None
        try:
            base_names = load_vocabulary(node.BASE_VOCABULARY) if node.BASE_VOCABULARY else []
        except (OSError, ValueError) as error:
            raise type(error)(f"{KEY}.BASE_VOCABULARY: {error}") from error
        return cls(float(node.ALPHA), float(node.BETA), frozenset(base_names))

    def check(self, vision_language: VisionLanguageModel, rule: DetectionRule | None) -> None:
        """Refuse a vision-language model without dense features, and other score functions than softmax."""
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
        """Return what scores depend on."""
        base = f", {self.alpha} for base names ({short_hash(repr(sorted(self.base_names)))})" if self.base_names else ""
        return f"geometric ensemble with exponent {self.beta}{base}"

    def combine(
        self, logits: torch.Tensor, clip_logits: torch.Tensor, names: Sequence[str], num_background: int = 0
    ) -> torch.Tensor:
        """Return (N, K) logits whose softmax is the geometric mean of both softmaxes, divided by its sum over names.

        Args:
            logits: (N, K) float32, the module's.
            clip_logits: (N, K) float32, CLIP's own.
            names: of the columns but the last ``num_background``, which are no base names.
            num_background: number of background names.
        """
        assert logits.shape[1] == len(names) + num_background
        is_base = [*_find_base_names(tuple(names), self.base_names), *[False] * num_background]
        exponents = torch.where(torch.tensor(is_base, dtype=torch.bool), self.alpha, self.beta)  # (K,)
        exponents = exponents.to(logits, non_blocking=True)
        return (1 - exponents) * logits.log_softmax(dim=1) + exponents * clip_logits.log_softmax(dim=1)


@lru_cache(maxsize=16)
def _find_base_names(names: tuple[str, ...], base_names: frozenset[str]) -> list[bool]:
    """Return which names are base names, and log how many: once, as results are cached."""
    base = {_normalize(name) for name in base_names}
    is_base = [_normalize(name) in base for name in names]
    if base_names:
        level = logging.INFO if any(is_base) else logging.WARNING
        logger.log(level, "%s: %d of %d names are in BASE_VOCABULARY", KEY, sum(is_base), len(names))
    return is_base


def _normalize(name: str) -> str:
    """Return the letters and digits of a name, in lower case, so that "Fire_hydrant" is "fire hydrant"."""
    return re.sub(r"[\W_]+", "", clean_name(name).lower()) or name


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
