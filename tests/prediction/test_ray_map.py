"""Recognition on a local Ray cluster, of which a process is killed in between, equals the plain one."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from regionspot.prediction import RegionBatchPredictor
from regionspot.prediction.ray_map import RayPool, connect, run_on_ray
from regionspot.prediction.regions import SameBoxes
from regionspot.prediction.sources import list_images
from regionspot_cli.commands import COMMANDS

from ..helpers import (
    NAMES,
    TINY,
    draw_scene,
    frozen_overrides,
    released_state,
    tiny_config,
    tiny_model,
    write_frozen_parts,
)


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


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else it waits for all other work of the machine
    with connect("local", num_cpus=2, object_store_bytes=100 << 20) as ray:
        yield ray


def test_killed_worker_changes_nothing(photos, ray):
    cfg = tiny_config(*frozen_overrides(photos), "MODEL.WEIGHTS", str(photos / "model.pth"))
    boxes = {f"{i:03}.png": draw_scene(i)[1].tolist() for i in range(12) if i != 9}
    images = list_images([str(photos)])
    pool = RayPool(batch_size=3)
    arguments = {"cfg": cfg, "vocabulary": NAMES, "regions": SameBoxes(boxes), "pool": pool, "predictor": KilledOnce}
    run_on_ray(ray, [], images, str(photos / "out"), **arguments)
    calls = (photos / "calls.txt").read_text().split()
    assert (photos / "killed").exists() and len(set(calls)) == 2
    paths = [record.path for record in images]
    plain = RegionBatchPredictor(cfg, NAMES)({"path": paths, "boxes": [boxes.get(Path(x).name, []) for x in paths]})
    compare(photos / "out", plain, paths)
    # The command line, on the same cluster, with a table of paths and boxes.
    table = {"path": paths, "boxes": [boxes.get(Path(x).name, []) for x in paths]}
    pyarrow.parquet.write_table(pyarrow.table(table), photos / "table.parquet")
    arguments = ("--config-file", TINY, "--input", photos / "table.parquet", "--output", photos / "by_command")
    overrides = (*frozen_overrides(photos), "MODEL.WEIGHTS", photos / "model.pth")
    COMMANDS["predict"].call(*arguments, "--vocabulary", ",".join(NAMES), "--ray", "local", *overrides)
    compare(photos / "by_command", plain, paths)
    with pytest.raises(ValueError, match="expected a new or empty directory"):
        COMMANDS["predict"].call(*arguments, "--vocabulary", ",".join(NAMES), "--ray", "local", *overrides)


def compare(directory, expected, paths):
    result = pyarrow.parquet.read_table(directory).sort_by("path").to_pydict()
    assert result["path"] == paths and sum(map(len, result["scores"])) > 24
    assert [error is None for error in result["error"]] == [i != 4 for i in range(12)]
    if "has_entry" in result:
        assert result["has_entry"] == [i != 9 for i in range(12)]
    for i in range(12):
        for name in ("class_names", "masks", "boxes", "classes", "unknown"):
            assert result[name][i] == expected[name][i]
        np.testing.assert_allclose(result["scores"][i], expected["scores"][i], atol=1e-5)


def test_ray_is_needed_for_addresses(tmp_path):
    with pytest.raises(ValueError, match="only Ray reads it"):
        COMMANDS["predict"].call("--config-file", TINY, "--input", "s3://bucket/photos", "--output", tmp_path)
