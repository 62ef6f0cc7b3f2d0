"""Predictions written as they come, so that an evaluation that was cut goes on where it stopped."""

import logging
from pathlib import Path
from typing import BinaryIO

import msgspec
from detectron2.utils import comm

from regionspot.utils.files import atomic_path

logger = logging.getLogger(__name__)


class ImagePredictions(msgspec.Struct):
    """The detections of an image, and what was found for each of its regions.

    Attributes:
        image_id: the image.
        classes: (D,) contiguous classes.
        scores: (D,).
        boxes: (D, 4) XYWH, original pixels.
        regions: (D,) index of each detection's region in ``rles``; empty without masks.
        rles: counts of the regions' compressed RLE.
        size: (height, width) of the masks.
        targets: (N,) annotated classes of the regions, where the regions are the annotated ones.
        top: for each of these its best classes, best first.
        unreadable: why the image could not be read; it then has no detections.
    """

    image_id: int
    classes: list[int]
    scores: list[float]
    boxes: list[list[float]]
    regions: list[int] = []
    rles: list[str] = []
    size: tuple[int, int] = (0, 0)
    targets: list[int] = []
    top: list[list[int]] = []
    unreadable: str = ""


class PredictionLog:
    """One line an image, in one file a process; lines that were cut off while written do not count."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        """
        Args:
            folder: where the files lie.
            identity: of model, data and protocol; lines of another are forgotten.
        """
        self.folder, self.identity = Path(folder), identity
        self._file: BinaryIO | None = None

    def open(self) -> set[int]:
        """Start to write; return the ids of the images that were written before, by whatever number of processes."""
        done: list[int] = []
        if comm.is_main_process():
            done = self._merge()
        done = comm.all_gather(done)[0]
        self._file = self._path(comm.get_rank()).open("ab")
        return set(done)

    def append(self, predictions: ImagePredictions) -> None:
        assert self._file is not None, "open() comes first"
        self._file.write(msgspec.json.encode(predictions) + b"\n")
        self._file.flush()

    def gather(self) -> list[ImagePredictions] | None:
        """Return all images' predictions, sorted by image id, in the main process; None in the others."""
        assert self._file is not None
        self._file.close()
        own = self._path(comm.get_rank()).read_bytes()
        parts = comm.gather(own) if comm.get_world_size() > 1 else [own]
        if not comm.is_main_process():
            return None
        images = {image.image_id: image for part in parts for image in _read(part)}
        return [images[image_id] for image_id in sorted(images)]

    def remove(self) -> None:
        """Forget what was written: the evaluation is complete."""
        comm.synchronize()
        if comm.is_main_process():
            for path in [*self.folder.glob("predictions.*.jsonl"), self.folder / "predictions.identity"]:
                path.unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self.folder / f"predictions.{rank}.jsonl"

    def _merge(self) -> list[int]:
        """Bring the whole lines of all files together in the main process's; return their image ids."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "predictions.identity"
        paths = sorted(self.folder.glob("predictions.*.jsonl"))
        images: dict[int, ImagePredictions] = {}
        if known.is_file() and known.read_text() == self.identity:
            every = (image for path in paths for image in _read(path.read_bytes()))
            images = {image.image_id: image for image in every if not image.unreadable}  # they may be whole by now
        with atomic_path(known) as temporary:
            temporary.write_text(self.identity)
        with atomic_path(self._path(0)) as temporary, temporary.open("wb") as file:
            file.writelines(msgspec.json.encode(image) + b"\n" for image in images.values())
        for path in paths:
            if path != self._path(0):
                path.unlink()
        if images:
            logger.info("%d images were evaluated before: going on", len(images))
        return list(images)


def _read(content: bytes) -> list[ImagePredictions]:
    decoder, images = msgspec.json.Decoder(ImagePredictions), []
    for line in content.split(b"\n")[:-1]:  # what is behind the last line end was cut off
        try:
            images.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            logger.warning("a line of predictions is damaged: its image is recognised again")
    return images
