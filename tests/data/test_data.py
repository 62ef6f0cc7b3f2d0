"""Data sets with unusual ids, the mapper, and error messages for wrong files."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from regionspot.data import RegionSpotDatasetMapper, build_test_loader, build_train_loader, dataset_vocabulary
from regionspot.data.dataset_mapper import annotated_regions, read_annotations

from ..helpers import NAMES, draw_scene, tiny_config, write_dataset


@pytest.mark.parametrize("ids", [(0, 1, 2, 3), (1, 2, 3, 4), (90, 5, 17, 1000)])
def test_any_ids_become_contiguous_classes(tmp_path, register, ids):
    path = write_dataset(tmp_path, 3, ids)
    name = register("test_ids", path, tmp_path / "images")
    records = DatasetCatalog.get(name)
    names = MetadataCatalog.get(name).thing_classes
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {i: k for k, i in enumerate(sorted(ids))}
    for index, record in enumerate(records):
        assert [names[a["category_id"]] for a in record["annotations"]] == [
            NAMES[label] for label in draw_scene(index)[2]
        ]


def test_dataset_is_read_lazily(tmp_path, register):
    name = register("test_lazy", tmp_path / "later.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="later.json"):
        DatasetCatalog.get(name)


def test_lvis_images_by_coco_url(tmp_path, register):
    address = "http://images.cocodataset.org/val2017/000001.jpg"
    image = {"id": 1, "coco_url": address, "height": 2, "width": 2}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    [record] = DatasetCatalog.get(register("test_url", tmp_path / "a.json", "/coco"))
    assert record["file_name"] == "/coco/val2017/000001.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not valid JSON"),
        ('{"images": []}', "annotations, categories is missing"),
        (
            '{"images": [], "categories": [], "annotations": [{"id": 5, "category_id": 3, "image_id": 1}]}',
            "annotation 5 has category id 3",
        ),
    ],
)
def test_wrong_annotations_are_refused(tmp_path, register, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        DatasetCatalog.get(register("test_wrong", tmp_path / "a.json", tmp_path))


@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_drops_crowds_and_empty_boxes(tmp_path, register, is_train):
    path = write_dataset(tmp_path, 1)
    content = json.loads(path.read_text())
    xywh = [a["bbox"] for a in content["annotations"]]
    extra = {**content["annotations"][0], "id": 100}
    content["annotations"] += [
        {**extra, "iscrowd": 1},
        {**extra, "bbox": [3, 3, 0, 5]},
        {**extra, "bbox": [100, 3, 5, 5]},
    ]
    path.write_text(json.dumps(content))
    [record] = DatasetCatalog.get(register("test_mapper", path, tmp_path / "images"))
    mapped = RegionSpotDatasetMapper(tiny_config(), is_train)(record)
    expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in xywh])
    assert torch.equal(mapped["instances"].gt_boxes.tensor, expected.float())
    assert torch.equal(mapped["image"], torch.from_numpy(draw_scene(0)[0]).permute(2, 0, 1))
    assert "annotations" in record and "annotations" not in mapped


def test_boxes_follow_the_image(tmp_path, register):
    [record] = DatasetCatalog.get(register("test_resize", write_dataset(tmp_path, 1), tmp_path / "images"))
    mapped = RegionSpotDatasetMapper(tiny_config("INPUT.MIN_SIZE_TEST", 96), False)(record)
    assert mapped["image"].shape == (3, 96, 128)
    torch.testing.assert_close(mapped["instances"].gt_boxes.tensor, torch.from_numpy(draw_scene(0)[1]) * 2)


@pytest.mark.parametrize("is_train", [True, False])
def test_channel_order_follows_config(tmp_path, register, is_train):
    [record] = DatasetCatalog.get(register("test_order", write_dataset(tmp_path, 1), tmp_path / "images"))
    expected = torch.from_numpy(draw_scene(0)[0]).permute(2, 0, 1)
    rgb, bgr = (RegionSpotDatasetMapper(tiny_config("INPUT.FORMAT", x), is_train)(record) for x in ("RGB", "BGR"))
    assert torch.equal(rgb["image"], expected) and torch.equal(bgr["image"], expected.flip(0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"no image"),
        lambda path: path.write_bytes(path.read_bytes()[:300]),
    ],
)
def test_unreadable_image_is_named(tmp_path, register, damage):
    [record] = DatasetCatalog.get(register("test_damage", write_dataset(tmp_path, 1), tmp_path / "images"))
    damage(tmp_path / "images" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png.*image id 1"):
        RegionSpotDatasetMapper(tiny_config(), True)(record)


def test_vocabulary_of_data_sets(tmp_path, register):
    name = register("test_one", write_dataset(tmp_path), tmp_path)
    own = ["green disc", "red square", "white disc", "blue square"]
    assert dataset_vocabulary(tiny_config(), name) == own
    assert dataset_vocabulary(tiny_config("MODEL.REGIONSPOT.VOCABULARY", "a,b,c,d"), name) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="has 2 names, but test_one has 4"):
        dataset_vocabulary(tiny_config("MODEL.REGIONSPOT.VOCABULARY", "a,b"), name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loaders_pin_memory_for_gpus(tmp_path, register, device):
    name = register("test_pinned", write_dataset(tmp_path / "data", 4), tmp_path / "data" / "images")
    cfg = tiny_config("DATASETS.TRAIN", (name,), "SOLVER.IMS_PER_BATCH", 2)
    cfg.MODEL.DEVICE = device
    for loader in (build_train_loader(cfg), build_test_loader(cfg, name)):
        assert loader.pin_memory == (device == "cuda")


def test_box_modes_mixed_in_one_record():
    modes = [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS]
    boxes = [[10, 20, 5, 6], [10, 20, 15, 26], [1.5, 2.5, 3.5, 4.5], [1.5, 2.5, 5.0, 7.0]]
    annotations = [{"bbox": b, "bbox_mode": m, "category_id": i} for i, (b, m) in enumerate(zip(boxes, modes))]
    annotations.insert(1, {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 9, "iscrowd": 1})
    boxes, classes = read_annotations({"annotations": annotations})
    assert boxes.tolist() == 2 * [[10, 20, 15, 26]] + 2 * [[1.5, 2.5, 5.0, 7.0]] and classes.tolist() == [0, 1, 2, 3]


def test_boxes_match_detectron2_exactly():
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0, 300, (200, 4)).round(2).tolist()
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for box in boxes]
    expected = [BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for box in boxes]
    actual = annotated_regions({"annotations": annotations, "height": 700, "width": 700}).gt_boxes.tensor
    assert torch.equal(actual, torch.tensor(expected))
