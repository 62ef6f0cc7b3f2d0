import numpy as np
import pytest
import torch
from PIL import Image

from regionspot import RegionSpotPredictor
from regionspot.index import ImageRegions, ImageSet, build_index

from ..helpers import NAMES, as_inputs, draw_scene, spread_tokens, tiny_config

NUM_IMAGES = 7


@pytest.fixture(scope="session")
def index_cfg():
    return tiny_config("TEST.BATCH_SIZE", 2)


@pytest.fixture(scope="session")
def predictor(index_cfg):
    predictor = RegionSpotPredictor(index_cfg)
    spread_tokens(predictor.recognizer, as_inputs(0))
    predictor.set_vocabulary(NAMES)
    return predictor


@pytest.fixture(scope="session")
def image_set(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def index(predictor, index_cfg, image_set, tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "index"
    return build_index(predictor, index_cfg, image_set, directory, shard_images=3, show_progress=False)


def write_images(directory, num_images=NUM_IMAGES):
    """Write scenes of several sizes; the third has no boxes, and the names have letters beyond ASCII."""
    records = []
    for number in range(num_images):
        image, boxes, _ = draw_scene(number, [(48, 64), (64, 40), (50, 50)][number % 3])
        path = directory / f"ä{number}.png"
        Image.fromarray(image).save(path)
        boxes = boxes[:0] if number == 2 else boxes
        scores = None if number % 2 else np.linspace(0.2, 0.9, len(boxes), dtype=np.float32)
        records.append(ImageRegions(path.name, path, 10 + number, boxes, scores, 100 * number + np.arange(len(boxes))))
    return ImageSet(records, directory, "fingerprint", has_boxes=True)


def random_index_shards(writer, num_regions, dim, shard_regions, planted=None):
    """Write shards of random embeddings, each of one image; ``planted`` has embeddings by region."""
    generator = torch.Generator().manual_seed(0)
    for shard, first in enumerate(range(0, num_regions, shard_regions)):
        count = min(shard_regions, num_regions - first)
        embeddings = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
        for row, value in (planted or {}).items():
            if first <= row < first + count:
                embeddings[row - first] = value
        name = f"{shard}.png".encode()
        content = {
            "image_ids": torch.tensor([shard]),
            "sizes": torch.tensor([[50, 60]], dtype=torch.int32),
            "image_files": torch.zeros(1, 3, dtype=torch.int64),
            "names": torch.tensor(list(name), dtype=torch.uint8),
            "name_ends": torch.tensor([0, len(name)]),
            "offsets": torch.tensor([0, count]),
            "boxes": torch.tensor([[1.0, 2, 30, 40]]).repeat(count, 1),
            "embeddings": embeddings.half(),
            "proposal_scores": torch.full((count,), -1.0),
            "predicted_ious": torch.full((count,), 0.5),
            "keys": torch.arange(first, first + count),
        }
        writer.write(shard, content, 1)
