"""What a number means: where the boxes come from, how detections are scored, and by which rules they are judged."""

import hashlib
import json
from dataclasses import asdict, dataclass

METRICS = ("lvis", "fixed", "coco")
ANNOTATED = "annotated"  # boxes that are the annotated ones


@dataclass
class Protocol:
    """Everything that a table's numbers depend on beside the model's weights.

    Attributes:
        dataset: registered name, and the hash of its annotation file.
        metric: "lvis", "fixed" (LVIS's fixed AP) or "coco".
        boxes: where they come from, with the file's hash if there is one.
        labels_per_box: classes of a box that may become detections; -1 for all.
        detections_per_image: at the most; -1 for all.
        score: the rule, and how class probabilities come about.
        vocabulary: number of names, and their hash.
        templates: which prompt templates, and their hash.
        checkpoint: where the weights are from, and their hash.
        config: hash of all that the config says of model and input.
    """

    dataset: str
    metric: str
    boxes: str
    labels_per_box: int
    detections_per_image: int
    score: str
    vocabulary: str
    templates: str
    checkpoint: str
    config: str

    def line(self, images: int, of: int) -> str:
        """Return the line that stands above a table of ``images`` evaluated images of ``of``."""
        labels = "all" if self.labels_per_box < 0 else self.labels_per_box
        detections = "all" if self.detections_per_image < 0 else self.detections_per_image
        return (
            f"protocol: {self.metric} on {self.dataset}; boxes: {self.boxes}; labels per box: {labels}; detections "
            f"per image: {detections}; score: {self.score}; vocabulary: {self.vocabulary}; templates: "
            f"{self.templates}; checkpoint: {self.checkpoint}; config: {self.config}; images: {images} of {of}"
        )

    def identity(self) -> str:
        """Return a hash of it all: predictions of two runs belong together if theirs are equal."""
        return short_hash(json.dumps(asdict(self), sort_keys=True), 64)


def short_hash(text: str, digits: int = 12) -> str:
    """Return the first digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
