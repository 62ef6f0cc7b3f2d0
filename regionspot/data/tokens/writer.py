"""Writing stores, shard by shard, by any number of processes."""

import shutil
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regionspot.data.tokens.manifest import (
    MANIFEST,
    ORIGIN,
    TOKENS,
    StoreKind,
    check_origin,
    is_entry,
    read_manifest,
    read_object,
    read_origin,
)
from regionspot.utils.files import atomic_path, sha256_of_file, write_json


class StoreWriter:
    """Writes a store shard by shard; any number of processes may write to one directory, and be killed at any time.

    A shard is finished when the small JSON file beside it is there; both appear whole or not at all. When all
    ``num_shards`` are finished, ``finish`` gathers these files into the manifest, which begins with ``origin``: what
    the features are extracted from.

    Raises:
        ValueError: the directory has a store, finished or not, of another origin.
    """

    def __init__(
        self, directory: str | Path, origin: dict[str, Any], num_shards: int, kind: StoreKind = TOKENS
    ) -> None:
        self.directory, self.num_shards, self.kind = Path(directory), num_shards, kind
        self.origin = {"format": kind.format, **origin, "num_shards": num_shards}
        self.directory.mkdir(parents=True, exist_ok=True)
        # A finished store has a manifest, one in progress its beginning; both name the origin.
        for name in (MANIFEST, ORIGIN):
            if (self.directory / name).is_file():
                check_origin(self.directory, read_origin(self.directory / name, kind), self.origin, kind)
        self.discard()
        if not self.is_complete():
            write_json(self.directory / ORIGIN, self.origin)

    @property
    def locks(self) -> Path:
        """Directory of the locks that processes hold while they work."""
        return self.directory / ".locks"

    def path(self, shard: int, suffix: str = ".safetensors") -> Path:
        return self.directory / f"shard-{shard:05d}{suffix}"

    def is_complete(self) -> bool:
        return (self.directory / MANIFEST).is_file()

    def is_finished(self, shard: int) -> bool:
        return self._entry(shard) is not None or self.is_complete()

    def finished_images(self) -> int:
        """Return the number of the data set's images in finished shards of an incomplete store."""
        return sum(entry["seen"] for shard in range(self.num_shards) if (entry := self._entry(shard)))

    def left_out(self, shard: int) -> list[int]:
        """Return the ids of unreadable images, which a finished shard lacks."""
        return list(self.left_out_files(shard))

    def left_out_files(self, shard: int) -> dict[int, list[int] | None]:
        """Return the ``file_state`` of the images that a finished shard lacks by their ids; None if it is not known."""
        entry = read_manifest(self.directory, self.kind)["shards"][shard] if self.is_complete() else self._entry(shard)
        entry = entry or {}
        return dict(zip_longest(entry.get("left_out", ()), entry.get("left_out_files", ())))

    def image_files(self, shard: int) -> dict[int, list[int]]:
        """Return the ``describe_file`` of the images of a finished shard by their ids."""
        with safe_open(self.path(shard), framework="pt") as file:
            if "image_files" not in file.keys():  # noqa: SIM118 - an older store
                return {}
            return dict(zip(file.get_tensor("image_ids").tolist(), file.get_tensor("image_files").tolist()))

    def discard(self, shards: Collection[int] = ()) -> None:
        """Mark these shards as not finished, and those of a complete store that are missing or truncated."""
        if self.is_complete():
            entries = dict(enumerate(read_manifest(self.directory, self.kind)["shards"]))
            intact = {shard: x for shard, x in entries.items() if shard not in shards and self._is_intact(x)}
            if len(intact) == len(entries):
                return
            # The entries are restored before the manifest is removed: killed in between, the store is still complete.
            for shard, entry in intact.items():
                write_json(self.path(shard, ".json"), entry)
            write_json(self.directory / ORIGIN, self.origin)
            (self.directory / MANIFEST).unlink()
        for shard in shards:
            self.path(shard, ".json").unlink(missing_ok=True)

    def write(
        self,
        shard: int,
        content: dict[str, torch.Tensor],
        seen: int,
        left_out: Sequence[int] = (),
        reasons: Sequence[str] = (),
        left_out_files: Sequence[list[int]] = (),
    ) -> None:
        """Write a shard with the tensors that ``TokenStore`` (or ``RegionIndex``) describes.

        ``seen`` is its number of images of the data set, with regions or without; ``left_out`` has the unreadable ones,
        ``reasons`` says why, and ``left_out_files`` has the ``file_state`` of each.
        """
        for key, value in content.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{self.path(shard)}: {key} has NaN, or numbers beyond the range of float16")
        with atomic_path(self.path(shard)) as temporary:
            save_file({key: value.contiguous() for key, value in content.items()}, temporary)
            # of the file as written, before it is renamed: what was read back later might be damaged already
            sha256, size = sha256_of_file(temporary), temporary.stat().st_size
        counts = {"images": len(content["image_ids"]), "boxes": len(content["boxes"]), "seen": seen}
        entry = {"file": self.path(shard).name, "sha256": sha256, "bytes": size, **counts}
        if left_out:
            entry["left_out"] = list(left_out)
        if reasons:
            entry["reasons"] = list(reasons)
        if left_out_files:
            entry["left_out_files"] = list(left_out_files)
        write_json(self.path(shard, ".json"), entry)

    def finish(self) -> bool:
        """Write the manifest if all shards are there; return whether the store is complete."""
        entries = [entry for shard in range(self.num_shards) if (entry := self._entry(shard))]
        # Another process may have finished the store, and removed the entries, since they were read.
        if not self.is_complete():
            if len(entries) < self.num_shards:
                return False
            counts = {key: sum(entry[key] for entry in entries) for key in ("images", "boxes")}
            write_json(self.directory / MANIFEST, {**self.origin, **counts, "shards": entries})
        # After the manifest: if this is interrupted, the next run cleans up.
        for pattern in ("shard-*.json", ".shard-*.tmp", ORIGIN):
            for leftover in self.directory.glob(pattern):
                leftover.unlink(missing_ok=True)
        shutil.rmtree(self.locks, ignore_errors=True)
        return True

    def _entry(self, shard: int) -> dict[str, Any] | None:
        """Return the entry in the manifest of a finished shard, None for others."""
        try:
            entry = read_object(self.path(shard, ".json"))
        except (FileNotFoundError, ValueError):
            return None
        return entry if is_entry(entry) and self._is_intact(entry) else None

    def _is_intact(self, entry: dict[str, Any]) -> bool:
        path = self.directory / entry["file"]
        return path.is_file() and path.stat().st_size == entry["bytes"]


def pack_images(images: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a shard's tensors.

    Args:
        images: for each image ``image_id``, ``boxes`` (n, 4), ``labels`` (n,), optionally ``image_file`` (3,) (see
            ``describe_file``), ``jittered_boxes`` (n, K, 4), and features under the shard's keys: tokens (n, D) or
            (n, K, D) and, optionally, feature maps (L, width).
    """
    # Concatenations begin with an empty tensor: a shard may have no image.
    lengths = torch.tensor([0] + [len(image["boxes"]) for image in images])
    content = {
        "image_ids": torch.tensor([image["image_id"] for image in images], dtype=torch.int64),
        "offsets": lengths.cumsum(0),
        "boxes": torch.cat([torch.zeros(0, 4)] + [image["boxes"].float() for image in images]),
        "labels": torch.cat([torch.zeros(0, dtype=torch.int32)] + [image["labels"].int() for image in images]),
    }
    if images and "image_file" in images[0]:
        content["image_files"] = torch.tensor([image["image_file"] for image in images], dtype=torch.int64)
    for key in images[0].keys() - {"image_id", "image_file", "boxes", "labels"} if images else ():
        join = torch.stack if "feature_maps" in key else torch.cat
        dtype = torch.float32 if key == "jittered_boxes" else torch.float16
        content[key] = join([image[key].to(dtype).cpu() for image in images])
    return content
