"""A trained module for another localizer: a linear map between the tokens of the two, folded into its first layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from regionspot.checkpoint.formats import fingerprint
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.tokens import TokenStore
from regionspot.data.tokens.manifest import describe, is_same
from regionspot.data.tokens.side_by_side import choose_store, list_stores
from regionspot.modeling.identity import describe_clip, describe_sam
from regionspot.modeling.recognizer import RegionRecognizer

HELD_OUT = 10  # every tenth image is not fitted, but measured
PAIRS_PER_CHANNEL = 2  # fewer regions than this, times the length of a token, say nothing about others

TokenPairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class TokenMoments:
    """Moments of pairs of tokens, in float64: all that a linear fit needs, in memory that does not grow with them."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        dim = input_dim + output_dim
        self.input_dim, self.count = input_dim, 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add (N, input_dim) tokens and the (N, output_dim) ones of the same regions."""
        pairs = torch.cat([inputs.double(), outputs.double()], dim=1).cpu()
        self.count += len(pairs)
        self.total += pairs.sum(dim=0)
        self.products += pairs.T @ pairs

    def _mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.total / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)

    def fit(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (output_dim, input_dim) matrix and (output_dim,) offset of the least squares map, float64.

        ``ridge`` is relative to the mean variance of the inputs; the offset is not regularized.
        """
        (mean, covariance), dim = self._mean_and_covariance(), self.input_dim
        inputs = covariance[:dim, :dim]
        penalty = ridge * inputs.diagonal().mean() * torch.eye(dim, dtype=torch.float64)
        matrix = torch.linalg.solve(inputs + penalty, covariance[:dim, dim:]).T
        return matrix, mean[dim:] - matrix @ mean[:dim]

    def explained_variance(self, matrix: torch.Tensor, offset: torch.Tensor) -> float:
        """Return the share of the outputs' variance that a map explains; 1 is all, below 0 worse than their mean."""
        (mean, covariance), dim = self._mean_and_covariance(), self.input_dim
        # outputs - matrix @ inputs, as a linear function of the pair
        residual = torch.cat([-matrix, torch.eye(len(offset), dtype=torch.float64)], dim=1)
        error = ((residual @ covariance) * residual).sum() + (residual @ mean - offset).square().sum()
        return float(1 - error / covariance[dim:, dim:].diagonal().sum())


@dataclass(frozen=True)
class Transfer:
    """What a transfer was fitted on: regions, those held out, and the share of their variance that is explained."""

    num_pairs: int
    num_held_out: int
    explained_variance: float


@torch.no_grad()
def transfer(
    trained: RegionRecognizer, recognizer: RegionRecognizer, pairs: TokenPairs, ridge: float = 1e-4
) -> Transfer:
    """Give ``recognizer`` the trained module of ``trained``, which has another localizer.

    ``to_clip`` then begins with the least squares map from tokens of the new localizer to those of the old one:
    W' = W M and b' = W c + b. All else is copied.

    Args:
        trained: with its weights; it stays as it is.
        recognizer: with the new localizer and the same vision-language model; only its trained module changes.
        pairs: for each image (N, D') tokens of the new localizer and (N, D) of the old one, of the same regions.
        ridge: see ``TokenMoments.fit``.

    Raises:
        ValueError: models that do not fit, or too few pairs; ``recognizer`` is then unchanged.
    """
    check_models(trained, recognizer)
    dims = recognizer.localizer.token_dim, trained.localizer.token_dim
    fitted, held_out = TokenMoments(*dims), TokenMoments(*dims)
    for index, (inputs, outputs) in enumerate(pairs):
        (held_out if index % HELD_OUT == HELD_OUT - 1 else fitted).add(inputs, outputs)
    required = PAIRS_PER_CHANNEL * dims[0]
    if fitted.count < required or held_out.count < 2:
        raise ValueError(
            f"transfer: expected at least {required} regions to fit and 2 to hold out, got {fitted.count} and "
            f"{held_out.count} (every {HELD_OUT}th image is held out); give more images"
        )
    matrix, offset = fitted.fit(ridge)
    state, to_clip = trained.knowledge_integration.state_dict(), trained.knowledge_integration.to_clip
    weight, bias = to_clip.weight.double().cpu(), to_clip.bias.double().cpu()
    folded = {"to_clip.weight": weight @ matrix, "to_clip.bias": weight @ offset + bias}
    recognizer.knowledge_integration.load_state_dict({**state, **folded})
    return Transfer(fitted.count, held_out.count, held_out.explained_variance(matrix, offset))


def check_models(trained: RegionRecognizer, recognizer: RegionRecognizer) -> None:
    """Refuse models that differ in more than their localizers."""
    one, other = (describe_clip(x) for x in (trained, recognizer))
    weights = [fingerprint(x.vision_language.clip_model.state_dict()) for x in (trained, recognizer)]
    if not is_same(one, other) or weights[0] != weights[1]:
        raise ValueError(
            "transfer: expected the same vision-language model in both configs, got "
            f"{describe({**one, 'fingerprint': weights[0]})} and {describe({**other, 'fingerprint': weights[1]})}"
        )
    stages = [x.localizer.token_stage for x in (trained, recognizer)]
    if stages[0] != stages[1]:
        raise ValueError(
            f"transfer: expected the same MODEL.REGIONSPOT.TOKEN_STAGE in both configs, got {stages[0]} and {stages[1]}"
        )
    shapes = [
        {key: value.shape for key, value in x.knowledge_integration.state_dict().items() if key != "to_clip.weight"}
        for x in (trained, recognizer)
    ]
    settings = [x.knowledge_integration.settings for x in (trained, recognizer)]
    if shapes[0] != shapes[1] or settings[0] != settings[1]:
        raise ValueError("transfer: expected the same MODEL.REGIONSPOT.INTEGRATION in both configs")


def pairs_of_stores(old: TokenStore, new: TokenStore, max_images: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tokens of images that both stores have, evenly spaced, see ``transfer``.

    Raises:
        ValueError: stores of other annotations.
    """
    new.check_origin({"annotations": old.manifest["annotations"]})
    ids = np.intersect1d(old.image_ids, new.image_ids)
    for image_id in ids[evenly_spaced(len(ids), max_images)].tolist():
        boxes, _ = old.regions(image_id)
        yield new.get(image_id, boxes)["tokens"], old.get(image_id, boxes)["tokens"]


def pairs_of_dataset(
    trained: RegionRecognizer, recognizer: RegionRecognizer, name: str, max_images: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tokens of the annotated boxes of a registered data set's images, evenly spaced, see ``transfer``."""
    records, mapper = DatasetCatalog.get(name), RegionSpotDatasetMapper(augmentations=[], image_format="RGB")
    for row in tqdm(evenly_spaced(len(records), max_images), desc=f"tokens of {name}", unit="image"):
        inputs = mapper(records[int(row)])
        boxes = inputs["instances"].gt_boxes
        if len(boxes):
            [new], [old] = (x.position_tokens([inputs["image"]], [boxes]) for x in (recognizer, trained))
            # what the masks cover may follow, see MASK_POOLING
            yield new[:, : recognizer.localizer.token_dim], old[:, : trained.localizer.token_dim]


def open_store(path: str | Path, recognizer: RegionRecognizer) -> TokenStore:
    """Open a localizer's token store, or that among several side by side; a ``ValueError`` refuses those of others."""
    sam = describe_sam(recognizer)
    store = TokenStore(choose_store(path, sam) if list_stores(path) else path, recognizer.localizer.token_stage)
    store.check_origin({"sam": sam})
    return store


def evenly_spaced(count: int, max_count: int) -> np.ndarray:
    """Return at most ``max_count`` of the first ``count`` numbers."""
    return np.linspace(0, count, min(count, max_count), endpoint=False).astype(int)
