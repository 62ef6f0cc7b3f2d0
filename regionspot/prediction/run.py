"""A run over any number of images: bounded memory, killed and resumed at will, with the same files at its end."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction.loading import Sample, SampleReader, load_batches
from regionspot.prediction.outputs import ImageWriter, encode_image
from regionspot.prediction.parts import PartStore
from regionspot.prediction.recognize import Recognize
from regionspot.prediction.sources import SUMMARY
from regionspot.utils.files import write_json

_AHEAD = 2  # batches of results that wait to be written: memory is bounded


@dataclass
class Summary:
    """What a run did.

    Attributes:
        num_images: all images.
        num_regions: all regions that were kept.
        unreadable: (name, reason) of images that could not be used.
        without_regions: names of images that the source of regions does not know.
    """

    num_images: int = 0
    num_regions: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    without_regions: list[str] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Count an image."""
        self.num_images += 1
        self.num_regions += len(line["boxes"])
        if line["error"]:
            self.unreadable.append((line["name"], line["error"]))
        elif not line["has_entry"]:
            self.without_regions.append(line["name"])


class _Writer:
    """Writes outputs in a thread, and a part when all its images are done."""

    def __init__(self, parts: PartStore, writers: Sequence[ImageWriter], with_embeddings: bool) -> None:
        self._parts, self._writers, self._with_embeddings = parts, writers, with_embeddings
        self._queue: queue.Queue = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="outputs", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write inside the block, and all that is left at its end; after an error or a signal nothing more."""
        self._thread.start()
        try:
            yield
            self.put(None)
        except BaseException:
            self._stopped = True
            self._drain()
            raise
        finally:
            self._thread.join()
        self._raise()

    def put(self, batch: tuple[int, Sequence[Sample], Sequence[RegionPredictions | None]] | None) -> None:
        """Add a batch with its part; wait while too many are waiting.

        Raises:
            OSError: an earlier one could not be written.
        """
        while True:
            self._raise()
            try:
                return self._queue.put(batch, timeout=0.5)
            except queue.Full:
                continue

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._queue.put(None)

    def _work(self) -> None:
        lines: list[bytes] = []
        try:
            while (batch := self._queue.get()) is not None:
                part, samples, results = batch
                for sample, regions in zip(samples, results):
                    if self._stopped:
                        return
                    lines.append(self._write(sample, regions))
                if len(lines) == self._parts.images_of(part):
                    self._parts.write(part, lines)
                    lines = []
        except BaseException as error:
            self._error = error

    def _write(self, sample: Sample, regions: RegionPredictions | None) -> bytes:
        if regions is not None and sample.image is not None:
            for writer in self._writers:
                writer(sample.record, sample.image, regions)
        return encode_image(sample, regions, self._with_embeddings)


def run_prediction(
    reader: SampleReader,
    build_recognize: Callable[[], tuple[Recognize, Sequence[ImageWriter]]],
    parts: PartStore,
    workers: int,
    with_embeddings: bool = False,
) -> None:
    """Recognize all images of the parts that are missing, or in which an image failed whose file has changed since.

    Args:
        reader: of the images and their regions.
        build_recognize: returns what recognizes a batch, and what writes the outputs of an image; it is called only if
            a part is missing.
        parts: that are finished and that are not; it is open.
        workers: processes that read images.
        with_embeddings: keep the regions' embeddings.

    Raises:
        OSError: outputs cannot be written; what was written stays, and another run continues.
    """
    parts.discard_changed(reader.images)
    batches = parts.missing_batches()
    if not batches:
        return
    recognize, writers = build_recognize()
    total = len(reader)
    writer = _Writer(parts, writers, with_embeddings)
    finished = total - sum(map(len, batches))
    batch_size = len(parts.batches[0])
    with tqdm(total=total, initial=finished, desc="images", unit="image") as progress, writer.running():
        for samples in load_batches(reader, batches, workers):
            part = parts.part_of(samples[0].record.index // batch_size)
            writer.put((part, samples, recognize(samples)))
            progress.update(len(samples))


def summarize(
    output: str | Path, parts: PartStore, skipped: Sequence[tuple[str, str]], files: Sequence[Path] = ()
) -> Summary:
    """Read all parts once, and write the lists of what was left out.

    Args:
        output: directory of the run's outputs.
        parts: all finished.
        skipped: (path, reason) of inputs that are not among the images, or not wholly.
        files: that were made of all images.
    """
    summary = Summary(unreadable=list(skipped))
    for line in parts:
        summary.add(line)
    content = {
        "images": summary.num_images,
        "regions": summary.num_regions,
        "unreadable": [{"image": name, "reason": reason} for name, reason in summary.unreadable],
        "without_regions": summary.without_regions,
        "files": [path.name for path in files],
    }
    write_json(Path(output) / SUMMARY, content)
    return summary
