"""Reading region indexes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regionspot.data.tokens.manifest import StoreKind, check_origin, read_manifest
from regionspot.data.tokens.store import find_damage, map_shard

INDEX = StoreKind(
    "region index",
    "regionspot-index-1",
    "regionspot index",
    {"dim": int, "inputs": dict, "scoring": dict, "logit_scale": float, "trained": dict, "text": dict},
    frozenset({"sam", "clip", "proposals"}),
)
CONFIG = "config.yaml"  # the model's, beside the manifest
# Of that config: an index has its own regions, and is asked with names.
OVERRIDES = ["MODEL.REGIONSPOT.VOCABULARY", "", "MODEL.REGIONSPOT.PROPOSALS.SOURCE", "gt"]
CHUNK = 32768  # regions that are processed at a time: 64 MB of float32 at 512 numbers a region
# Tensors of a shard by what their rows are.
_OF_IMAGES = ("image_ids", "sizes", "image_files")
_OF_REGIONS = ("boxes", "embeddings", "proposal_scores", "predicted_ious", "keys")


@dataclass(frozen=True)
class IndexedRegion:
    """A region of an index.

    Attributes:
        row: its number in the index.
        image: name of its image, relative to the directory that was indexed.
        image_id: of an annotation file, or the image's number.
        box: (4,) float32, XYXY, original pixels.
        image_size: (height, width) of the image.
        proposal_score: in [0, 1], None where the box came without one.
        predicted_iou: SAM's own estimate of the mask's IoU.
        key: of the region in its source, such as the position of its annotation; -1 for none.
    """

    row: int
    image: str
    image_id: int
    box: np.ndarray
    image_size: tuple[int, int]
    proposal_score: float | None
    predicted_iou: float
    key: int


class RegionIndex:
    """A finished index; shards are memory-mapped while they are read, and only then.

    An index is a directory with ``manifest.json``, ``config.yaml`` and shards ``shard-00000.safetensors``, ... A shard
    with I images and N regions has:

    * ``image_ids`` (I,) int64, ``sizes`` (I, 2) int32 heights and widths, ``image_files`` (I, 3) int64, see
      ``describe_file``; ``names`` uint8, the images' names in UTF-8, concatenated, and ``name_ends`` (I + 1,) int64;
    * ``offsets`` (I + 1,) int64: the regions of image i are offsets[i] to offsets[i + 1];
    * ``boxes`` (N, 4) float32, XYXY, original pixels; ``embeddings`` (N, D) float16, normalized semantic tokens;
      ``proposal_scores`` (N,) float32, -1 for none; ``predicted_ious`` (N,) float32; ``keys`` (N,) int64.

    Attributes:
        directory: of the index.
        manifest: what the shards hold, and what made them.
        starts: (S + 1,) int64, row of each shard's first region.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open an index: only the manifest is read.

        Raises:
            FileNotFoundError: no such index.
            ValueError: unfinished or damaged.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory, INDEX)
        self._entries: list[dict[str, Any]] = self.manifest["shards"]
        self.starts = np.cumsum([0] + [entry["boxes"] for entry in self._entries])

    def __len__(self) -> int:
        """Number of regions."""
        return int(self.starts[-1])

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return self.manifest["dim"]

    @property
    def num_images(self) -> int:
        return self.manifest["images"]

    @property
    def root(self) -> Path:
        """Directory that the images' names are relative to, as it was when they were indexed."""
        return Path(self.manifest["inputs"]["source"])

    @property
    def config_file(self) -> Path:
        """The config of the model that made the index."""
        return self.directory / CONFIG

    def shard(self, number: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a shard.

        Raises:
            FileNotFoundError: the shard is missing.
            ValueError: it is damaged.
        """
        entry = self._entries[number]
        content = map_shard(self.directory, entry, INDEX)
        images, regions = entry["images"], entry["boxes"]
        lengths = dict.fromkeys(_OF_IMAGES, images) | dict.fromkeys(_OF_REGIONS, regions)
        lengths |= {"offsets": images + 1, "name_ends": images + 1}
        problem = next(
            (key for key, length in lengths.items() if key not in content or content[key].shape[:1] != (length,)), ""
        )
        if not problem and (content["embeddings"].shape[1:] != (self.dim,) or "names" not in content):
            problem = "embeddings"
        if not problem:
            ends = {"offsets": regions, "name_ends": content["names"].numel()}
            # they index into the map: invalid ones would read other regions
            problem = next((key for key, end in ends.items() if not _is_ascending(content[key], end)), "")
        if problem:
            raise ValueError(
                f"region index: shard {self.directory / entry['file']} is damaged: {problem} is not what the manifest "
                f"says; {INDEX.remedy}"
            )
        return content

    def shards(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors of all shards, one at a time."""
        return (self.shard(number) for number in range(len(self._entries)))

    def chunks(self, size: int = CHUNK, stride: int = 1) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yield (row of the first, columns) for chunks of at most ``size`` regions.

        Columns are the shard's tensors of regions. With a ``stride`` of n only one chunk of n is read. An index without
        regions has one chunk, of none.
        """
        if not len(self):
            yield 0, no_regions(self.dim)
        number = 0
        for shard, start in enumerate(self.starts[:-1].tolist()):
            if self.starts[shard + 1] == start:
                continue
            content = self.shard(shard)
            for first in range(0, int(self.starts[shard + 1]) - start, size):
                if number % stride == 0:
                    yield start + first, {key: content[key][first : first + size] for key in _OF_REGIONS}
                number += 1

    def regions(self, rows: Sequence[int] | np.ndarray) -> list[IndexedRegion]:
        """Return regions by their numbers, in the order of ``rows``.

        Raises:
            IndexError: no such region.
        """
        numbers = np.asarray(rows, np.int64).reshape(-1)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"region index {self.directory}: expected regions 0 to {len(self) - 1}")
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        result: dict[int, IndexedRegion] = {}
        for number in np.unique(shards).tolist():
            content = self.shard(number)
            for row in numbers[shards == number].tolist():
                result[row] = _region(content, row, row - int(self.starts[number]))
        return [result[row] for row in numbers.tolist()]

    def region_images(self) -> Iterator[str]:
        """Yield the name of each region's image, in the order of the index."""
        for content in self.shards():
            ends, names = content["name_ends"].tolist(), content["names"].numpy().tobytes()
            for start, end, count in zip(ends[:-1], ends[1:], content["offsets"].diff().tolist()):
                yield from repeat(names[start:end].decode(), count)

    def embeddings(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the (n, D) float32 embeddings of regions."""
        embeddings = torch.zeros(len(rows), self.dim)
        numbers = np.asarray(rows, np.int64).reshape(-1)
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        for number in np.unique(shards).tolist():
            places = np.flatnonzero(shards == number)
            local = torch.from_numpy(numbers[places] - self.starts[number])
            embeddings[torch.from_numpy(places)] = self.shard(number)["embeddings"][local].float()
        return embeddings

    def left_out(self) -> list[str]:
        """Return a line for each image that could not be used."""
        return [reason for entry in self._entries for reason in entry.get("reasons", ())]

    def check_origin(self, expected: dict[str, Any]) -> None:
        """Refuse the index if entries of its manifest are not the ``expected`` ones; the error names both."""
        check_origin(self.directory, self.manifest, expected, INDEX)

    def find_damage(self) -> Iterator[str]:
        """Compare the shards' SHA-256 with the manifest; yield a line for each damaged one."""
        return find_damage(self.directory, INDEX)


def no_regions(dim: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard's regions where it has none: their shapes and dtypes."""
    return {
        "boxes": torch.zeros(0, 4),
        "embeddings": torch.zeros(0, dim, dtype=torch.float16),
        "proposal_scores": torch.zeros(0),
        "predicted_ious": torch.zeros(0),
        "keys": torch.zeros(0, dtype=torch.int64),
    }


def _is_ascending(offsets: torch.Tensor, end: int) -> bool:
    return bool(offsets[0] == 0 and offsets[-1] == end and (offsets.diff() >= 0).all())


def _region(content: dict[str, torch.Tensor], row: int, local: int) -> IndexedRegion:
    image = int(torch.searchsorted(content["offsets"], local, right=True)) - 1
    start, end = content["name_ends"][image : image + 2].tolist()
    height, width = content["sizes"][image].tolist()
    score = float(content["proposal_scores"][local])
    return IndexedRegion(
        row=row,
        image=content["names"][start:end].numpy().tobytes().decode(),
        image_id=int(content["image_ids"][image]),
        box=content["boxes"][local].numpy().copy(),
        image_size=(height, width),
        proposal_score=score if score >= 0 else None,
        predicted_iou=float(content["predicted_ious"][local]),
        key=int(content["keys"][local]),
    )
