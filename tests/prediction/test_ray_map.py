"""Recognition on a local Ray cluster, of which a process is killed in between, equals the plain one."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from regionspot.prediction import RegionBatchPredictor
from regionspot.prediction.ray_map import _Actor, connect, run_on_ray
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
    before = signal.getsignal(signal.SIGTERM)
    with connect("local", num_cpus=2, object_store_bytes=100 << 20) as ray:
        assert signal.getsignal(signal.SIGTERM) is before  # commands end by handlers of their own
        yield ray


def test_killed_worker_changes_nothing(photos, ray, monkeypatch):
    cfg, weights = load(photos)
    boxes = {f"{i:03}.png": draw_scene(i)[1].tolist() for i in range(12) if i != 9}
    (photos / "boxes.json").write_text(json.dumps(boxes))
    monkeypatch.setattr("regionspot_cli.predict.run_on_ray", partial(run_on_ray, predictor=KilledOnce))
    options = ["--boxes", photos / "boxes.json", "--vocabulary", ",".join(NAMES), "--batch-size", 3, "--ray", "local"]
    command = ["--config-file", TINY, "--input", photos, "--output", photos / "out", *options, *weights]
    COMMANDS["predict"].call(*command)
    calls = (photos / "calls.txt").read_text().split()
    assert (photos / "killed").exists() and len(set(calls)) == 2
    paths = [record.path for record in list_images([str(photos)])]
    plain = RegionBatchPredictor(cfg, NAMES)({"path": paths, "boxes": [boxes.get(Path(x).name, []) for x in paths]})
    compare(photos / "out", plain, paths)
    with pytest.raises(ValueError, match="expected a new or empty directory"):
        COMMANDS["predict"].call(*command)


def test_actor_takes_tables_of_paths_and_boxes(photos):
    """Arrays of arrays, as Ray reads them from Parquet."""
    cfg, _ = load(photos)
    paths = [str(photos / f"{i:03}.png") for i in range(4)]
    boxes = [draw_scene(i)[1] for i in range(4)]
    nested = np.empty(4, object)
    for i, image_boxes in enumerate(boxes):
        nested[i] = np.empty(len(image_boxes), object)
        nested[i][:] = list(image_boxes)
    options = {"cfg": cfg, "vocabulary": NAMES, "region_filter": None, "with_embeddings": True}
    actor = _Actor(RegionBatchPredictor, options, None)
    table = actor({"path": np.array(paths, object), "boxes": nested, "key": np.arange(4)}).to_pydict()
    plain = RegionBatchPredictor(cfg, NAMES, with_embeddings=True)({"path": paths, "boxes": boxes})
    assert table["path"] == paths and table["key"] == [0, 1, 2, 3] and table["error"] == [None] * 4
    for name in ("boxes", "class_names", "classes", "masks"):
        assert table[name] == plain[name]
    for name in ("scores", "embeddings"):
        for row, expected in zip(table[name], plain[name]):
            np.testing.assert_allclose(row, expected, atol=1e-6)


def load(photos):
    weights = [*frozen_overrides(photos), "MODEL.WEIGHTS", str(photos / "model.pth")]
    return tiny_config(*weights), weights


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "only Ray reads it"),
        (["--ray", "local", "--boxes", "1,2,30,40"], "Ray reads it without --boxes; give Parquet with a column boxes"),
        (["--ray", "local", "--regions", "p.json"], "Ray reads it without --regions; give Parquet with a column boxes"),
    ],
)
def test_options_for_addresses_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        COMMANDS["predict"].call("--config-file", TINY, "--input", "s3://bucket/photos", "--output", tmp_path, *options)
