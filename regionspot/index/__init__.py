"""Region indexes: the embeddings of the regions of any number of images on disk, to be searched and named again.

An index is a directory of safetensors shards and a manifest that says what is in them and what made it.
"""

from regionspot.index.build import build_index
from regionspot.index.classify import IndexClassifier
from regionspot.index.search import search_index
from regionspot.index.sources import ImageRegions, ImageSet, dataset_images, file_images
from regionspot.index.store import IndexedRegion, RegionIndex

__all__ = [
    "ImageRegions",
    "ImageSet",
    "IndexClassifier",
    "IndexedRegion",
    "RegionIndex",
    "build_index",
    "dataset_images",
    "file_images",
    "search_index",
]
