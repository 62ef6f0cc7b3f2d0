"""What a run has finished: files of JSON lines, one of each part of its images, that a later run takes up."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from regionspot.prediction.sources import ImageRecord
from regionspot.utils.files import atomic_path, read_json, write_json
from regionspot.utils.fingerprint import file_state

FEW_IMAGES = 20  # a run of so many at most is replaced by one with other settings without being asked
PART_IMAGES = 64  # images of a part, at least: what a killed run repeats


class _Line(msgspec.Struct):
    """What a run itself reads of an image's line; other keys are ignored."""

    error: str | None
    file: list[int] | None = None
    stem: str = ""


class PartStore:
    """The finished parts of a run, in the directory ``.parts`` of its outputs.

    Each part has the same images whenever the run is resumed, so that its batches, and with them the last bits of its
    numbers, are the same. A part's file appears whole, and only when the outputs of its images are written.

    Attributes:
        directory: of the files.
        batches: positions of the images of each batch, of the whole run.
    """

    def __init__(self, output: str | Path, num_images: int, batch_size: int) -> None:
        """
        Args:
            output: directory of the run's outputs.
            num_images: number of all images.
            batch_size: images of a batch.
        """
        self.directory = Path(output) / ".parts"
        self.batches = [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
        self._batches_per_part = max(1, PART_IMAGES // batch_size)

    def open(self, settings: dict[str, Any], overwrite: bool = False) -> tuple[list[str], list[str]]:
        """Begin or resume a run.

        Args:
            settings: all that the results depend on.
            overwrite: discard what a run with other settings has finished.

        Returns:
            The formats of the run that was discarded, and the stems of its images whose outputs are written; empty
            lists for none.

        Raises:
            ValueError: the directory has a run with other settings.
        """
        path, formats, stems = self.directory / "run.json", list[str](), list[str]()
        if path.is_file():
            earlier = read_json(path, "run")
            differing = [key for key in settings if earlier.get(key) != settings[key]]
            if not differing:
                return formats, stems
            is_large = earlier.get("images", [0])[0] > FEW_IMAGES  # a few are soon recognized again
            if is_large and not overwrite and any(self.directory.glob("*.jsonl")):
                key = differing[0]
                raise ValueError(
                    f"--output {self.directory.parent}: it has a run with other settings; {key} was "
                    f"{_shorten(earlier.get(key))}, and is now {_shorten(settings[key])}. Give another directory, "
                    "or --overwrite"
                )
            formats, stems = earlier.get("formats", formats), list(self._finished_stems())
        if self.directory.is_dir():
            shutil.rmtree(self.directory)
        write_json(path, settings)
        return formats, stems

    def _finished_stems(self) -> Iterator[str]:
        decoder = msgspec.json.Decoder(_Line)
        for part in sorted(self._finished()):
            yield from (line.stem for line in self._read(part, decoder) if line.stem and not line.error)

    def num_parts(self) -> int:
        """Return the number of parts of the whole run."""
        return -(-len(self.batches) // self._batches_per_part)

    def part_of(self, batch: int) -> int:
        """Return the part that has a batch."""
        return batch // self._batches_per_part

    def missing_batches(self) -> list[range]:
        """Return the batches of the parts that are not finished."""
        finished = self._finished()
        return [batch for number, batch in enumerate(self.batches) if self.part_of(number) not in finished]

    def images_of(self, part: int) -> int:
        """Return the number of a part's images."""
        first = part * self._batches_per_part
        return sum(map(len, self.batches[first : first + self._batches_per_part]))

    def write(self, part: int, lines: Sequence[bytes]) -> None:
        """Write a finished part; afterwards it is on the disk."""
        with atomic_path(self._path(part), sync=True) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))

    def discard_changed(self, images: Sequence[ImageRecord]) -> None:
        """Discard the parts with an image that failed and whose file is another one by now.

        Raises:
            ValueError: a damaged file.
        """
        decoder = msgspec.json.Decoder(_Line)
        for part in self._finished():
            first = self.batches[part * self._batches_per_part].start
            lines = enumerate(self._read(part, decoder), first)
            if any(line.error and line.file != file_state(images[index].path) for index, line in lines):
                self._path(part).unlink()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of each image, in order.

        Raises:
            ValueError: a damaged file.
        """
        decoder = msgspec.json.Decoder()
        for part in range(self.num_parts()):
            yield from self._read(part, decoder)

    def _read(self, part: int, decoder: msgspec.json.Decoder) -> Iterator[Any]:
        path = self._path(part)
        with path.open("rb") as file:
            for line in file:
                try:
                    yield decoder.decode(line)
                except ValueError as error:
                    raise ValueError(f"{path}: damaged ({error}); remove it, and run again") from error

    def _finished(self) -> set[int]:
        return {int(path.stem) for path in self.directory.glob("*.jsonl")}

    def _path(self, part: int) -> Path:
        return self.directory / f"{part:06}.jsonl"


def _shorten(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
