"""Writing proposals in each of the forms; the same proposals give the same bytes."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from detectron2.structures import BoxMode
from safetensors.numpy import save_file

from regionspot.data.proposals.arrays import ProposalArrays
from regionspot.data.proposals.tensor_form import FORMAT
from regionspot.utils.files import atomic_path


def write_proposals(path: str | Path, form: str, proposals: ProposalArrays) -> None:
    """Write proposals so that reading the file gives the same boxes and scores, bit for bit.

    COCO results cannot say that an image has an entry without boxes. RLEs are written in COCO results only. In
    Detectron2's pickle scores are logits (float64), and labels go into the list ``labels``, which it does not look at;
    without scores it has no ``objectness_logits``, and Detectron2 itself does not take it.

    Args:
        path: the file, which appears whole or not at all.
        form: "glip", "coco", "detectron2" or "safetensors".
        proposals: what to write.

    Raises:
        ValueError: no such form.
    """
    if form not in _WRITERS:
        raise ValueError(f"proposals {path}: expected one of the forms {', '.join(FORMS)}, got {form!r}")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _WRITERS[form](file, proposals)


def _write_glip(file: BinaryIO, proposals: ProposalArrays) -> None:
    encoder, between = msgspec.json.Encoder(), b"{"
    for index, image_id in enumerate(proposals.image_ids.tolist()):
        rows = proposals.rows(index)
        entry = {"boxes": proposals.boxes[rows].tolist()}
        if proposals.scores is not None:
            entry["scores"] = proposals.scores[rows].tolist()
        if proposals.labels is not None:
            entry["labels"] = proposals.labels[rows].tolist()
        file.write(b'%b"%d":%b' % (between, image_id, encoder.encode(entry)))
        between = b",\n"
    file.write(b"}\n" if len(proposals.image_ids) else b"{}\n")


def _write_coco(file: BinaryIO, proposals: ProposalArrays) -> None:
    encoder, between = msgspec.json.Encoder(), b"["
    for index, image_id in enumerate(proposals.image_ids.tolist()):
        rows = proposals.rows(index)
        boxes = proposals.boxes[rows].astype(np.float64)  # where x0 + (x1 - x0) is x1 again
        boxes[:, 2:] -= boxes[:, :2]
        for row, box in zip(range(rows.start, rows.stop), boxes.tolist()):
            entry: dict[str, Any] = {"image_id": image_id, "bbox": box}
            if proposals.scores is not None:
                entry["score"] = float(proposals.scores[row])
            if proposals.labels is not None:
                entry["category_id"] = int(proposals.labels[row])
            if proposals.rles is not None and proposals.rles[row] is not None:
                entry["segmentation"] = proposals.rles[row]
            file.write(between + encoder.encode(entry))
            between = b",\n"
    file.write(b"]\n" if len(proposals.boxes) else b"[]\n")


def _write_pickle(file: BinaryIO, proposals: ProposalArrays) -> None:
    def split(column: np.ndarray) -> list[np.ndarray]:
        return [column[proposals.rows(index)] for index in range(len(proposals.image_ids))]

    content: dict[str, Any] = {
        "ids": proposals.image_ids.tolist(),
        "boxes": split(np.array(proposals.boxes, np.float32)),
        "bbox_mode": int(BoxMode.XYXY_ABS),
    }
    if proposals.scores is not None:
        probabilities = proposals.scores.astype(np.float64)
        with np.errstate(divide="ignore"):
            logits = np.log(probabilities) - np.log1p(-probabilities)
        # 0 and 1 stay finite, and their sigmoid in float32 is 0 and 1
        content |= {"objectness_logits": split(logits.clip(-120, 40)), "scores_are": "logits"}
    if proposals.labels is not None:
        content["labels"] = split(np.array(proposals.labels, np.int64))
    pickle.dump(content, file, protocol=4)


def _write_tensors(file: BinaryIO, proposals: ProposalArrays) -> None:
    columns = {
        "image_ids": proposals.image_ids,
        "offsets": proposals.offsets,
        "boxes": proposals.boxes,
        "scores": proposals.scores,
        "labels": proposals.labels,
    }
    there = {key: np.ascontiguousarray(column) for key, column in columns.items() if column is not None}
    permissions = Path(file.name).stat().st_mode
    save_file(there, file.name, metadata={"format": FORMAT})
    Path(file.name).chmod(permissions)  # safetensors gives the file to its owner alone


_WRITERS: dict[str, Callable[[BinaryIO, ProposalArrays], None]] = {
    "glip": _write_glip,
    "coco": _write_coco,
    "detectron2": _write_pickle,
    "safetensors": _write_tensors,
}
FORMS = tuple(_WRITERS)
