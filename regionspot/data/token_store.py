"""Token stores: frozen features of a data set's annotated regions on disk, so that training need not run SAM."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from regionspot.utils.files import atomic_path, read_json, sha256_of_file

FORMAT = "regionspot-tokens-1"
MANIFEST = "manifest.json"
REMEDY = "delete this shard and run tools/extract_tokens.py again, which makes it anew"


class TokenStore:
    """Random access to a finished store; its shards are memory-mapped, and nothing in them is ever executed.

    A store is a folder with ``manifest.json`` and shards ``shard-00000.safetensors``, ... A shard holds, of I images
    with N regions in all:

    * ``image_ids`` (I,) int64 and ``offsets`` (I + 1,) int64: the regions of image i are offsets[i] to offsets[i + 1];
    * ``boxes`` (N, 4) float32, XYXY in the pixels of the picture, and ``labels`` (N,) int32, contiguous classes;
    * ``tokens.<stage>`` (N, D) float16 for each stage, and optionally ``feature_maps`` (I, L, width) float16;
    * ``flipped_tokens.<stage>`` and ``flipped_feature_maps``, the same of the picture flipped from left to right.
    """

    def __init__(self, folder: str | Path, stage: str = "transformer") -> None:
        """
        Args:
            folder: the store.
            stage: whose tokens to read, "prompt_encoder", "transformer" or "mlp".

        Raises:
            FileNotFoundError: no such store, or a shard is missing.
            ValueError: unfinished, damaged, or without tokens of this stage.
        """
        self.folder, self.stage = Path(folder), stage
        self.manifest = read_manifest(self.folder)
        if stage not in self.manifest["stages"]:
            raise ValueError(
                f"token store {folder} has no tokens of stage {stage!r}: expected one of "
                f"{', '.join(self.manifest['stages'])}; set MODEL.REGIONSPOT.TOKEN_STAGE, or extract this stage"
            )
        self._shards = [_open_shard(self.folder / entry["file"]) for entry in self.manifest["shards"]]
        ids = [shard["image_ids"].numpy() for shard in self._shards] or [np.zeros(0, np.int64)]
        self._where = np.concatenate([np.stack([np.full(len(x), k), np.arange(len(x))], 1) for k, x in enumerate(ids)])
        every = np.concatenate(ids)
        order = np.argsort(every, kind="stable")
        self.image_ids, self._where = every[order], self._where[order].astype(np.int32)

    def __reduce__(self) -> tuple:
        return TokenStore, (str(self.folder), self.stage)  # a spawned worker maps the files for itself

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def has_feature_maps(self) -> bool:
        return self.manifest["clip"] is not None

    @property
    def has_flips(self) -> bool:
        return bool(self.manifest["flip"])

    def get(self, image_id: int, boxes: torch.Tensor, flipped: bool = False) -> dict[str, torch.Tensor]:
        """Return the features of an image.

        Args:
            image_id: the image.
            boxes: (n, 4) float, XYXY: its boxes in the unflipped picture, which must be those that the tokens were
                extracted for.
            flipped: the features of the flipped picture.

        Returns:
            ``tokens`` (n, D) float32 and, if they are stored, ``feature_map`` (L, width) float32.

        Raises:
            KeyError: the image is not in the store.
            ValueError: its boxes are others.
        """
        place = int(np.searchsorted(self.image_ids, image_id))
        if place == len(self.image_ids) or self.image_ids[place] != image_id:
            raise KeyError(
                f"token store {self.folder}: no image {image_id}; was it extracted from the same annotations?"
            )
        number, row = self._where[place]
        shard = self._shards[number]
        start, stop = shard["offsets"][row : row + 2].tolist()
        stored = shard["boxes"][start:stop]
        if stored.shape != boxes.shape or not torch.allclose(stored, boxes.float(), atol=0.01):
            raise ValueError(
                f"token store {self.folder}: image {image_id} has other boxes than when the tokens were extracted "
                f"({stop - start} then, {len(boxes)} now); extract them again"
            )
        prefix = "flipped_" if flipped else ""
        features = {"tokens": shard[f"{prefix}tokens.{self.stage}"][start:stop].float()}
        if self.has_feature_maps:
            features["feature_map"] = shard[f"{prefix}feature_maps"][row].float()
        return features

    def check_origin(self, expected: dict[str, Any]) -> None:
        """Refuse the store if it is of other annotations or other frozen parts.

        Args:
            expected: what training uses, see ``describe_annotations`` and ``regionspot.engine.extract``; of the
                manifest's entries those that are given here are compared.

        Raises:
            ValueError: names both.
        """
        difference = compare_origins(self.manifest, expected)
        if difference:
            raise ValueError(f"token store {self.folder} {difference}; extract the tokens again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished store."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / "origin.json").is_file():
            raise ValueError(f"token store {folder} is not finished; run tools/extract_tokens.py again, it goes on")
        raise FileNotFoundError(f"token store {folder}: no {MANIFEST} there; make it with tools/extract_tokens.py")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"token store: {path} is of format {manifest.get('format')!r}, expected {FORMAT!r}")
    shards = manifest.get("shards")
    stages, counts = manifest.get("stages"), [manifest.get("images"), manifest.get("boxes")]
    whole = {"clip", "flip", "sam", "annotations"} <= set(manifest) and all(type(count) is int for count in counts)
    whole = whole and isinstance(stages, list) and all(isinstance(stage, str) for stage in stages)
    if not whole or not isinstance(shards, list) or not all(_is_entry(entry) for entry in shards):
        raise ValueError(f"token store: {path} is damaged: it lacks what a manifest has; extract the tokens again")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, "token store:")
    if not isinstance(content, dict):
        raise ValueError(f"token store: {path} is damaged: expected an object, got {type(content).__name__}")
    return content


def _is_entry(entry: Any) -> bool:
    kinds = {"file": str, "sha256": str, "bytes": int, "images": int, "boxes": int, "seen": int}
    if not isinstance(entry, dict) or not all(type(entry.get(key)) is kind for key, kind in kinds.items()):
        return False
    return re.fullmatch(r"shard-\d+\.safetensors", entry["file"]) is not None  # of this folder, not "../"


def compare_origins(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return how a store's origin differs from what is expected, "" if it does not.

    Both are as in the manifest: plain values, and dicts with a "fingerprint" (that counts) and a "source" (its name).
    """
    for key, wanted in expected.items():
        there = found.get(key)
        if isinstance(wanted, dict) and isinstance(there, dict):
            rest = {name for name in wanted if name != "source"}
            if all(there.get(name) == wanted[name] for name in rest):
                continue
        elif there == wanted:
            continue
        return f"is of another {key}: expected {_say(wanted)}, got {_say(there)}"
    return ""


def _say(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    others = "".join(f", {key} {item}" for key, item in value.items() if key not in ("source", "fingerprint"))
    return f"{value.get('source') or 'weights without a name'} ({str(value.get('fingerprint'))[:12]}{others})"


def _open_shard(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"token store: shard {path} is missing; copy it again, or run extract_tokens.py again")
    try:
        with safe_open(path, framework="pt") as file:  # the tensors are maps of the file, read when they are used
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"token store: shard {path} is damaged ({error}); {REMEDY}") from error
    if not {"image_ids", "offsets", "boxes", "labels"} <= set(content):
        raise ValueError(f"token store: {path} is no shard: it holds {', '.join(sorted(content)[:4])}; {REMEDY}")
    return content


class StoreWriter:
    """Writes a store shard by shard; any number of processes may write to one folder, and be killed at any instant.

    A shard is finished when the small JSON beside it is there; both appear whole or not at all. When all are,
    ``finish`` gathers the JSONs in the manifest.
    """

    def __init__(self, folder: str | Path, origin: dict[str, Any], number: int) -> None:
        """
        Args:
            folder: of the store.
            origin: what the features are of; the manifest begins with it.
            number: of shards.

        Raises:
            ValueError: the folder holds a store, finished or not, of another origin.
        """
        self.folder, self.number = Path(folder), number
        self.origin = {"format": FORMAT, **origin, "number of shards": number}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, "origin.json"):
            if (self.folder / name).is_file():
                difference = compare_origins(_read_json(self.folder / name), self.origin)
                if difference:
                    raise ValueError(f"{self.folder} holds a token store that {difference}; give another folder")
        if self.is_complete():
            self._reopen()
        if not self.is_complete():
            _write_json(self.folder / "origin.json", self.origin)

    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def path(self, shard: int, suffix: str = ".safetensors") -> Path:
        return self.folder / f"shard-{shard:05d}{suffix}"

    def is_finished(self, shard: int) -> bool:
        return self._entry(shard) is not None or self.is_complete()

    def finished_images(self) -> int:
        """Return how many of the data set's images need no more work, as far as it is not complete."""
        return sum(entry["seen"] for shard in range(self.number) if (entry := self._entry(shard)))

    def _entry(self, shard: int) -> dict[str, Any] | None:
        """Return what the manifest will say of a finished shard, None of one that is not."""
        try:
            entry = _read_json(self.path(shard, ".json"))
            whole = _is_entry(entry) and self.path(shard).stat().st_size == entry["bytes"]
        except (FileNotFoundError, ValueError):  # not there (any more)
            return None
        return entry if whole else None

    def _reopen(self) -> None:
        """Take a finished store apart if shards of it are missing or cut, so that they are made anew."""
        entries = read_manifest(self.folder)["shards"]
        whole = [
            (path := self.folder / entry["file"]).is_file() and path.stat().st_size == entry["bytes"]
            for entry in entries
        ]
        if not all(whole):
            for shard, (entry, is_whole) in enumerate(zip(entries, whole)):
                if is_whole:
                    _write_json(self.path(shard, ".json"), entry)
            (self.folder / MANIFEST).unlink()

    def write(self, shard: int, content: dict[str, torch.Tensor], seen: int) -> None:
        """Write a shard: tensors as ``TokenStore`` describes them, of ``seen`` images, with regions or without."""
        for key, value in content.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{self.path(shard)}: {key} holds NaN or what float16 cannot hold")
        with atomic_path(self.path(shard)) as temporary:
            save_file({key: value.contiguous() for key, value in content.items()}, temporary)
            sha256, size = sha256_of_file(temporary), temporary.stat().st_size
        counts = {"images": len(content["image_ids"]), "boxes": len(content["boxes"]), "seen": seen}
        entry = {"file": self.path(shard).name, "sha256": sha256, "bytes": size, **counts}
        _write_json(self.path(shard, ".json"), entry)

    def finish(self) -> bool:
        """Write the manifest if all shards are there; return whether the store is complete."""
        if not self.is_complete():
            entries = [entry for shard in range(self.number) if (entry := self._entry(shard))]
            if len(entries) < self.number and not self.is_complete():
                return False
            if not self.is_complete():
                counts = {key: sum(entry[key] for entry in entries) for key in ("images", "boxes")}
                _write_json(self.folder / MANIFEST, {**self.origin, **counts, "shards": entries})
        leftovers = [*self.folder.glob("shard-*.json"), *self.folder.glob(".shard-*.tmp"), self.folder / "origin.json"]
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.locks, ignore_errors=True)
        return True

    @property
    def locks(self) -> Path:
        """Folder of the locks that processes hold while they work."""
        return self.folder / ".locks"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def pack_images(images: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a shard's tensors.

    Args:
        images: for each image ``image_id``, ``boxes`` (n, 4), ``labels`` (n,), and features under the shard's keys:
            tokens (n, D) and, optionally, feature maps (L, width).
    """
    lengths = torch.tensor([0] + [len(image["boxes"]) for image in images])
    content = {
        "image_ids": torch.tensor([image["image_id"] for image in images], dtype=torch.int64),
        "offsets": lengths.cumsum(0),
        "boxes": torch.cat([torch.zeros(0, 4)] + [image["boxes"].float() for image in images]),
        "labels": torch.cat([torch.zeros(0, dtype=torch.int32)] + [image["labels"].int() for image in images]),
    }
    for key in images[0].keys() - {"image_id", "boxes", "labels"} if images else ():
        join = torch.stack if "feature_maps" in key else torch.cat
        content[key] = join([image[key].half().cpu() for image in images])
    return content


def find_damage(folder: str | Path) -> Iterator[str]:
    """Check a store against its manifest; yield a line for every shard that is missing, changed or superfluous.

    Raises:
        FileNotFoundError: no store there.
        ValueError: not finished, or its manifest is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for entry in tqdm(manifest["shards"], desc=f"verifying {folder}", unit="shard"):
        path = folder / entry["file"]
        if not path.is_file():
            yield f"{path} is missing: run tools/extract_tokens.py again, which makes it anew"
        elif (found := sha256_of_file(path)) != entry["sha256"]:
            yield f"{path} is damaged: expected SHA-256 {entry['sha256'][:12]}, got {found[:12]}; {REMEDY}"
    listed = {entry["file"] for entry in manifest["shards"]}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            yield f"{path} is not in the manifest"
