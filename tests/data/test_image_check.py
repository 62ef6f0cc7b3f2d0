import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from regionspot.data.build import build_test_loader, build_train_loader, training_stream
from regionspot.data.image_check import find_missing

from ..helpers import tiny_config, write_dataset


@pytest.fixture
def dataset(tmp_path, register):
    json_file = write_dataset(tmp_path / "data", 12)
    return register("test_images", json_file, tmp_path / "data" / "images", "lvis")


def config(*overrides):
    data = ["DATASETS.TRAIN", ("test_images",), "DATASETS.TEST", ("test_images",), "SOLVER.IMS_PER_BATCH", 4]
    return tiny_config(*data, *overrides)


def test_find_missing_by_path_and_directory(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(150 if name == "a" else 3):
            (tmp_path / name / str(index)).touch()
    (tmp_path / "a" / "150").mkdir()  # not a file
    present = [str(path) for path in tmp_path.glob("*/*") if path.is_file()]
    absent = [str(tmp_path / name) for name in ("a/x", "b/x", "c/x", "b")]
    many = [str(tmp_path / "d" / str(index)) for index in range(200)]
    assert find_missing(present) == []
    assert sorted(find_missing([*present, *absent, *many])) == sorted([*absent, *many])


@pytest.mark.parametrize("build", [build_train_loader, lambda cfg: build_test_loader(cfg, "test_images")])
def test_missing_images_are_an_error_at_start(dataset, tmp_path, build, caplog):
    images = tmp_path / "data" / "images"
    (images / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 12 images are unreadable.*3.png.*check_dataset.py.*SKIP_UNREADABLE"):
        build(config())
    for index in range(5, 10):
        (images / f"{index}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 of 12 images are missing: .*5.png; .*7.png; \.\.\.\. tools/check"):
        build(config())
    with caplog.at_level(logging.WARNING):
        build(config("DATALOADER.SKIP_UNREADABLE", True))
    assert "5 of 12 images are missing" in caplog.text and "1 of 12 images are unreadable" in caplog.text
    for path in images.glob("*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="12 of 12 images are missing"):
        build(config("DATALOADER.SKIP_UNREADABLE", True))


def test_image_size_mismatch_is_an_error_at_start(dataset, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 40)).save(tmp_path / "data" / "images" / "2.png")
    with pytest.raises(ValueError, match="unreadable.*image id 3"):
        build_train_loader(config())


def test_unreadable_image_is_replaced_by_next(dataset, tmp_path):
    images = tmp_path / "data" / "images"
    for index in (3, 4, 11):
        (images / f"{index}.png").write_bytes(b"no image")

    def samples(workers, start, num_batches):
        overrides = ("DATALOADER.SKIP_UNREADABLE", True, "DATALOADER.NUM_WORKERS", workers)
        loader = build_train_loader(config(*overrides, "INPUT.RANDOM_FLIP", "horizontal"))
        training_stream(loader).start = start
        iterator = iter(loader)
        return [sample for _ in range(num_batches) for sample in next(iterator)]

    stream = training_stream(build_train_loader(config("DATALOADER.SKIP_UNREADABLE", True)))
    order = [index for _, index in zip(range(24), (index for _, index in stream))]
    expected = samples(0, 0, 6)
    replaced = {3: 5, 4: 5, 11: 0}
    assert [sample["image_id"] - 1 for sample in expected] == [replaced.get(index, index) for index in order]
    for sample, index in zip(expected, order):
        assert len(sample.get("unreadable", [])) == {3: 2, 4: 1, 11: 1}.get(index, 0)
    for other in (samples(2, 0, 6), samples(0, 8, 4)):  # other workers, and resuming
        for one, two in zip(other[::-1], expected[::-1]):
            assert one["image_id"] == two["image_id"] and np.array_equal(one["image"], two["image"])


def test_many_unreadable_images_end_the_run(dataset, tmp_path):
    cfg = config("DATALOADER.SKIP_UNREADABLE", True)
    loader = build_train_loader(cfg)
    for path in (tmp_path / "data" / "images").glob("*"):
        path.unlink()
    with pytest.raises(ValueError, match="12 images in a row cannot be read"):
        next(iter(loader))


def test_unreadable_test_image_becomes_blank(dataset, tmp_path):
    (tmp_path / "data" / "images" / "0.png").unlink()
    loader = build_test_loader(config("DATALOADER.SKIP_UNREADABLE", True), "test_images")
    [blank], [other] = [inputs for inputs, _ in zip(loader, range(2))]
    assert not blank["image"].any() and len(blank["instances"]) == 0 and blank["image_id"] == 1
    assert "no such file" in blank["unreadable"] and "unreadable" not in other
    assert len(DatasetCatalog.get("test_images")) == len(list(loader))
