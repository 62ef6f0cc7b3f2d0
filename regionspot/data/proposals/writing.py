"""Writing proposals in each of the formats; the same proposals give the same bytes."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from detectron2.structures import BoxMode
from safetensors.numpy import save_file

from regionspot.data.coco_io import write_list
from regionspot.data.proposals.arrays import ProposalArrays
from regionspot.data.proposals.safetensors_format import FORMAT
from regionspot.utils.files import atomic_path


def write_proposals(path: str | Path, format: str, proposals: ProposalArrays) -> None:
    """Write proposals so that reading the file gives the same boxes and scores, bit for bit.

    COCO results have no images without boxes; only they have RLEs. In Detectron2's pickle scores are logits (float64),
    and labels are in the list ``labels``, which Detectron2 ignores; it does not read a file without scores.

    Raises:
        ValueError: ``format`` is none of ``FORMATS``.
    """
    if format not in _WRITERS:
        raise ValueError(f"proposals {path}: expected one of the formats {', '.join(FORMATS)}, got {format!r}")
    with atomic_path(path) as temporary:
        _WRITERS[format](temporary, proposals)


def _write_glip(path: Path, proposals: ProposalArrays) -> None:
    # Written image by image, in the order of the ids: the whole as Python objects may not fit into memory.
    encoder, separator = msgspec.json.Encoder(), b"{"
    with path.open("wb") as file:
        for index, image_id in enumerate(proposals.image_ids.tolist()):
            rows = proposals.rows(index)
            columns = {"boxes": proposals.boxes, "scores": proposals.scores, "labels": proposals.labels}
            entry = {key: column[rows].tolist() for key, column in columns.items() if column is not None}
            file.write(b'%b"%d":%b' % (separator, image_id, encoder.encode(entry)))
            separator = b",\n"
        file.write(b"}\n" if len(proposals.image_ids) else b"{}\n")


def _write_coco(path: Path, proposals: ProposalArrays) -> None:
    with path.open("wb") as file:
        write_list(file, _coco_entries(proposals))


def _coco_entries(proposals: ProposalArrays) -> Iterator[dict[str, Any]]:
    for index, image_id in enumerate(proposals.image_ids.tolist()):
        rows = proposals.rows(index)
        # float64, in which x0 + (x1 - x0) of float32 numbers is x1 again
        boxes = proposals.boxes[rows].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for row, box in zip(range(rows.start, rows.stop), boxes.tolist()):
            entry: dict[str, Any] = {"image_id": image_id, "bbox": box}
            if proposals.scores is not None:
                entry["score"] = float(proposals.scores[row])
            if proposals.labels is not None:
                entry["category_id"] = int(proposals.labels[row])
            if proposals.rles is not None and proposals.rles[row] is not None:
                entry["segmentation"] = proposals.rles[row]
            yield entry


# The keys and containers that Detectron2's load_proposals_into_dataset expects.
def _write_pickle(path: Path, proposals: ProposalArrays) -> None:
    def split(column: np.ndarray) -> list[np.ndarray]:
        return [column[proposals.rows(index)] for index in range(len(proposals.image_ids))]

    content: dict[str, Any] = {
        "ids": proposals.image_ids.tolist(),
        "boxes": split(np.array(proposals.boxes, np.float32)),
        "bbox_mode": int(BoxMode.XYXY_ABS),
    }
    if proposals.scores is not None:
        # log(p / (1 - p)) in float64, of which the sigmoid gives back the same float32
        probabilities = proposals.scores.astype(np.float64)
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities) - np.log1p(-probabilities)
        # The logits of 0 and 1 must be finite; the sigmoids of these limits are 0 and 1 in float32.
        content |= {"objectness_logits": split(logits.clip(-120, 40)), "scores_are": "logits"}
    if proposals.labels is not None:
        content["labels"] = split(np.array(proposals.labels, np.int64))
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=4)


def _write_safetensors(path: Path, proposals: ProposalArrays) -> None:
    columns = {
        "image_ids": proposals.image_ids,
        "offsets": proposals.offsets,
        "boxes": proposals.boxes,
        "scores": proposals.scores,
        "labels": proposals.labels,
    }
    tensors = {key: np.ascontiguousarray(column) for key, column in columns.items() if column is not None}
    save_file(tensors, path, metadata={"format": FORMAT})


_WRITERS: dict[str, Callable[[Path, ProposalArrays], None]] = {
    "glip": _write_glip,
    "coco": _write_coco,
    "detectron2": _write_pickle,
    "safetensors": _write_safetensors,
}
FORMATS = tuple(_WRITERS)
