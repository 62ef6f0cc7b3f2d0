"""Predictions, written image by image, so that an interrupted evaluation resumes."""

import logging
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from detectron2.utils import comm
from torch import distributed

from regionspot.evaluation.class_cap import ClassCap
from regionspot.utils.files import atomic_path

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<qII")  # image id, length and CRC-32 of what follows
_CHUNK = 1 << 26  # bytes that are sent at a time
_REWRITTEN = 1 << 22  # detections in a file before it is rewritten without those that the cap no longer admits
_TIMEOUT = timedelta(days=7)  # processes wait for the slowest one, and for the main one while it evaluates


def _none(dtype: type, shape: tuple[int, ...] = (0,)) -> Any:
    return msgspec.field(default_factory=partial(np.zeros, shape, dtype))


class ImagePredictions(msgspec.Struct, eq=False):
    """The detections of an image, and the best classes of its annotated regions."""

    image_id: int
    classes: np.ndarray = _none(np.int32)  # (D,) contiguous classes
    scores: np.ndarray = _none(np.float32)  # (D,)
    regions: np.ndarray = _none(np.int32)  # (D,) rows of ``boxes`` and ``rles``
    boxes: np.ndarray = _none(np.float32, (0, 4))  # (R, 4) XYWH, original pixels
    rles: list[str] = []  # counts of the R regions' compressed RLE; empty without masks
    size: tuple[int, int] = (0, 0)  # (height, width) of the masks
    targets: np.ndarray | None = None  # (N,) annotated classes of the regions, if the boxes are the annotated ones
    top: np.ndarray | None = None  # (N, k) the best classes of each of these regions, best first
    unreadable: str = ""  # why the image could not be read; it then has no detections

    def select(self, keep: np.ndarray) -> "ImagePredictions":
        """Return the detections of ``keep`` (D,) bool, with their regions only."""
        if keep.all():
            return self
        used, regions = np.unique(self.regions[keep], return_inverse=True)
        return msgspec.structs.replace(
            self,
            classes=self.classes[keep],
            scores=self.scores[keep],
            regions=regions.astype(self.regions.dtype),
            boxes=self.boxes[used],
            rles=[self.rles[row] for row in used.tolist()] if self.rles else [],
        )


class PredictionLog:
    """Records of images, in one file for each process of each run; a truncated record is ignored.

    The name of a file has the identity and a random name of its run, so that no two runs write to the same file.
    Processes need no common disk: files that are not in the main process's directory are sent to it.
    """

    def __init__(self, directory: str | Path, identity: str, cap: ClassCap | None = None) -> None:
        """Write to ``directory``, and remove files with another ``identity``: a hash of model, data and protocol.

        Detections that ``cap`` does not admit are dropped.
        """
        self.directory, self.cap = Path(directory), cap
        self.prefix = f"predictions.{identity[:16]}."
        self._file: BinaryIO | None = None
        self._path = self.directory
        self._written = 0  # detections in the file
        self._places: dict[int, tuple[Path, int]] = {}  # of each image's record

    def open(self) -> set[int]:
        """Start to write; return the ids of the images that earlier runs wrote, with any number of processes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob("predictions.*"):
            if not path.name.startswith(self.prefix):
                path.unlink(missing_ok=True)
        run = comm.all_gather(uuid.uuid4().hex[:8], _patient_group())[0]  # all processes take the main one's name
        # Files of this run may appear already: another process may be faster.
        self._index(path for path in self._files() if f".{run}." not in path.name)
        done = set().union(*comm.all_gather(set(self._places), _patient_group()))
        if done and comm.is_main_process():
            logger.info("%d images were evaluated before: resuming", len(done))
        self._path = self.directory / f"{self.prefix}{run}.{comm.get_rank()}.log"
        self._file = self._path.open("xb")
        return done

    def admits(self, image_id: int, classes: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return (D,) bool: which of an image's detections are worth writing, see ``ClassCap.admits``."""
        return self.cap.admits(image_id, classes, scores) if self.cap else np.ones(len(classes), bool)

    def append(self, predictions: ImagePredictions) -> None:
        """Write an image's predictions."""
        assert self._file is not None, "open() comes first"
        predictions = self._admitted(predictions)
        if self.cap:
            self.cap.add(predictions.image_id, predictions.classes, predictions.scores)
        _write(self._file, predictions)
        self._file.flush()  # a killed process loses no image that is done
        self._written += len(predictions.classes)
        if self.cap and self._written > max(_REWRITTEN, 4 * self.cap.num_kept):
            self._rewrite(self.cap)

    def collect(self) -> None:
        """End writing, and bring all records to the main process's disk."""
        assert self._file is not None
        self._file.close()
        names = comm.all_gather({path.name for path in self._files()}, _patient_group())
        for name in sorted(set().union(*names) - names[0]):
            self._send(name, next(rank for rank, own in enumerate(names) if name in own))
        if comm.is_main_process():
            # Thresholds of one process are too low: the cap starts over with the detections of all of them.
            self._places = {}
            if self.cap:
                self.cap = ClassCap(self.cap.num_classes, self.cap.limit)
            unreadable = self._index(self._files())
            self._places = unreadable | self._places
            if self.cap:
                self.cap.rank()

    def __len__(self) -> int:
        """Return the number of images with a record."""
        return len(self._places)

    def __iter__(self) -> Iterator[ImagePredictions]:
        """Yield all images' predictions, sorted by image id; in the main process, after ``collect``."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path, _ in self._places.values()}
            for image_id in sorted(self._places):
                path, offset = self._places[image_id]
                files[path].seek(offset)
                yield self._admitted(_decode(next(_records(files[path]))[2]))

    def finish(self, complete: bool) -> None:
        """Wait for the main process, and remove the files if its evaluation is ``complete``; else the others raise."""
        complete = comm.all_gather(complete, _patient_group())[0]
        if complete:
            for path in self._files():
                path.unlink(missing_ok=True)
        elif not comm.is_main_process():
            raise RuntimeError("the main process did not complete the evaluation; its log says why")

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob(f"{self.prefix}*.log"))

    def _admitted(self, predictions: ImagePredictions) -> ImagePredictions:
        return predictions.select(self.admits(predictions.image_id, predictions.classes, predictions.scores))

    def _index(self, paths: Iterator[Path] | list[Path]) -> dict[int, tuple[Path, int]]:
        """Index each image's record, and tell the cap its scores; return the records of unreadable images.

        Those are not indexed: the images may be readable by now.
        """
        unreadable = {}
        for path in paths:
            with path.open("rb") as file:
                for offset, image_id, content in _records(file):
                    predictions = _decode(content)
                    if predictions.unreadable:
                        unreadable[image_id] = (path, offset)
                        continue
                    if self.cap and image_id not in self._places:
                        predictions = self._admitted(predictions)
                        self.cap.add(image_id, predictions.classes, predictions.scores)
                    self._places.setdefault(image_id, (path, offset))
        return unreadable

    def _rewrite(self, cap: ClassCap) -> None:
        """Drop detections that are below the thresholds by now from the file."""
        assert self._file is not None
        self._file.close()
        cap.rank()
        self._written = 0
        with atomic_path(self._path) as temporary, self._path.open("rb") as old, temporary.open("wb") as new:
            for _, _, content in _records(old):
                predictions = self._admitted(_decode(content))
                _write(new, predictions)
                self._written += len(predictions.classes)
        self._file = self._path.open("ab")

    def _send(self, name: str, sender: int) -> None:
        """Send a file from a process to the main one, a chunk at a time; an empty chunk is the last."""
        group, chunk = _patient_group(), [b""]
        if comm.get_rank() == sender:
            with (self.directory / name).open("rb") as file:
                while data := file.read(_CHUNK):
                    distributed.send_object_list([data], 0, group)
            distributed.send_object_list(chunk, 0, group)
        elif comm.is_main_process():
            with atomic_path(self.directory / name) as temporary, temporary.open("wb") as file:
                while True:
                    distributed.recv_object_list(chunk, sender, group)
                    if not chunk[0]:
                        break
                    file.write(chunk[0])


def _patient_group() -> Any:
    """Return a group of all processes that may wait for days; NCCL's would give up after minutes."""
    return _make_group(distributed.group.WORLD) if comm.get_world_size() > 1 else None


@lru_cache(maxsize=1)  # a new group for new processes
def _make_group(world: Any) -> Any:
    return distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def _write(file: BinaryIO, predictions: ImagePredictions) -> None:
    content = msgspec.msgpack.encode(predictions, enc_hook=lambda x: (x.dtype.str, x.shape, x.tobytes()))
    file.write(_HEADER.pack(predictions.image_id, len(content), zlib.crc32(content)) + content)


def _decode(content: bytes) -> ImagePredictions:
    def array(_: type, value: Any) -> np.ndarray:
        kind, shape, data = value
        return np.frombuffer(data, kind).reshape(shape)

    return msgspec.msgpack.decode(content, type=ImagePredictions, dec_hook=array)


def _records(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, image id, content) of the whole records from the file's position on."""
    while len(header := file.read(_HEADER.size)) == _HEADER.size:
        image_id, length, checksum = _HEADER.unpack(header)
        offset, content = file.tell() - _HEADER.size, file.read(length)
        if len(content) < length or zlib.crc32(content) != checksum:
            logger.warning("%s: a record is truncated or damaged; images after it are recognized again", file.name)
            return
        yield offset, image_id, content
