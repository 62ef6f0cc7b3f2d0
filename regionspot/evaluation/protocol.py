"""What an evaluation's numbers mean: the source of the boxes, the scores of detections, and the rules."""

import json
from dataclasses import asdict, dataclass

from regionspot.utils.files import short_hash

METRICS = ("lvis", "fixed", "coco")
ANNOTATED = "annotated"  # boxes that are the annotated ones


@dataclass
class Protocol:
    """Everything that an evaluation's numbers depend on; hashes are the first digits of SHA-256."""

    dataset: str  # registered name, and the hash of its annotation file
    metric: str  # "lvis", "fixed" (LVIS's fixed AP) or "coco"
    boxes: str  # their source, with the file's hash if there is one
    labels_per_box: int  # number of classes of a box that may become detections; -1 for all
    detections_per_image: int  # limit; -1 for none
    score: str  # the rule, and how class probabilities are computed
    vocabulary: str  # number of names, and their hash
    templates: str  # number of prompt templates, and their hash
    checkpoint: str  # source of the weights, their hash, the precision of the frozen parts
    config: str  # hash of the config's model and input

    def line(self, num_evaluated: int, num_images: int) -> str:
        """Describe the protocol in one line, the heading of a table."""
        labels = "all" if self.labels_per_box < 0 else self.labels_per_box
        detections = "all" if self.detections_per_image < 0 else self.detections_per_image
        return (
            f"protocol: {self.metric} on {self.dataset}; boxes: {self.boxes}; labels per box: {labels}; detections "
            f"per image: {detections}; score: {self.score}; vocabulary: {self.vocabulary}; templates: "
            f"{self.templates}; checkpoint: {self.checkpoint}; config: {self.config}; images: {num_evaluated} of "
            f"{num_images}"
        )

    def identity(self) -> str:
        """Return a hash of all fields: predictions of two runs belong together if it is equal."""
        return short_hash(json.dumps(asdict(self), sort_keys=True), 64)
