import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from regionspot.data import register_json_dataset
from regionspot.index import ImageSet, RegionIndex, build_index, dataset_images, file_images
from regionspot.index import build as build_module
from regionspot.modeling.identity import describe_model

from ..helpers import draw_scene, tiny_config, write_dataset
from .conftest import write_images


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_index_has_what_the_predictor_gives(index, predictor, image_set):
    assert index.num_images == 7 and len(index) == sum(len(x.boxes) for x in image_set.images)
    row = 0
    for image in image_set.images:
        if not len(image.boxes):
            continue
        [result] = predictor.predict_images([image.path], [image.boxes], [image.proposal_scores], with_masks=False)
        rows = range(row, row + len(result))
        np.testing.assert_allclose(index.embeddings(list(rows)).numpy(), result.embeddings, atol=1e-3)
        for number, region in enumerate(index.regions(list(rows))):
            assert (region.image, region.image_id, region.image_size) == (
                image.name,
                image.image_id,
                result.image_size,
            )
            assert region.key == image.keys[number] and region.box.tolist() == image.boxes[number].tolist()
            expected = None if image.proposal_scores is None else pytest.approx(image.proposal_scores[number])
            assert region.proposal_score == expected
            assert region.predicted_iou == pytest.approx(result.predicted_ious[number], abs=1e-4)
        row += len(result)
    assert list(index.region_images()) == [x.image for x in index.regions(range(len(index)))]


def test_manifest_names_what_made_it(index, predictor):
    manifest = index.manifest
    assert manifest["dim"] == 32 and manifest["scoring"]["score_function"] == "softmax"
    assert manifest["logit_scale"] == float(predictor.recognizer.vision_language.clip_model.logit_scale)
    index.check_origin(describe_model(predictor.recognizer))
    other = describe_model(predictor.recognizer)
    other["trained"] = {"source": "", "fingerprint": "0"}
    with pytest.raises(ValueError, match="region index .* is of another trained"):
        index.check_origin(other)


def test_killed_build_resumes_to_the_same_bytes(index, predictor, index_cfg, image_set, tmp_path, monkeypatch):
    directory = tmp_path / "index"
    embed, calls = build_module._embed, []

    def interrupt(*arguments):
        calls.append(0)
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(build_module, "_embed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_index(predictor, index_cfg, image_set, directory, shard_images=3, show_progress=False)
    first = (directory / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="not finished; run regionspot index again"):
        RegionIndex(directory)
    resumed = build_index(predictor, index_cfg, image_set, directory, shard_images=3, show_progress=False)
    assert contents(directory) == contents(index.directory) and len(resumed) == len(index)
    assert (directory / "shard-00000.safetensors").stat().st_mtime_ns == first  # kept, not written again
    num_calls = len(calls)
    build_index(predictor, index_cfg, image_set, directory, shard_images=3, show_progress=False)
    assert len(calls) == num_calls  # nothing is left to do


def test_broken_image_costs_one_line(index, predictor, index_cfg, tmp_path):
    images = write_images(tmp_path)
    broken, outside = images.images[1], images.images[4]
    broken.path.write_bytes(b"not an image")
    records = list(images.images)
    records[4] = replace(outside, boxes=np.array([[500, 500, 600, 600.0]]), proposal_scores=None, keys=np.array([0]))
    images = ImageSet(records, tmp_path, "fingerprint", has_boxes=True)
    made = build_index(predictor, index_cfg, images, tmp_path / "index", shard_images=3, show_progress=False)
    lines = made.left_out()
    assert len(lines) == 2 and lines[0].startswith("ä1.png: ") and "cannot be read" in lines[0]
    assert lines[1].startswith("ä4.png: boxes of the image: number 0")
    expected = [x.image for x in index.regions(range(len(index))) if x.image not in ("ä1.png", "ä4.png")]
    assert list(made.region_images()) == expected
    # as long as their files are as they were, no shard is written again
    times = [path.stat().st_mtime_ns for path in sorted(made.directory.glob("shard-*"))]
    build_index(predictor, index_cfg, images, tmp_path / "index", shard_images=3, show_progress=False)
    assert [path.stat().st_mtime_ns for path in sorted(made.directory.glob("shard-*"))] == times
    # repaired, it is in the next run, and only its shard is written again
    kept = (made.directory / "shard-00002.safetensors").stat().st_mtime_ns
    Image.new("RGB", (40, 64)).save(broken.path)
    again = build_index(predictor, index_cfg, images, tmp_path / "index", shard_images=3, show_progress=False)
    assert "ä1.png" in set(again.region_images()) and len(again.left_out()) == 1
    assert (made.directory / "shard-00002.safetensors").stat().st_mtime_ns == kept


def test_other_images_or_model_are_refused(index, predictor, index_cfg, image_set, tmp_path):
    shutil.copytree(index.directory, tmp_path / "index")
    others = replace(image_set, fingerprint="other")
    with pytest.raises(ValueError, match=r"region index .* is of another inputs.*another directory"):
        build_index(predictor, index_cfg, others, tmp_path / "index", shard_images=3, show_progress=False)
    with pytest.raises(ValueError, match="no boxes: give annotations"):
        build_index(predictor, index_cfg, replace(image_set, has_boxes=False), tmp_path / "none")


def test_files_and_directories(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/2.png", "b/c/1.JPG", "a.png", "b/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    inputs = [str(tmp_path / "b"), str(tmp_path / "a.png"), str(tmp_path / "b" / "2.png")]
    images = file_images(inputs)
    assert [x.name for x in images.images] == ["b/2.png", "b/c/1.JPG", "a.png"] and images.root == tmp_path
    assert [x.image_id for x in images.images] == [0, 1, 2] and not images.has_boxes
    assert images.fingerprint != file_images(inputs[:1]).fingerprint
    with pytest.raises(FileNotFoundError, match="no such file"):
        file_images([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images of JPEG"):
        file_images([str(tmp_path / "empty")])


def test_annotated_boxes_of_a_data_set(tmp_path):
    path = write_dataset(tmp_path / "data", 3)
    register_json_dataset("index_data", path, tmp_path / "data" / "images")
    images = dataset_images("index_data")
    assert images.has_boxes and [x.name for x in images.images] == ["0.png", "1.png", "2.png"]
    assert [x.image_id for x in images.images] == [1, 2, 3] and images.images[0].keys.tolist() == list(
        range(len(draw_scene(0)[1]))
    )
    assert np.array_equal(images.images[0].boxes, draw_scene(0)[1])
    without = dataset_images("index_data", with_boxes=False)
    assert without.images[0].boxes is None and without.fingerprint != images.fingerprint


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [("category_id", 7, True), ("bbox", [1, 1, 9, 9], False), ("iscrowd", 1, False)],
)
def test_fingerprint_is_of_boxes_not_of_labels(tmp_path, key, value, is_same):
    path = write_dataset(tmp_path, 2)
    name = f"fingerprint_{key}"
    register_json_dataset(name, path, tmp_path / "images")
    before = [dataset_images(name, with_boxes).fingerprint for with_boxes in (True, False)]
    content = json.loads(path.read_text())
    assert content["annotations"][3].get(key) != value
    content["annotations"][3][key] = value
    path.write_text(json.dumps(content))
    after = [dataset_images(name, with_boxes).fingerprint for with_boxes in (True, False)]
    assert (after[0] == before[0]) is is_same and after[1] == before[1]


def test_changed_directory_of_regions_is_another(tmp_path):
    images, regions = write_images(tmp_path, 2), tmp_path / "regions"
    regions.mkdir()
    shape = {"label": "cup", "points": [[5, 5], [20, 30]], "shape_type": "rectangle"}
    (regions / "ä0.json").write_text(json.dumps({"imagePath": "ä0.png", "shapes": [shape]}))
    inputs = [str(x.path) for x in images.images]
    before = file_images(inputs, str(regions)).fingerprint
    assert file_images(inputs, str(regions)).fingerprint == before
    (regions / "ä0.json").write_text(json.dumps({"imagePath": "ä0.png", "shapes": [shape, shape]}))
    assert file_images(inputs, str(regions)).fingerprint != before


def test_image_of_another_size_than_annotated_is_left_out(predictor, index_cfg, tmp_path):
    path = write_dataset(tmp_path, 2)
    register_json_dataset("index_sizes", path, tmp_path / "images")
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "1.png")
    images = dataset_images("index_sizes")
    made = build_index(predictor, index_cfg, images, tmp_path / "index", show_progress=False)
    [line] = made.left_out()
    assert line.startswith(f"1.png: expected the annotated height and width {images.images[1].size}, got (20, 30)")
    assert set(made.region_images()) == {"0.png"}


def test_file_name_that_is_not_utf8_costs_one_line(predictor, index_cfg, tmp_path):
    records = list(write_images(tmp_path, 2).images)
    path = records[1].path.rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    assert len(file_images([str(tmp_path)]).images) == 2
    images = ImageSet([records[0], replace(records[1], name=path.name, path=path)], tmp_path, "", has_boxes=True)
    made = build_index(predictor, index_cfg, images, tmp_path / "index", show_progress=False)
    assert made.left_out() == [r"caf\udce9.png: the file name is not UTF-8; rename the file"]
    assert set(made.region_images()) == {"ä0.png"}


def test_killed_reader_is_one_clear_error(predictor, index_cfg, image_set, tmp_path):
    def kill(record, size):
        os.kill(os.getpid(), signal.SIGKILL)

    cfg = index_cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 1
    with pytest.raises(OSError, match=r"reads images was killed, probably .* fewer .* run it again, which resumes"):
        build_index(predictor, cfg, replace(image_set, regions=kill), tmp_path / "index", show_progress=False)


def test_sam_finds_regions(tmp_path, image_set):
    from regionspot import RegionSpotPredictor

    sam = "MODEL.REGIONSPOT.PROPOSALS"
    cfg = tiny_config(f"{sam}.SOURCE", "sam_automatic", f"{sam}.SAM_AUTOMATIC.POINTS_PER_SIDE", 2, f"{sam}.TOP_K", 3)
    cfg.MODEL.REGIONSPOT.PROPOSALS.SAM_AUTOMATIC.PRED_IOU_THRESH = 0.0
    cfg.MODEL.REGIONSPOT.PROPOSALS.SAM_AUTOMATIC.STABILITY_SCORE_THRESH = 0.0
    images = file_images([str(x.path) for x in image_set.images[:3]])
    made = build_index(RegionSpotPredictor(cfg), cfg, images, tmp_path / "index", show_progress=False)
    assert len(made) >= 3 and all(x.proposal_score is not None for x in made.regions(range(len(made))))
    assert made.manifest["proposals"]["SOURCE"] == "sam_automatic"
