"""A proposal file of any format."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from regionspot.data.proposals.arrays import ProposalArrays, chunks
from regionspot.data.proposals.json_formats import read_json
from regionspot.data.proposals.pickle_format import read_pickle
from regionspot.data.proposals.safetensors_format import read_safetensors
from regionspot.structures import clipped_sides
from regionspot.utils.files import sha256_of_file


class ProposalFile:
    """The boxes of a file whose format is recognized by its content, not by its name.

    * "glip", the authors' JSON: ``{image_id: {"boxes": [[x0, y0, x1, y1], ...], "scores": [...], "labels": [...]}}``;
    * "coco", COCO results: ``[{"image_id", "bbox": [x, y, w, h], "score", "category_id", "segmentation"}, ...]``;
    * "detectron2", its pickle of proposals, in which nothing is ever executed;
    * "safetensors", RegionSpot's own: ``image_ids`` (I,) and ``offsets`` (I + 1,) int64, ``boxes`` (N, 4) float32 XYXY,
      ``scores`` (N,) float32, ``labels`` (N,) int64, and the metadata ``{"format": "regionspot-proposals-1"}``.

    Boxes are in the pixels of the original image. Scores and labels may be missing, for all boxes alike. If a score is
    outside [0, 1], all are logits, and their sigmoid is used. Boxes with a coordinate or a score that is NaN or
    infinite are dropped. In memory a box takes 16 bytes, 4 more with a score, 8 more with a label.

    Attributes:
        path: the file.
        format: "glip", "coco", "detectron2" or "safetensors".
        arrays: its ``ProposalArrays``, of which these are columns:
        image_ids: (I,) int64, increasing.
        boxes: (N, 4) float32, XYXY in the original images' pixels, by image.
        scores: (N,) float32 in [0, 1], or None.
        labels: (N,) int64 as in the file, or None.
    """

    def __init__(self, path: str | Path, with_masks: bool = False) -> None:
        """Read a file, with the RLEs of COCO results as ``arrays.rles`` if asked to.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or in none of these formats; it names the place.
        """
        self.path = Path(path)
        self.format, arrays = _read(self.path, with_masks)
        self.arrays, self.image_ids, self.boxes = arrays, arrays.image_ids, arrays.boxes
        self.scores, self.labels = arrays.scores, arrays.labels

    @cached_property
    def sha256(self) -> str:
        """The file's SHA-256 as hexadecimal digits."""
        return sha256_of_file(self.path)

    def __len__(self) -> int:
        """Number of images with an entry."""
        return len(self.image_ids)

    def get(self, image_id: int, size: tuple[int, int]) -> Instances:
        """Return the proposals of an image of (height, width), none if the file has no entry for it.

        Returns:
            Instances with ``proposal_boxes`` (float32 XYXY, original pixels, clipped to the image; those without
            area are dropped) and, if the file has them, ``scores`` (float32 in [0, 1]) and ``proposal_labels`` (int64).
        """
        image_id = int(image_id)
        index = int(np.searchsorted(self.image_ids, image_id))
        has_entry = index < len(self) and self.image_ids[index] == image_id
        rows = self.arrays.rows(index) if has_entry else slice(0, 0)
        # torch.tensor copies: clipping must not change the shared arrays
        proposals = Instances(size, proposal_boxes=Boxes(torch.tensor(self.boxes[rows])))
        if self.scores is not None:
            proposals.scores = torch.tensor(self.scores[rows])
        if self.labels is not None:
            proposals.proposal_labels = torch.tensor(self.labels[rows])
        proposals.proposal_boxes.clip(size)
        proposals.proposal_boxes.tensor += 0.0  # no -0.0, which JSON readers do not keep
        return proposals[proposals.proposal_boxes.nonempty()]

    def count_missing(self, image_ids: Sequence[int] | np.ndarray) -> int:
        """Return how many images of a data set have no entry."""
        return int((~np.isin(_as_ids(image_ids), self.image_ids)).sum())

    def summarize(self, image_ids: Sequence[int] | np.ndarray, sizes: Sequence[tuple[int, int]] | np.ndarray) -> str:
        """Describe in one line what the file has for a data set, and which boxes are dropped.

        ``sizes`` are the (height, width) of its images. A ``ValueError`` is raised if none of them has an entry.
        """
        ids = _as_ids(image_ids)
        missing = self.count_missing(ids)
        # Some missing images are normal (no proposals survived); all of them mean another data set.
        if missing == len(ids):
            raise ValueError(
                f"proposals {self.path}: none of the {len(ids)} images of the data set has an entry; the file has "
                f"{len(self)} images{_first(self.image_ids)}, the data set's are{_first(ids)}: is it the right file?"
            )
        unknown = int((~np.isin(self.image_ids, ids)).sum())
        num_outside, num_flat = self._count_dropped(ids, np.asarray(sizes).reshape(-1, 2))
        scores = {"none": "none", "probabilities": "probabilities", "logits": "logits -> sigmoid"}
        return (
            f"proposals {self.path} ({self.format}, sha256 {self.sha256[:12]}): {len(self.boxes)} boxes; "
            f"{len(ids) - missing} of {len(ids)} images have an entry, {missing} have none; {unknown} unknown image "
            f"ids; boxes dropped: {num_outside} outside the image, {num_flat} without area, "
            f"{self.arrays.num_not_finite} NaN or infinite; scores: {scores[self.arrays.scores_from]}"
        )

    def _count_dropped(self, ids: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
        """Return how many boxes of the data set's images ``get`` drops as outside, and as without area."""
        order = np.argsort(ids, kind="stable")
        # (I,) the index in the data set of each image of the file; any index for those that it does not have
        positions = order[np.searchsorted(ids, self.image_ids, sorter=order).clip(max=len(ids) - 1)]
        is_known = ids[positions] == self.image_ids
        image_of_box = np.repeat(np.arange(len(self)), np.diff(self.arrays.offsets))
        num_outside = num_flat = 0
        for rows in chunks(len(self.boxes)):
            images, boxes = image_of_box[rows], self.boxes[rows]
            is_dropped = (clipped_sides(boxes, sizes[positions[images]]) <= 0).any(axis=1) & is_known[images]
            is_flat = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
            num_flat += int((is_dropped & is_flat).sum())
            num_outside += int((is_dropped & ~is_flat).sum())
        return num_outside, num_flat


def _first(ids: np.ndarray) -> str:
    return " " + ", ".join(map(str, ids[:3].tolist())) + (", ..." if len(ids) > 3 else "") if len(ids) else ""


def _as_ids(image_ids: Any) -> np.ndarray:
    try:
        return np.asarray(image_ids).astype(np.int64)  # strings of digits, too
    except (ValueError, OverflowError) as error:
        raise ValueError(f"proposals need a data set whose image ids are integers ({error})") from error


def _read(path: Path, with_masks: bool) -> tuple[str, ProposalArrays]:
    if not path.is_file():
        raise FileNotFoundError(f"proposals {path}: no such file")
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"proposals {path}: the file is empty; make or copy it again")
    # safetensors: the length of its header in 8 bytes, then the header, a JSON object
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors", read_safetensors(path)
    # pickle: the opcode PROTO since protocol 2; before it those that begin a dict, or name its class
    if head[:1] in (b"\x80", b"(", b"}", b"c"):
        return "detectron2", read_pickle(path)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] in (b"{", b"["):
        return read_json(path, with_masks)
    raise ValueError(
        f"proposals {path}: expected {{image_id: {{boxes, scores}}}} or a list of COCO results (JSON), Detectron2's "
        f"pickle, or safetensors; got a file that begins with {head[:12]!r}"
    )
