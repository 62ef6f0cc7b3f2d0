"""Boxes from files."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances


class ProposalFile:
    """The boxes of a JSON file of the authors' form.

    It is ``{image_id: {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}``.
    Boxes are XYXY in the pixels of the original image, scores in [0, 1]. An image without an entry has no boxes.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or of another form.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"proposals {path}: no such file")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"proposals {path}: not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"proposals {path}: expected {{image_id: {{boxes, scores}}}}, got {type(content).__name__}"
            )
        self.entries = {str(key): self._check(path, key, entry) for key, entry in content.items()}

    @staticmethod
    def _check(path: str | Path, key: str, entry: Any) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            boxes = torch.tensor(entry["boxes"], dtype=torch.float32).reshape(-1, 4)
            scores = torch.tensor(entry.get("scores", [1.0] * len(boxes)), dtype=torch.float32)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"proposals {path}: image {key} has no readable boxes ({error})") from error
        wrong = len(scores) != len(boxes) or not boxes.isfinite().all() or not ((scores >= 0) & (scores <= 1)).all()
        if wrong or any(math.isnan(x) for x in scores.tolist()):
            raise ValueError(f"proposals {path}: image {key} needs finite boxes and as many scores in [0, 1]")
        return boxes, scores

    def get(self, image_id: int, size: tuple[int, int]) -> Instances:
        """Return the proposals of an image of (height, width), cut to it; those without area are left out."""
        boxes, scores = self.entries.get(str(image_id), (torch.zeros(0, 4), torch.zeros(0)))
        proposals = Instances(size, proposal_boxes=Boxes(boxes.clone()), scores=scores)
        proposals.proposal_boxes.clip(size)
        return proposals[proposals.proposal_boxes.nonempty()]
