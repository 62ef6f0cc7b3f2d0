"""Predictions on the disk: truncated, resumed, sent to the main process."""

import time
from datetime import timedelta

import msgspec
import numpy as np
import pytest
import torch
from torch import distributed

from regionspot.evaluation import prediction_log
from regionspot.evaluation.class_cap import ClassCap
from regionspot.evaluation.prediction_log import ImagePredictions, PredictionLog


def predict(image_id, num_detections=4, level=0.0):
    """Return random predictions of an image, with masks."""
    rng = np.random.default_rng(abs(image_id))
    return ImagePredictions(
        image_id=image_id,
        classes=rng.integers(0, 3, num_detections).astype(np.int32),
        scores=(level + rng.random(num_detections)).astype(np.float32),
        regions=np.sort(rng.integers(0, 3, num_detections)).astype(np.int32),
        boxes=rng.random((3, 4)).astype(np.float32),
        rles=[f"{image_id}-{row}" for row in range(3)],
        size=(20, 30),
        targets=np.array([1, 2, 0]),
        top=np.array([[0, 1], [1, 0], [2, 1]]),
    )


def plain(predictions):
    """Return predictions as a dict that ``==`` compares."""
    values = msgspec.structs.asdict(predictions)
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}


def read(log):
    log.collect()
    return [plain(image) for image in log]


def test_records_round_trip(tmp_path):
    log = PredictionLog(tmp_path, "one")
    assert log.open() == set()
    for image_id in (9, 2**62, -3, 7):
        log.append(predict(image_id, num_detections=abs(image_id) % 5))
    assert read(log) == [plain(predict(image_id, num_detections=abs(image_id) % 5)) for image_id in (-3, 7, 9, 2**62)]
    log.finish(complete=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 15, 16, 40, 200])
def test_truncated_record_is_repeated(tmp_path, cut):
    log = PredictionLog(tmp_path, "one")
    log.open()
    for image_id in (1, 2, 3):
        log.append(predict(image_id))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    again = PredictionLog(tmp_path, "one")
    assert again.open() == {1, 2}
    again.append(predict(3))
    assert read(again) == [plain(predict(image_id)) for image_id in (1, 2, 3)]


def test_damaged_record_is_ignored(tmp_path):
    log = PredictionLog(tmp_path, "one")
    log.open()
    log.append(predict(1))
    [path] = tmp_path.iterdir()
    place = path.stat().st_size + 40
    log.append(predict(2))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert PredictionLog(tmp_path, "one").open() == {1}


def test_predictions_of_another_model_are_removed(tmp_path):
    log = PredictionLog(tmp_path, "one")
    log.open()
    log.append(predict(1))
    (tmp_path / "predictions.0.jsonl").write_text("of an older version")
    assert PredictionLog(tmp_path, "two").open() == set()
    assert len(list(tmp_path.iterdir())) == 1
    assert PredictionLog(tmp_path, "one").open() == set()


def run_cut(directory, images, limit, cuts, rising):
    """Evaluate in runs that end after each of ``cuts`` images; return the content of the log, and the log."""
    for first, last in zip([0, *cuts], [*cuts, len(images)]):
        log = PredictionLog(directory, "one", ClassCap(3, limit) if limit else None)
        done = log.open()
        assert len(done) == first
        for image_id in images[first:last]:
            log.append(predict(image_id, 20, image_id / 10 if rising else 0))
    return read(log), log


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("cuts", [[], [3], [1, 1, 17]])
def test_cap_after_interruptions(tmp_path, monkeypatch, cuts, rising):
    monkeypatch.setattr("regionspot.evaluation.class_cap._PENDING", 10)
    monkeypatch.setattr(prediction_log, "_REWRITTEN", 100)
    images = np.random.default_rng(0).permutation(40).tolist()
    whole, _ = run_cut(tmp_path / "whole", images, None, [], rising)
    columns = [np.concatenate([x[key] for x in whole]) for key in ("classes", "scores")]
    lowest = [np.sort(columns[1][columns[0] == label])[-5] for label in range(3)]
    kept, log = run_cut(tmp_path / "kept", images, 5, cuts, rising)
    assert sum(len(image["classes"]) for image in kept) == 15
    for image, full in zip(kept, whole, strict=True):
        rows = [i for i, (c, s) in enumerate(zip(full["classes"], full["scores"])) if s >= lowest[c]]
        assert image["scores"] == [full["scores"][i] for i in rows]
        for key in ("boxes", "rles"):
            assert [image[key][r] for r in image["regions"]] == [full[key][full["regions"][i]] for i in rows]
        assert len(image["boxes"]) == len({*image["regions"]}) and image["top"] == full["top"]
    if rising:  # nearly all detections were admitted when they came
        size = sum(path.stat().st_size for path in log.directory.iterdir())
        assert size < sum(path.stat().st_size for path in (tmp_path / "whole").iterdir()) / 1.5


def _two(rank, directories, store):
    """Evaluate in one of two processes, the main one of which takes longer than collectives may."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=1))
    log = PredictionLog(directories[rank], "one", ClassCap(3, 10))
    done = log.open()
    for image_id in range(rank, 10, 2):
        if image_id not in done:
            log.append(predict(image_id))
    time.sleep(1.7 * rank)
    log.collect()
    if rank == 0:
        images = [plain(image) for image in log]
        time.sleep(1.7)
        assert [image["image_id"] for image in images] == list(range(10))
        scores = np.concatenate([image["scores"] for image in images])
        (directories[0] / "scores.txt").write_text(str(np.sort(scores).tolist()))
    log.finish(complete=rank == 0)
    assert not list(directories[rank].glob("predictions.*"))


@pytest.mark.parametrize("disks", ["common", "own"])
def test_two_processes_without_common_disk(tmp_path, monkeypatch, disks):
    monkeypatch.setattr(prediction_log, "_CHUNK", 100)
    directories = [tmp_path / ("0" if disks == "common" else str(rank)) for rank in range(2)]
    before = PredictionLog(directories[1], "one", ClassCap(3, 10))  # an interrupted run
    before.open()
    before.append(predict(1))
    torch.multiprocessing.start_processes(_two, (directories, tmp_path / "store"), 2, start_method="fork")
    alone = PredictionLog(tmp_path / "alone", "one", ClassCap(3, 10))
    alone.open()
    for image_id in range(10):
        alone.append(predict(image_id))
    scores = np.sort(np.concatenate([image["scores"] for image in read(alone)]))
    assert (directories[0] / "scores.txt").read_text() == str(scores.tolist())


def _failing(rank, directory, store):
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    log = PredictionLog(directory, "one")
    log.open()
    log.collect()
    if rank == 0:
        log.finish(complete=False)
        return
    with pytest.raises(RuntimeError, match="its log says why"):
        log.finish(complete=True)


def test_failure_of_main_process_stops_others(tmp_path):
    torch.multiprocessing.start_processes(_failing, (tmp_path, tmp_path / "store"), 2, start_method="fork")
