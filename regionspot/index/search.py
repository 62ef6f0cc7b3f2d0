"""The best regions of an index for a query: matrix products over its shards, a chunk at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from regionspot.index.store import CHUNK, RegionIndex
from regionspot.predictor import ImageSource, RegionSpotPredictor


@dataclass(frozen=True)
class SearchResult:
    """The k best regions for each of Q queries, best first; equal ones in the order of the index.

    Attributes:
        rows: (Q, k) int64, numbers of regions.
        scores: (Q, k) float32, cosine similarities.
    """

    rows: np.ndarray
    scores: np.ndarray


def search_index(
    index: RegionIndex, queries: torch.Tensor, top_k: int = 20, chunk: int = CHUNK, device: str = "cpu"
) -> SearchResult:
    """Compare queries with all regions of an index.

    Args:
        index: the index, which is never in memory as a whole.
        queries: (Q, D) float; they are normalized.
        top_k: number k of regions; fewer if the index has fewer.
        chunk: regions that are compared at a time.
        device: that computes.

    Raises:
        ValueError: queries of another length than the index's embeddings, or ``top_k`` below 1.
    """
    if queries.dim() != 2 or queries.shape[1] != index.dim:
        raise ValueError(f"queries: expected shape (Q, {index.dim}), got {tuple(queries.shape)}")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    normalized = F.normalize(queries.float().to(device), dim=1)
    best = torch.empty(len(queries), 0, device=device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for first, columns in index.chunks(chunk):
        similarities = normalized @ columns["embeddings"].to(device).float().t()  # (Q, n)
        scores, places = similarities.topk(min(top_k, similarities.shape[1]), dim=1)
        # earlier regions come first, and sorting is stable
        best, rows = torch.cat([best, scores], dim=1), torch.cat([rows, places + first], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :top_k], rows.gather(1, order)[:, :top_k]
    return SearchResult(rows.cpu().numpy(), best.cpu().numpy())


def mean_embedding(index: RegionIndex, num_chunks: int = 64) -> torch.Tensor:
    """Return the (D,) float32 mean embedding of an index's regions, of chunks spread over it if it is large."""
    total, count = torch.zeros(index.dim, dtype=torch.float64), 0
    for _, columns in index.chunks(stride=max(len(index) // (CHUNK * num_chunks), 1)):
        total += columns["embeddings"].float().sum(dim=0)
        count += len(columns["embeddings"])
    return (total / max(count, 1)).float()


def embed_texts(predictor: RegionSpotPredictor, texts: Sequence[str]) -> torch.Tensor:
    """Return the (D,) normalized mean text embedding of texts, each in the model's prompt templates."""
    _, embeddings = predictor.recognizer.encode_vocabulary(list(texts))
    return F.normalize(embeddings.float().mean(dim=0), dim=0).cpu()


def embed_region(
    predictor: RegionSpotPredictor, image: ImageSource, box: Sequence[float] | None = None
) -> torch.Tensor:
    """Return the (D,) normalized embedding of a region.

    Args:
        predictor: the model that made the index.
        image: as for ``RegionSpotPredictor.encode``.
        box: XYXY, original pixels; the whole image by default.

    Raises:
        FileNotFoundError, ValueError: no such image, or an invalid box.
    """
    features = predictor.encode(image)
    height, width = features.sizes[0]
    boxes = [[0, 0, width, height] if box is None else list(box)]
    result = predictor.predict(boxes, features=features, vocabulary=["object"], top_k=1, with_masks=False)
    return torch.from_numpy(result.embeddings[0])


def combine(
    text: torch.Tensor | None, regions: Sequence[torch.Tensor], mean: torch.Tensor | None = None
) -> torch.Tensor:
    """Return one query, (1, D): the mean of a text and of regions, which weigh the same.

    Args:
        text: (D,) normalized embedding of texts, or None.
        regions: (D,) normalized embeddings.
        mean: (D,) mean embedding of the index's regions. Beside a text, only what distinguishes the regions from it
            counts: all regions are alike in the rest, which would outweigh the text.

    Raises:
        ValueError: neither.
    """
    parts = [] if text is None else [text]
    if regions:
        average = torch.stack(list(regions)).mean(dim=0)
        parts.append(F.normalize(average if text is None or mean is None else average - mean, dim=0))
    if not parts:
        raise ValueError("no query: expected --text, --image or --region")
    return F.normalize(torch.stack(parts).mean(dim=0), dim=0)[None]


def parse_region(text: str) -> tuple[Path, list[float]]:
    """Return image and box of "image.jpg:x0,y0,x1,y1".

    Raises:
        ValueError: another form.
    """
    path, _, numbers = text.rpartition(":")
    try:
        box = [float(number) for number in numbers.split(",")]
    except ValueError:
        box = []
    if not path or len(box) != 4:
        raise ValueError(f"--region: expected image.jpg:x0,y0,x1,y1 in pixels, got {text!r}")
    return Path(path), box
