"""JSON files of any size: mapped from the disk, decoded in chunks, with errors that name the file and the place."""

import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
import numpy as np

# Entries are Python objects for one chunk at a time: they take about ten times the memory of their bytes.
CHUNK_BYTES = 1 << 23
CHUNK_ENTRIES = 1 << 14
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors write it; JSON does not allow it

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Box = tuple[float, float, float, float]
Entry = TypeVar("Entry")

# A guess: the same characters may be inside a string, which decoding the chunk shows.
_BETWEEN_ENTRIES = re.compile(rb"\}\s*(,)\s*(?=\{)")


class InvalidJsonError(ValueError):
    """The file is not JSON: truncated, damaged, or of another format."""


class JsonFile:
    """A JSON file that stays on the disk until a part of it is decoded.

    Attributes:
        path: the file.
        name: its kind and path, the beginning of all messages.
        buffer: its bytes without a byte order mark.
    """

    def __init__(self, path: str | Path, kind: str, *, hint: str = "", writable: bool = False) -> None:
        """
        Args:
            path: the file.
            kind: "annotations", "predictions" or "proposals", for messages.
            hint: end of messages about invalid entries.
            writable: writes go to private copies of the pages, never to the file.

        Raises:
            FileNotFoundError: no such file.
            InvalidJsonError: an empty file.
        """
        self.path, self.name, self._hint = Path(path), f"{kind} {path}", hint
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.name}: no such file")
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        with self.path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=access)
            except ValueError as error:  # an empty file cannot be mapped
                raise InvalidJsonError(f"{self.name}: not valid JSON (the file is empty)") from error
        has_mark = self._map[:3] == BYTE_ORDER_MARK
        self.buffer = memoryview(self._map)[len(BYTE_ORDER_MARK) * has_mark :]

    def decode(self, entry_type: Any, content: Any = None, place: str = "", first: int = 0) -> Any:
        """Decode the file, or ``content``, which is a part of it.

        Args:
            entry_type: a type that ``msgspec`` decodes, or a decoder of one.
            content: bytes; by default the whole file.
            place: where ``content`` is in the file, for messages; "image {}" for a list, with the index of an entry.
            first: index in the file of the first entry of ``content``.

        Raises:
            InvalidJsonError: not JSON, or nested too deep.
            ValueError: a key is missing, or a value has a wrong type.
        """
        decoder = entry_type if isinstance(entry_type, msgspec.json.Decoder) else msgspec.json.Decoder(entry_type)
        try:
            return decoder.decode(self.buffer if content is None else content)
        except msgspec.ValidationError as error:
            raise ValueError(f"{self.name}: {describe_error(error, place, first)}{self._hint}") from error
        except RecursionError as error:
            raise InvalidJsonError(f"{self.name}: not valid JSON ({error}: it is nested too deep)") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            where = "" if content is None else place.replace("{}", f"{first} or later") + ": "
            hint = self._excerpt(error) if content is None else ""
            raise InvalidJsonError(f"{self.name}: {where}not valid JSON ({error}{hint})") from error

    def chunks_of(
        self, raws: list[msgspec.Raw], entry_type: type[Entry], place: str, first: int = 0
    ) -> Iterator[tuple[int, list[Entry]]]:
        """Yield (index of the first, entries) for each chunk of ``raws`` from ``first`` on; raises as ``decode``."""
        decoder = msgspec.json.Decoder(list[entry_type])  # type: ignore[valid-type]
        for start in range(first, len(raws), CHUNK_ENTRIES):
            content = b"[%b]" % b",".join(raws[start : start + CHUNK_ENTRIES])
            yield start, self.decode(decoder, content, place, start)

    def chunks(self, entry_type: type[Entry]) -> Iterator[tuple[int, list[Entry]]]:
        """Yield (index of the first, entries) for each chunk of a file that is a list of objects; raises as ``decode``.

        A chunk ends where an entry seems to end. If it decodes as a list, an entry did end there; if not (the place is
        inside an entry, or the file is damaged), the decoder splits the rest of the list, which takes more memory.
        """
        decoder = msgspec.json.Decoder(list[entry_type])  # type: ignore[valid-type]
        head = re.match(rb"\s*\[", self.buffer)
        num_entries, start = 0, head.end() if head else 0
        while stop := self._end_of_chunk(start):
            closing = b"]" if stop < len(self.buffer) else b""
            try:
                content = b"".join((b"[", self.buffer[start:stop], closing))
                entries = self.decode(decoder, content, "entry {}", num_entries)
            except InvalidJsonError:
                break
            yield num_entries, entries
            if stop == len(self.buffer):
                return
            num_entries, start = num_entries + len(entries), stop + 1
            # Else a file of gigabytes that was read once would count as this process's memory.
            if hasattr(mmap, "MADV_DONTNEED") and self.buffer.readonly:  # a private copy would lose its changes
                self._map.madvise(mmap.MADV_DONTNEED)
        yield from self.chunks_of(self.decode(list[msgspec.Raw]), entry_type, "entry {}", num_entries)

    def _end_of_chunk(self, start: int) -> int:
        """Return the position of the last comma between entries in the chunk from ``start`` on, or 0 for none.

        If no more than a chunk is left, this is the end of the buffer.
        """
        if len(self.buffer) - start <= CHUNK_BYTES:
            return len(self.buffer)
        chunk = bytes(self.buffer[start : start + CHUNK_BYTES])
        # The end of the chunk first: it nearly always has a comma, and is scanned in no time.
        for width in (1 << 16, CHUNK_BYTES):
            ends = [match.start(1) for match in _BETWEEN_ENTRIES.finditer(chunk, max(0, len(chunk) - width))]
            if ends:
                return start + ends[-1]
        return 0

    def _excerpt(self, error: Exception) -> str:
        """Return the text around the error; "" if ``msgspec`` does not report where it is."""
        if "truncated" in str(error):
            return "; was the run that wrote it cut short?"
        if not (match := re.search(r"byte (\d+)", str(error))):
            return ""
        position = int(match[1])
        text = bytes(self.buffer[max(0, position - 20) : position + 20]).decode("utf-8", "replace")
        return f", near {text!r}; NaN and Infinity are not JSON" if text else ""


def describe_error(error: msgspec.ValidationError, place: str = "", first: int = 0) -> str:
    """Return the message of ``msgspec`` with the place in the file first: "annotations[70000].bbox: expected ..."."""
    # "Expected `int`, got `str` - at `$[3].id`", where $ is what was decoded
    message, _, path = str(error).partition(" - at ")
    path = path.strip("`").removeprefix("$")
    if "{}" in place and (match := re.match(r"\[(\d+)\]", path)):
        path = place.format(first + int(match[1])) + path[match.end() :]
    elif place:
        path = place + path.replace(".", ": ", 1)
    return f"{path.removeprefix('.') or 'the file'}: {message[0].lower()}{message[1:]}"


def bbox_array(entries: Sequence[Any]) -> np.ndarray:
    """Return the ``bbox`` of all entries as (n, 4) float64."""
    values = chain.from_iterable(entry.bbox for entry in entries)
    return np.fromiter(values, np.float64, 4 * len(entries)).reshape(-1, 4)


def write_list(file: BinaryIO, entries: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list, one entry a line."""
    encoder, separator = msgspec.json.Encoder(), b"["
    for entry in entries:
        file.write(separator + encoder.encode(entry))
        separator = b",\n"
    file.write(b"]\n" if separator == b",\n" else b"[]\n")
