"""Registration of data sets."""

from regionspot.data.datasets import builtin as _builtin  # noqa: F401
from regionspot.data.datasets.categories import category_ids
from regionspot.data.datasets.json_dataset import JsonDataset, load_json_dataset
from regionspot.data.datasets.registration import register_from_spec, register_json_dataset

__all__ = [
    "JsonDataset",
    "category_ids",
    "load_json_dataset",
    "register_from_spec",
    "register_json_dataset",
]
