"""Images and their regions, read by processes of their own, in batches that do not depend on how many there are."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from regionspot.prediction.regions import RegionSource
from regionspot.prediction.sources import ImageList, ImageRecord
from regionspot.prediction.videos import FrameReader
from regionspot.structures import check_boxes
from regionspot.utils.fingerprint import file_state
from regionspot.utils.images import to_rgb_array


@dataclass
class Sample:
    """An image, ready to be recognized.

    Attributes:
        record: which image it is.
        image: (H, W, 3) uint8 RGB; None if it cannot be used.
        boxes: (N, 4) float32 XYXY, original pixels; None for regions that are to be found.
        proposal_scores: (N,) float32 in [0, 1], or None.
        has_entry: whether the source of regions knows the image.
        error: why the image cannot be used, "" if it can.
        file: the image's ``file_state`` before it was read.
    """

    record: ImageRecord
    image: np.ndarray | None = None
    boxes: np.ndarray | None = None
    proposal_scores: np.ndarray | None = None
    has_entry: bool = True
    error: str = ""
    file: list[int] = field(default_factory=list)


class SampleReader(Dataset):
    """Reads images by their positions in a list."""

    def __init__(self, images: ImageList, regions: RegionSource | None, deep_range: Sequence[float] = ()) -> None:
        """
        Args:
            images: the list.
            regions: returns the boxes of an image; None if the model finds them.
            deep_range: see ``decode_image``.
        """
        self.images, self.regions, self.deep_range = images, regions, tuple(deep_range)
        self._frames = FrameReader()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.images[index])

    def read(self, record: ImageRecord) -> Sample:
        """Return an image with its regions, or why it cannot be used; it raises nothing about images."""
        file = file_state(record.path)  # before it is read: it may still be growing
        sample = self._read(record)
        sample.file = file
        return sample

    def _read(self, record: ImageRecord) -> Sample:
        try:
            image = self._decode(record)
        except (ValueError, OSError, MemoryError) as error:
            return Sample(record, error=str(error) or f"image {record.path} cannot be read: {type(error).__name__}")
        if self.regions is None:
            return Sample(record, image)
        try:
            size = (image.shape[0], image.shape[1])
            regions = self.regions(record, size)
            check_boxes(torch.from_numpy(regions.boxes), size, f"boxes of {record.name}")
        except ValueError as error:
            return Sample(record, image, error=str(error))
        return Sample(record, image, regions.boxes, regions.scores, regions.has_entry)

    def _decode(self, record: ImageRecord) -> np.ndarray:
        if record.frame >= 0:
            return self._frames.read(record.path, record.frame)
        return to_rgb_array(record.path, self.deep_range)


def load_batches(reader: SampleReader, batches: Sequence[range], workers: int) -> Iterator[list[Sample]]:
    """Yield batches of samples in order, read ahead by ``workers`` processes (0: by this one).

    Raises:
        OSError: a process was killed, most often for want of memory.
    """
    loader = DataLoader(
        reader,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=min(workers, len(batches)),
        collate_fn=list,
        worker_init_fn=_start_worker,
    )
    with reader_errors("use fewer of them (--workers) and run it again, which resumes"):
        yield from loader


@contextmanager
def reader_errors(remedy: str) -> Iterator[None]:
    """Turn the end of a loader's process, which PyTorch reports wherever this one is, into an OSError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # its own errors have its number
            raise
        raise OSError(
            f"a process that reads images was killed, probably for want of memory ({error}); {remedy}"
        ) from error


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C is for the main process, which ends its workers; it does so by SIGTERM, which they must not ignore
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
