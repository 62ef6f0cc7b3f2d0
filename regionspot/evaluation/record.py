"""What an evaluation was of: the files and rules that its report needs, in ``evaluation.json`` beside the metrics."""

from pathlib import Path

import msgspec

from regionspot.utils.files import atomic_path

FILE = "evaluation.json"


class EvaluationRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The inputs of an evaluation.

    Attributes:
        annotations: absolute path of the annotation file.
        predictions: the COCO results; relative to the directory of the evaluation, or absolute.
        metric: "lvis", "fixed" or "coco".
        max_dets: detections of an image that LVIS AP counts, -1 for all.
        segm_areas: see ``evaluate_lvis``.
        dataset: registered name of the data set, if it has one.
        images: absolute path of the directory of images, "" if it is unknown.
        protocol: what else the numbers depend on: the fields of a ``Protocol``, or the command line's.
    """

    annotations: str
    predictions: str
    metric: str
    max_dets: int = 300
    segm_areas: str = "masks"
    dataset: str = ""
    images: str = ""
    protocol: dict[str, str | int] = {}

    def write(self, directory: Path) -> None:
        """Write the record of the evaluation in ``directory``."""
        with atomic_path(directory / FILE) as path:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, directory: Path) -> "EvaluationRecord":
        """Read the record of the evaluation in ``directory``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        path = directory / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected the directory of an evaluation: OUTPUT_DIR/inference/<data set> of "
                "`regionspot evaluate`, or --output of `regionspot evaluate-predictions`; evaluate again if it is older"
            )
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: damaged ({error}); evaluate again") from error
