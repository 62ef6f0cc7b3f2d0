"""Reading COCO and LVIS JSON of any size: typed, piece by piece, with errors that say where."""

import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np

PIECE = 1 << 16  # entries that are Python objects at one time

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Entry = TypeVar("Entry")


class CategoryEntry(msgspec.Struct, gc=False):
    """What is read of an entry of ``categories``."""

    id: Id
    name: str
    frequency: str | None = None
    synonyms: list[str] | None = None

    @property
    def class_name(self) -> str:
        """The first of LVIS's synonyms, as in Detectron2's metadata (it differs from the name once); else the name."""
        return self.synonyms[0] if self.synonyms else self.name


class ImageEntry(msgspec.Struct, gc=False):
    """What is read of an entry of ``images``; height and width in pixels."""

    id: Id
    height: Size
    width: Size
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class AnnotationEntry(msgspec.Struct, gc=False):
    """What is read of an entry of ``annotations``; ``bbox`` is XYWH in the image's pixels."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float] | None = None
    iscrowd: int | bool = 0
    id: int | str | None = None


class _Parts(msgspec.Struct):
    images: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    annotations: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    categories: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class _Categories(msgspec.Struct):
    categories: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class JsonFile:
    """An annotation file: the bytes of each entry stay where they are on the disk until a piece is decoded."""

    def __init__(self, path: str | Path, only_categories: bool = False) -> None:
        """
        Args:
            path: the file.
            only_categories: skip the other parts, which takes no memory.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or ``images``, ``annotations`` or ``categories`` is missing or no list.
        """
        self.path = Path(path)
        buffer = map_file(self.path)
        try:
            parts = msgspec.json.decode(buffer, type=_Categories if only_categories else _Parts)
        except msgspec.ValidationError as error:
            raise ValueError(f"annotations {path}: expected COCO or LVIS JSON; {describe_error(error)}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"annotations {path}: not valid JSON ({error}{excerpt(buffer, error)})") from error
        missing = [name for name in parts.__struct_fields__ if getattr(parts, name) is msgspec.UNSET]
        if missing:
            raise ValueError(f"annotations {path}: expected COCO or LVIS JSON, but {', '.join(missing)} is missing")
        self.parts: dict[str, list[msgspec.Raw]] = {name: getattr(parts, name) for name in parts.__struct_fields__}

    def decode(self, part: str, entry_type: type[Entry]) -> Iterator[tuple[int, list[Entry]]]:
        """Yield (index of the first, entries) for each piece of a part of the file.

        Args:
            part: "images", "annotations" or "categories".
            entry_type: what each entry is decoded as; keys that it does not know are ignored.

        Raises:
            ValueError: an entry lacks a key or has a value of a wrong type.
        """
        entries = self.parts[part]
        decoder = msgspec.json.Decoder(list[entry_type])  # type: ignore[valid-type]
        for start in range(0, len(entries), PIECE):
            try:
                yield start, decoder.decode(b"[%b]" % b",".join(entries[start : start + PIECE]))
            except msgspec.ValidationError as error:
                raise ValueError(f"annotations {self.path}: {describe_error(error, part, start)}") from error
            except (UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"annotations {self.path}: {part}: not valid JSON ({error})") from error

    def categories(self) -> list[CategoryEntry]:
        """Return the categories in the order of their ids.

        Raises:
            ValueError: an entry lacks a key or has a value of a wrong type, or an id occurs twice.
        """
        entries = [entry for _, piece in self.decode("categories", CategoryEntry) for entry in piece]
        entries.sort(key=lambda entry: entry.id)
        self.refuse_duplicates("categories", [entry.id for entry in entries])
        return entries

    def refuse_duplicates(self, part: str, ids: Iterable[int]) -> None:
        """
        Raises:
            ValueError: an id of a part of the file occurs twice.
        """
        values, counts = np.unique(np.fromiter(ids, np.int64), return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"annotations {self.path}: {part}: id {values[counts.argmax()]} occurs {counts.max()} times; expected "
                "once each"
            )


def map_file(path: str | Path, what: str = "annotations") -> memoryview:
    """Return a file's bytes, without a byte order mark, mapped from the disk.

    Args:
        path: the file.
        what: it holds, for the errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    with Path(path).open("rb") as file:
        try:
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:
            raise ValueError(f"{what} {path}: not valid JSON (the file is empty)") from error
    return buffer[3:] if buffer[:3] == b"\xef\xbb\xbf" else buffer


def describe_error(error: msgspec.ValidationError, part: str = "", start: int = 0) -> str:
    """Return msgspec's words with the place in the file, "annotations[70000].bbox: expected ...", first."""
    message, _, place = str(error).partition(" - at ")
    place = place.strip("`").removeprefix("$")
    if found := re.match(r"\[(\d+)\](.*)", place) if part else None:
        place = f"{part}[{start + int(found[1])}]{found[2]}"
    place = place.removeprefix(".") or "the file"
    return f"{place}: {message[0].lower()}{message[1:]}"


def excerpt(buffer: memoryview, error: Exception) -> str:
    """Return where in the file, in words, JSON ends that is no JSON; "" if msgspec does not know."""
    found = re.search(r"byte (\d+)", str(error))
    if not found:
        return ""
    position = int(found[1])
    text = bytes(buffer[max(0, position - 20) : position + 20]).decode("utf-8", "replace")
    return f", near {text!r}; NaN and Infinity are not JSON" if text else ""
