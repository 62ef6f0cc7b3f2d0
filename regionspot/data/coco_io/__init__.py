"""COCO and LVIS JSON: annotations and results, read and written, for everyone."""

from regionspot.data.coco_io.annotations import AnnotationFile, look_up
from regionspot.data.coco_io.json_file import InvalidJsonError, JsonFile, write_list
from regionspot.data.coco_io.results import Results, read_results, write_results

__all__ = [
    "AnnotationFile",
    "InvalidJsonError",
    "JsonFile",
    "Results",
    "look_up",
    "read_results",
    "write_list",
    "write_results",
]
