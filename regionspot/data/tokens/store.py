"""Reading token stores."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from regionspot.data.tokens.manifest import TOKENS, StoreKind, check_origin, read_manifest, read_object
from regionspot.utils.files import sha256_of_file, write_json

REMEDY = TOKENS.remedy
VERIFIED = ".verified.json"  # size and time of the shards whose SHA-256 was compared


def get_token_stages(cfg: CfgNode) -> tuple[str, ...]:
    """Return the stages of the localizer that represent a region, side by side."""
    node = cfg.MODEL.REGIONSPOT
    return (node.TOKEN_STAGE, "mask") if node.INTEGRATION.MASK_POOLING else (node.TOKEN_STAGE,)


class TokenStore:
    """Random access to a finished store, whose shards are memory-mapped.

    A store is a directory with ``manifest.json`` and shards ``shard-00000.safetensors``, ... A shard with I images and
    N regions has:

    * ``image_ids`` (I,) int64 and ``offsets`` (I + 1,) int64: the regions of image i are offsets[i] to offsets[i + 1];
    * ``boxes`` (N, 4) float32, XYXY in the pixels of the original image, clipped to it; ``labels`` (N,) int32,
      contiguous classes;
    * optionally ``image_files`` (I, 3) int64, see ``describe_file``;
    * ``tokens.<stage>`` (N, D) float16 for each stage, and optionally ``feature_maps`` (I, L, width) float16;
    * optionally ``jittered_boxes`` (N, K, 4) float32, K jittered copies of each box, and their
      ``jittered_tokens.<stage>`` (N, K, D) float16;
    * optionally ``flipped_tokens.<stage>``, ``flipped_jittered_tokens.<stage>`` and ``flipped_feature_maps``, the same
      of the horizontally flipped image.

    SAM saw images upright by their EXIF tag, in RGB, resized (PIL, bilinear) to ``image_size`` pixels on the longest
    side, padded to a square.
    """

    def __init__(self, directory: str | Path, *stages: str) -> None:
        """Open a store with the tokens of some stages, side by side; by default of "transformer" alone.

        Raises:
            FileNotFoundError: no such store, or a shard is missing.
            ValueError: unfinished, damaged, or without tokens of such a stage.
        """
        self.directory, self.stages = Path(directory), stages or ("transformer",)
        self.manifest = read_manifest(self.directory)
        for stage in self.stages:
            if stage not in self.manifest["stages"]:
                raise ValueError(
                    f"token store {directory} has no tokens of stage {stage!r}: expected one of "
                    f"{', '.join(self.manifest['stages'])}; set MODEL.REGIONSPOT.TOKEN_STAGE, or extract this stage"
                )
        self._shards = [_open_shard(self.directory, entry) for entry in self.manifest["shards"]]
        # (image id -> shard, row) as sorted arrays: a dict of millions of images would be copied by forked workers.
        ids = [shard["image_ids"].numpy() for shard in self._shards] or [np.zeros(0, np.int64)]
        locations = [np.stack([np.full(len(x), shard), np.arange(len(x))], axis=1) for shard, x in enumerate(ids)]
        all_ids = np.concatenate(ids)
        order = np.argsort(all_ids, kind="stable")
        self.image_ids = all_ids[order]  # (I,) ascending, for binary search
        self._locations = np.concatenate(locations)[order].astype(np.int32)  # (I, 2): shard, and row in it

    def __reduce__(self) -> tuple:
        return TokenStore, (str(self.directory), *self.stages)  # a spawned worker maps the files itself

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def has_feature_maps(self) -> bool:
        return self.manifest["clip"] is not None

    @property
    def jitter(self) -> float:
        """Strength of the jittered copies of the boxes, 0 if there are none."""
        return self.manifest.get("jitter") or 0.0  # older manifests lack it

    @property
    def num_copies(self) -> int:
        """Number of jittered copies of each box."""
        return self.manifest.get("jitter_copies") or 0

    def get(
        self, image_id: int, boxes: torch.Tensor, flipped: bool = False, copies: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the features of an image.

        Args:
            image_id: the image.
            boxes: (n, 4) float XYXY in the unflipped image; they must be those of the extraction.
            flipped: return the features of the flipped image.
            copies: (n,) int64, which box of each region to take: 0 for ``boxes``, k for the k-th jittered copy.

        Returns:
            ``tokens`` (n, D) float32 and, if they are stored, ``feature_map`` (L, width) float32; with ``copies`` also
            ``boxes`` (n, 4) float32, those of the tokens in the unflipped image.

        Raises:
            KeyError: the image is not in the store.
            ValueError: the boxes differ.
        """
        shard, row, start, stop = self._find(image_id)
        stored = shard["boxes"][start:stop]  # (n, 4)
        # A hundredth of a pixel: annotations that were written again with fewer digits are still the same.
        if stored.shape != boxes.shape or not torch.allclose(stored, boxes.float(), atol=0.01):
            raise ValueError(
                f"token store {self.directory}: image {image_id} has other boxes than when the tokens were extracted "
                f"({stop - start} then, {len(boxes)} now); extract them again"
            )
        # float16 on the disk, float32 for the model
        prefix = "flipped_" if flipped else ""
        rows = slice(start, stop)
        tokens = [_choose(shard, prefix, f"tokens.{stage}", rows, copies).float() for stage in self.stages]
        features = {"tokens": tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)}
        if copies is not None:
            features["boxes"] = _choose(shard, "", "boxes", rows, copies)
        if self.has_feature_maps:
            features["feature_map"] = shard[f"{prefix}feature_maps"][row].float()
        return features

    def regions(self, image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the regions whose tokens are stored of an image.

        Returns:
            (n, 4) float32 XYXY in the pixels of the original image, and (n,) int32 contiguous classes.

        Raises:
            KeyError: the image is not in the store.
        """
        shard, _, start, stop = self._find(image_id)
        return shard["boxes"][start:stop], shard["labels"][start:stop]

    def _find(self, image_id: int) -> tuple[dict[str, torch.Tensor], int, int, int]:
        """Return an image's shard, its row there, and where its regions start and stop."""
        position = int(np.searchsorted(self.image_ids, image_id))
        if position == len(self.image_ids) or self.image_ids[position] != image_id:
            raise KeyError(
                f"token store {self.directory}: no image {image_id}; was it extracted from the same annotations?"
            )
        shard_index, row = self._locations[position].tolist()
        shard = self._shards[shard_index]
        # Reading past the end of a memory map, of a file that was truncated since, would kill the process.
        check_size(self.directory, self.manifest["shards"][shard_index])
        start, stop = shard["offsets"][row : row + 2].tolist()
        return shard, row, start, stop

    def image_files(self, image_ids: np.ndarray) -> np.ndarray:
        """Return the ``describe_file`` of images of the store, (n, 3) int64; zeros if it was not recorded."""
        files = np.zeros((len(self), 3), np.int64)
        for index, shard in enumerate(self._shards):
            if "image_files" in shard:
                rows = self._locations[:, 0] == index
                files[rows] = shard["image_files"].numpy()[self._locations[rows, 1]]
        return files[np.searchsorted(self.image_ids, image_ids)]

    def verify(self) -> None:
        """Compare the shards' SHA-256 with the manifest; a ``ValueError`` names a damaged one."""
        # Hashing a terabyte takes an hour: shards that passed are skipped until their size or time changes.
        marker, verified = self.directory / VERIFIED, {}
        if marker.is_file():
            with contextlib.suppress(ValueError):
                verified = read_object(marker)
        states, changed = {}, []
        for entry in self.manifest["shards"]:
            state = (self.directory / entry["file"]).stat()
            states[entry["file"]] = [entry["sha256"], state.st_size, state.st_mtime_ns]
            if verified.get(entry["file"]) != states[entry["file"]]:
                changed.append(entry)
        for entry in tqdm(changed, desc=f"verifying {self.directory}, once", unit="shard", disable=len(changed) < 2):
            if problem := _compare_sha256(self.directory / entry["file"], entry["sha256"]):
                raise ValueError(problem)
        if changed:
            with contextlib.suppress(OSError):  # the directory may be read-only
                write_json(marker, states)

    def check_origin(self, expected: dict[str, Any]) -> None:
        """Refuse the store if entries of its manifest are not the ``expected`` ones, see ``manifest.check_origin``."""
        check_origin(self.directory, self.manifest, expected)


def _choose(
    shard: dict[str, torch.Tensor], prefix: str, key: str, rows: slice, copies: torch.Tensor | None
) -> torch.Tensor:
    """Return the (n, ...) rows of a tensor, or of the jittered copies that ``copies`` (n,) names, 0 for none."""
    original = shard[f"{prefix}{key}"][rows]
    if copies is None:
        return original
    # indexed rather than joined: of the memory map only the rows in question are read
    jittered = shard[f"{prefix}jittered_{key}"][rows][torch.arange(len(copies)), (copies - 1).clamp(min=0)]
    return torch.where((copies > 0)[:, None], jittered, original)


def check_size(directory: Path, entry: dict[str, Any], kind: StoreKind = TOKENS) -> None:
    """Refuse a shard that is missing, or has not the number of bytes that the manifest says."""
    path = directory / entry["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{kind.name}: shard {path} is missing; copy it again, or run {kind.command} again"
        ) from None
    if size != entry["bytes"]:
        raise ValueError(
            f"{kind.name}: shard {path} is damaged: expected {entry['bytes']} bytes, got {size}; {kind.remedy}"
        )


def map_shard(directory: Path, entry: dict[str, Any], kind: StoreKind = TOKENS) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard, which map the file: it is read when they are used."""
    path = directory / entry["file"]
    check_size(directory, entry, kind)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{kind.name}: shard {path} is damaged ({error}); {kind.remedy}") from error


def _open_shard(directory: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    path, content = directory / entry["file"], map_shard(directory, entry)
    if not {"image_ids", "offsets", "boxes", "labels"} <= set(content):
        raise ValueError(f"token store: {path} is not a shard: it has {', '.join(sorted(content)[:4])}; {REMEDY}")
    images, boxes, offsets = entry["images"], entry["boxes"], content["offsets"]
    lengths = {"image_ids": images, "offsets": images + 1, "image_files": images}
    for key, tensor in content.items():
        length = lengths.get(key, images if "feature_maps" in key else boxes)
        if tensor.dim() == 0 or len(tensor) != length:
            raise ValueError(
                f"token store: shard {path} is damaged: {key} has shape {tuple(tensor.shape)}, expected {length} rows "
                f"as the manifest says; {REMEDY}"
            )
    # Offsets index into the map: invalid ones would read other images' tokens.
    if offsets[0] != 0 or offsets[-1] != boxes or (offsets.diff() < 0).any():
        raise ValueError(f"token store: shard {path} is damaged: its offsets do not go from 0 up to {boxes}; {REMEDY}")
    return content


def _compare_sha256(path: Path, expected: str, kind: StoreKind = TOKENS) -> str:
    """Return the problem of a shard, "" for none."""
    actual = sha256_of_file(path)
    if actual == expected:
        return ""
    return f"{path} is damaged: expected SHA-256 {expected[:12]}, got {actual[:12]}; {kind.remedy}"


def find_damage(directory: str | Path, kind: StoreKind = TOKENS) -> Iterator[str]:
    """Compare a store with its manifest; yield a line for each shard that is missing, changed or not listed.

    Raises as ``read_manifest``.
    """
    directory = Path(directory)
    entries = {entry["file"]: entry for entry in read_manifest(directory, kind)["shards"]}
    for name, entry in tqdm(entries.items(), desc=f"verifying {directory}", unit="shard"):
        path = directory / name
        if not path.is_file():
            yield f"{path} is missing: run {kind.command} again, which writes it again"
        elif problem := _compare_sha256(path, entry["sha256"], kind):
            yield problem
    # Left from an extraction with other shards: they are not read, but may be copied around.
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in entries:
            yield f"{path} is not in the manifest"
