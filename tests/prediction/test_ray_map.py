"""Recognition on a local Ray cluster, of which a process is killed in between, equals the plain one."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.prediction import RegionBatchPredictor
from regionspot.prediction.ray_map import RayPool, connect, map_images

from ..helpers import NAMES, draw_scene, frozen_overrides, released_state, tiny_config, tiny_model, write_frozen_parts


class KilledOnce(RegionBatchPredictor):
    """Kills its process in the middle of the data set."""

    def __call__(self, batch):
        directory = Path(batch["path"][0]).parent
        with (directory / "calls.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if "007" in str(batch["path"]) and not (directory / "killed").exists():
            (directory / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.fixture
def photos(tmp_path):
    model = tiny_model(names=None)
    write_frozen_parts(model.recognizer, tmp_path)
    torch.save({"model": released_state(model)}, tmp_path / "model.pth")
    for i in range(12):
        Image.fromarray(draw_scene(i)[0]).save(tmp_path / f"{i:03}.png")
    (tmp_path / "004.png").write_text("no image")
    return tmp_path


def test_killed_worker_changes_nothing(photos):
    cfg = tiny_config(*frozen_overrides(photos), "MODEL.WEIGHTS", str(photos / "model.pth"))
    paths = [str(photos / f"{i:03}.png") for i in range(12)]
    rows = [{"path": path, "boxes": draw_scene(i)[1].tolist(), "key": i} for i, path in enumerate(paths)]
    with connect("local", num_cpus=2, object_store_bytes=100 << 20) as ray:
        dataset = map_images(
            ray.data.from_items(rows, override_num_blocks=4),
            cfg,
            NAMES,
            pool=RayPool(batch_size=3),
            predictor=KilledOnce,
        )
        dataset.write_parquet(str(photos / "out"))
        result = ray.data.read_parquet(str(photos / "out")).to_pandas().sort_values("key").reset_index(drop=True)
    calls = (photos / "calls.txt").read_text().split()
    assert (photos / "killed").exists() and len(set(calls)) == 2
    assert list(result["path"]) == paths
    expected = RegionBatchPredictor(cfg, NAMES)({"path": paths, "boxes": [row["boxes"] for row in rows]})
    assert [error is None for error in result["error"]] == [i != 4 for i in range(12)]
    for i in range(12):
        assert list(result["class_names"][i]) == expected["class_names"][i]
        assert list(result["masks"][i]) == expected["masks"][i]
        assert [list(box) for box in result["boxes"][i]] == expected["boxes"][i]
        np.testing.assert_allclose(result["scores"][i], expected["scores"][i], atol=1e-5)
