"""Data sets and how their images reach the model."""

from regionspot.data.build import build_test_loader, build_train_loader, dataset_vocabulary
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.datasets import register_from_spec, register_json_dataset

__all__ = [
    "RegionSpotDatasetMapper",
    "build_test_loader",
    "build_train_loader",
    "dataset_vocabulary",
    "register_from_spec",
    "register_json_dataset",
]
