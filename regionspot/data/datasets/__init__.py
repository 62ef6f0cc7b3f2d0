"""Registration of data sets."""

from regionspot.data.datasets import builtin as _builtin  # noqa: F401
from regionspot.data.datasets.json_dataset import register_json_dataset

__all__ = ["register_json_dataset"]
