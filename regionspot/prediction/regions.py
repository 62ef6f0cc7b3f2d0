"""Where the regions of images come from: options of a command line, files of annotations or proposals, a data set."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from regionspot.data.proposals import ProposalFile
from regionspot.data.region_formats import read_regions
from regionspot.data.training_set import image_ids
from regionspot.prediction.sources import ImageRecord
from regionspot.structures import has_area
from regionspot.utils.files import read_json


@dataclass(frozen=True)
class ImageRegions:
    """The regions of an image.

    Attributes:
        boxes: (N, 4) float32 XYXY, original pixels.
        scores: (N,) float32 in [0, 1], or None.
        has_entry: whether the source knows the image.
    """

    boxes: np.ndarray
    scores: np.ndarray | None = None
    has_entry: bool = True


# Returns the regions of an image of (height, width); a ValueError is about this image alone.
RegionSource = Callable[[ImageRecord, tuple[int, int]], ImageRegions]
NO_REGIONS = ImageRegions(np.zeros((0, 4), np.float32), has_entry=False)


class SameBoxes:
    """The same boxes for every image, or those of a JSON file by the images' names."""

    def __init__(self, content: list | dict[str, list], option: str = "--boxes") -> None:
        """
        Args:
            content: a list of boxes XYXY, original pixels, or {file name, or path: list of boxes}.
            option: what to call it in messages.

        Raises:
            ValueError: not four numbers a box.
        """
        self.content, self.option = content, option
        for boxes in content.values() if isinstance(content, dict) else [content]:
            check_numbers(boxes, option)

    def find(self, *names: str) -> np.ndarray | None:
        """Return the (N, 4) float32 boxes under the first of an image's names that the file has; None for none."""
        boxes: Any = self.content
        if isinstance(self.content, dict):
            boxes = next((self.content[name] for name in names if name in self.content), None)
        return None if boxes is None else np.array(boxes, np.float32).reshape(-1, 4)

    def check_images(self, images: Iterable[ImageRecord]) -> None:
        """Refuse a name that stands for several images.

        Raises:
            ValueError: the first such name.
        """
        path_of: dict[str, str] = {}
        for record in images if isinstance(self.content, dict) else ():
            name = next((name for name in _names(record) if name in self.content), None)
            if name is not None and (other := path_of.setdefault(name, record.path)) != record.path:
                raise ValueError(
                    f"{self.option}: {name!r} is the name of {other} and {record.path}; give the boxes by their paths"
                )

    def __call__(self, record: ImageRecord, size: tuple[int, int]) -> ImageRegions:
        boxes = self.find(*_names(record))
        return NO_REGIONS if boxes is None else ImageRegions(boxes)


def _names(record: ImageRecord) -> tuple[str, ...]:
    return record.name, record.path, Path(record.path).name


class AnnotatedBoxes:
    """The boxes of a data set's own annotations, without crowds."""

    def __init__(self, dataset: str) -> None:
        self.records = DatasetCatalog.get(dataset)

    def __call__(self, record: ImageRecord, size: tuple[int, int]) -> ImageRegions:
        annotated = self.records[record.index]
        expected = (annotated.get("height", size[0]), annotated.get("width", size[1]))
        check_annotated_size(expected, size)
        boxes = [
            BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS)
            for entry in annotated["annotations"]
            if not entry.get("iscrowd")
        ]
        array = np.array(boxes, np.float32).reshape(-1, 4)
        return ImageRegions(array[has_area(array, np.array([size]))])  # official files have boxes without area


def check_annotated_size(expected: tuple[int, int], size: tuple[int, int]) -> None:
    """Refuse an image of another (height, width) than its annotations say."""
    if expected != size:
        raise ValueError(
            f"expected the annotated height and width {expected}, got {size}: the boxes are of another image; replace "
            "the file, or correct the annotations"
        )


class ProposedBoxes:
    """The boxes of a proposal file, whose images are those of a data set."""

    def __init__(self, path: str, ids: np.ndarray) -> None:
        """
        Raises:
            ValueError: no proposals in any known format, or of another data set.
        """
        self.file = ProposalFile(path)
        if self.file.count_missing(ids) == len(ids):
            raise ValueError(f"--regions {path}: it has boxes for none of the {len(ids)} images; is it of another set?")
        self._known = set(self.file.image_ids.tolist())

    def __call__(self, record: ImageRecord, size: tuple[int, int]) -> ImageRegions:
        if record.image_id not in self._known:
            return NO_REGIONS
        proposals = self.file.get(record.image_id, size)
        scores = proposals.scores.numpy() if proposals.has("scores") else None
        return ImageRegions(proposals.proposal_boxes.tensor.numpy(), scores)


class FileBoxes:
    """The boxes of a file or directory of any format that ``read_regions`` knows, by the images' paths."""

    def __init__(self, path: str) -> None:
        self.file = read_regions(path)

    def check_images(self, images: Iterable[ImageRecord]) -> None:
        """Refuse images of which several fit one entry; see ``RegionFile.check_names``."""
        self.file.check_names(map(_name_in_file, images))

    def __call__(self, record: ImageRecord, size: tuple[int, int]) -> ImageRegions:
        known = self.file.regions_of(_name_in_file(record), size)
        scores = known.scores
        if scores is not None and not ((scores >= 0) & (scores <= 1)).all():  # NaN where a box has none
            scores = None
        return ImageRegions(known.boxes, scores, known.has_entry)


def _name_in_file(record: ImageRecord) -> str:
    return record.name if record.frame >= 0 else record.path


def label_directory(path: str) -> str:
    """Return the directory of the labels that YOLO's ``data.yaml`` stands for; other paths as they are."""
    return str(Path(path).parent) if Path(path).name in ("data.yaml", "dataset.yaml") else path


def open_region_source(spec: str, dataset: str) -> RegionSource:
    """Open what ``--regions`` names, "gt" or a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "gt" without a data set, or a file of none of the formats.
    """
    if spec == "gt":
        if not dataset:
            raise ValueError("--regions gt: expected a data set as --input, such as my.json:my_images")
        return AnnotatedBoxes(dataset)
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"--regions {spec}: no such file; expected gt, sam, detector, or a file of annotations or proposals"
        )
    if dataset and _has_proposals(Path(spec)):
        return ProposedBoxes(spec, image_ids(DatasetCatalog.get(dataset)))
    return FileBoxes(spec)


def _has_proposals(path: Path) -> bool:
    """Return whether a file has boxes by image id: all but annotations, which are JSON objects with other keys."""
    if path.suffix in (".safetensors", ".pkl", ".pickle"):
        return True
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    key = head[1:].lstrip()[:12]
    is_results = head[:1] == b"[" and b'"image_id"' in head
    is_glip = head[:1] == b"{" and key[:1] == b'"' and key[1:].split(b'"')[0].isdigit()
    return is_results or is_glip


def check_numbers(boxes: Any, option: str) -> None:
    """
    Raises:
        ValueError: not a list of four numbers a box.
    """
    if not isinstance(boxes, list) or any(
        not isinstance(box, list)
        or len(box) != 4
        or any(isinstance(side, bool) or not isinstance(side, (int, float)) for side in box)
        for box in boxes
    ):
        raise ValueError(f"{option}: expected four numbers a box, x0,y0,x1,y1, got {str(boxes)[:100]}")


def parse_boxes(text: str) -> SameBoxes:
    """Return the boxes of ``--boxes``: "x0,y0,x1,y1;..." or a JSON file.

    Raises:
        FileNotFoundError: no such JSON file.
        ValueError: not four numbers a box.
    """
    content = read_json(text, "--boxes") if text.endswith(".json") else parse_numbers(text, "--boxes", "x0,y0,x1,y1")
    if not content and not isinstance(content, dict):
        raise ValueError("--boxes: no boxes; expected at least one, x0,y0,x1,y1")
    return SameBoxes(content)


def parse_points(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return points (N, P, 2) and labels (N, P), padded with label -1, of --points.

    Raises:
        ValueError: not two or three numbers a point.
    """
    regions = [
        parse_numbers(";".join(region.split()), "--points", "x,y or x,y,label")
        for region in text.split(";")
        if region.strip()
    ]
    if not regions or any(len(point) not in (2, 3) for region in regions for point in region):
        raise ValueError(f'--points: expected "x,y" or "x,y,label", got {text!r}')
    longest = max(map(len, regions))
    points = np.zeros((len(regions), longest, 2), np.float32)
    labels = np.full((len(regions), longest), -1)
    for i, region in enumerate(regions):
        for j, (x, y, *label) in enumerate(region):
            points[i, j] = x, y
            if label and label[0] not in (0, 1):
                raise ValueError(f"--points: expected label 1 (on the object) or 0 (off it), got {label[0]:g}")
            labels[i, j] = label[0] if label else 1
    return points, labels


def parse_numbers(text: str, option: str, expected: str) -> list[list[float]]:
    """Return the numbers of "1,2;3,4".

    Raises:
        ValueError: not numbers; ``expected`` says which.
    """
    try:
        return [[float(x) for x in group.split(",")] for group in text.split(";") if group.strip()]
    except ValueError:
        raise ValueError(f"{option}: expected numbers, {expected}, separated by semicolons; got {text!r}") from None
