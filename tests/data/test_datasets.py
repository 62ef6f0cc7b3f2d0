"""Annotation files as arrays: what is read, what is refused, and which data sets are registered."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from torch.utils.data import DataLoader

from regionspot.data import build_test_loader, register_from_spec, register_json_dataset
from regionspot.data.coco_io import json_file
from regionspot.data.datasets import JsonDataset
from regionspot.data.datasets.builtin import odinw_paths, register_all

from ..helpers import NAMES, draw_scene, tiny_config, write_dataset

BUILTIN = [
    *(f"{name}_{split}" for name in ("objects365_v1", "objects365_v2", "openimages_v6", "v3det", "lvis_v1", "coco_2017")
      for split in ("train", "val")),
    "lvis_v1_minival",
    *(f"miniworld_{split}" for split in ("train", "val", "test")),
    *odinw_paths(Path("datasets")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _forget_what_is_registered():
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def image(image_id=1, **values):
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": 40, "width": 50, **values}


def annotation(image_id=1, category_id=1, bbox=(1, 2, 3, 4), **values):
    return {"id": 7, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), "iscrowd": 0, **values}


def write(directory, images=(), annotations=(), categories=({"id": 1, "name": "a"},), name="a.json"):
    path = directory / name
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def reference_records(path, image_root):
    """The plain reading of an annotation file into lists of dicts."""
    content = json.loads(path.read_text())
    mapping = {i: k for k, i in enumerate(sorted(c["id"] for c in content["categories"]))}
    return [
        {
            "file_name": str(image_root / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [
                {
                    "bbox": a["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": mapping[a["category_id"]],
                    "iscrowd": a.get("iscrowd", 0),
                }
                for a in content["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in content["images"]
    ]


def random_file(directory, num_annotations=300):
    """Annotations out of order, with ids that have gaps and boxes that no float32 holds exactly."""
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 10**12, 20).tolist()
    images = [image(i, height=100 + k, width=80 + k) for k, i in enumerate(ids)]
    boxes = [(generator.random(4) * 90 - 10).tolist() for _ in range(num_annotations // 2)]
    boxes += generator.integers(-5, 90, (num_annotations - num_annotations // 2, 4)).tolist()
    annotations = []
    for box in boxes:
        values = {"iscrowd": int(generator.random() < 0.1)} if generator.random() < 0.7 else {}
        entry = annotation(int(generator.choice(ids)), int(generator.choice([-4, 0, 90])), box)
        entry.pop("iscrowd")
        annotations.append({**entry, **values, "segmentation": [[1, 2, 3, 4, 5, 6]], "area": 1.5})
    categories = [{"id": i, "name": f"c{i}", "supercategory": "x"} for i in (90, -4, 0)]
    return write(directory, images, annotations, categories)


@pytest.mark.parametrize("chunk", [1 << 14, 7])
def test_records_match_plain_reading(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_file, "CHUNK_ENTRIES", chunk)
    path = random_file(tmp_path)
    dataset, expected = JsonDataset(path, tmp_path), reference_records(path, tmp_path)
    assert dataset.class_names == ["c-4", "c0", "c90"] and dataset.id_mapping == {-4: 0, 0: 1, 90: 2}
    assert len(dataset) == len(expected) and dataset.evaluator_type == "coco"
    crowd = degenerate = 0
    for index, (record, reference) in enumerate(zip(dataset, expected)):
        assert {k: v for k, v in record.items() if k != "annotations"} == {
            k: v for k, v in reference.items() if k != "annotations"
        }
        size = (record["height"], record["width"])
        instances, expected_instances = (
            utils.annotations_to_instances(
                [utils.transform_instance_annotations(a, T.TransformList([]), size) for a in r["annotations"]], size
            )
            for r in (record, reference)
        )
        assert torch.equal(instances.gt_boxes.tensor, expected_instances.gt_boxes.tensor)  # to the bit
        assert torch.equal(instances.gt_classes, expected_instances.gt_classes)
        crowds = torch.tensor([bool(a["iscrowd"]) for a in reference["annotations"]])
        assert [a["iscrowd"] for a in record["annotations"]] == crowds.int().tolist()
        usable = expected_instances.gt_boxes.nonempty(threshold=1e-5) & ~crowds
        assert (
            dataset.num_regions[index] == usable.sum() == len(utils.filter_empty_instances(expected_instances[~crowds]))
        )
        crowd, degenerate = crowd + int(crowds.sum()), degenerate + int((~usable & ~crowds).sum())
    assert (dataset.num_crowd, dataset.num_degenerate) == (crowd, degenerate) and crowd and degenerate


def test_arrays_are_compact_and_pickle(tmp_path):
    dataset = JsonDataset(random_file(tmp_path), tmp_path)
    types = {"image_ids": "int64", "offsets": "int64", "boxes": "float32", "labels": "int32", "crowd": "bool"}
    for name, dtype in types.items():
        assert getattr(dataset, name).dtype == dtype
    assert dataset.boxes.nbytes + dataset.labels.nbytes + dataset.crowd.nbytes == 21 * 300
    copy = pickle.loads(pickle.dumps(dataset))
    assert list(copy) == list(dataset) and copy[-1] == dataset[19]
    with pytest.raises(IndexError):
        dataset[20]
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert [record["image_id"] for record in loader] == dataset.image_ids.tolist()


@pytest.mark.parametrize("ids", [(0, 1, 2, 3), (1, 2, 3, 4), (90, 5, 17, 1000)])
def test_classes_are_contiguous(tmp_path, ids):
    register_json_dataset("test_ids", write_dataset(tmp_path, 3, ids), tmp_path / "images")
    records = DatasetCatalog.get("test_ids")
    metadata = MetadataCatalog.get("test_ids")
    assert metadata.thing_dataset_id_to_contiguous_id == {i: k for k, i in enumerate(sorted(ids))}
    for index, record in enumerate(records):
        names = [metadata.thing_classes[a["category_id"]] for a in record["annotations"]]
        assert names == [NAMES[label] for label in draw_scene(index)[2]]


def test_evaluator_type_from_file(tmp_path):
    path = write_dataset(tmp_path / "lvis", 2)
    content = json.loads(path.read_text())
    del content["images"][1]["neg_category_ids"]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    for name, file, evaluator_type, expected in (
        ("test_lvis", path, None, "lvis"),
        ("test_coco", tmp_path / "coco.json", None, "coco"),
        ("test_given", path, "coco", "coco"),
    ):
        register_json_dataset(name, file, path.parent / "images", evaluator_type)
        assert MetadataCatalog.get(name).get("evaluator_type") == evaluator_type  # nothing is read yet
        DatasetCatalog.get(name)
        assert MetadataCatalog.get(name).evaluator_type == expected
    with pytest.raises(ValueError, match="expected evaluator_type 'lvis', 'coco' or None, got 'voc'"):
        register_json_dataset("test_voc", path, tmp_path, "voc")


def test_keep_parts_of_file_names(tmp_path):
    path = write(tmp_path, [image(file_name="images/v1/patch8/a.jpg"), image(2, file_name="b.jpg")])
    files = {keep: [r["file_name"] for r in JsonDataset(path, "/x", keep_parts=keep)] for keep in (None, 1, 2)}
    assert files == {
        None: ["/x/images/v1/patch8/a.jpg", "/x/b.jpg"],
        1: ["/x/a.jpg", "/x/b.jpg"],
        2: ["/x/patch8/a.jpg", "/x/b.jpg"],
    }
    with pytest.raises(ValueError, match="keep_parts of at least 1, or None, got 0"):
        register_json_dataset("test_parts", path, "/x", keep_parts=0)


@pytest.mark.parametrize("name", [{}, {"file_name": "1.jpg"}])  # the second in the public file of minival
def test_lvis_file_without_annotations(tmp_path, name):
    address = "http://images.cocodataset.org/val2017/1.jpg"
    entry = {**name, "id": 1, "coco_url": address, "height": 2, "width": 2, "neg_category_ids": [1]}
    path = write(tmp_path, [entry], categories=[{"id": 1, "name": "a", "frequency": "r"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    dataset = JsonDataset(path, "/coco")
    [record] = dataset
    assert record["file_name"] == "/coco/val2017/1.jpg" and record["annotations"] == []
    assert dataset.evaluator_type == "lvis" and dataset.num_regions.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [image(), image()]}, r"images: id 1 occurs 2 times"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "categories: id 3 occurs 2 times"),
        ({"categories": [{"id": 3}]}, r"categories\[0\]: object missing required field `name`"),
        ({"images": [image("1")]}, r"images\[0\].id: expected `int`, got `str`"),
        ({"images": [image(height=4.5)]}, r"images\[0\].height: expected `int`, got `float`"),
        ({"images": [image(width=0)]}, r"images\[0\].width: expected `int` >= 1"),
        ({"images": [image(2**70)]}, r"images\[0\].id"),
        ({"images": [image(file_name=None)]}, "image 1 has neither file_name nor coco_url"),
        ({"images": {}}, "images: expected `array`, got `object`"),
        ({"annotations": [annotation(), annotation(5)]}, r"annotations\[1\]: annotation 7 has image id 5.*'images'"),
        ({"annotations": [annotation(1, 2)]}, r"annotations\[0\]: annotation 7 has category id 2.*'categories'"),
        ({"annotations": [annotation(bbox=(1, 2, 3))]}, r"annotations\[0\].bbox: expected `array` of length 4"),
        ({"annotations": [annotation(bbox=(1, 2, 3, "4"))]}, r"annotations\[0\].bbox\[3\]: expected `float`"),
        ({"annotations": [annotation(bbox=(1, 2, 3, 1e60))]}, r"annotations\[0\].bbox: expected four finite numbers"),
        ({"annotations": [annotation(bbox=(1, 2, 3, float("nan")))]}, "not valid JSON .*NaN and Infinity"),
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\] has no bbox"),
        ({"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 1}]}, "missing required field `image_id`"),
        ({"annotations": [annotation("1")]}, r"annotations\[0\].image_id: expected `int`, got `str`"),
    ],
)
def test_errors_name_file_and_place(tmp_path, content, message):
    path = write(tmp_path, **{"images": [image()], **content})
    with pytest.raises(ValueError, match=message) as caught:
        JsonDataset(path, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_place_in_later_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "CHUNK_ENTRIES", 2)
    path = write(tmp_path, [image()], [*[annotation()] * 4, annotation(bbox=(1, 2))])
    with pytest.raises(ValueError, match=r"annotations\[4\].bbox"):
        JsonDataset(path, tmp_path)
    for content in (b"", b"{", b"[]", b'{"images": []}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not valid JSON|expected COCO or LVIS JSON"):
            JsonDataset(path, tmp_path)


@pytest.mark.parametrize("place", ["", "images", "annotations", "categories"])
def test_deep_nesting_is_refused(tmp_path, place):
    deep = '{"x": ' + '{"a": ' * 500_000 + "1" + "}" * 500_000 + "}"
    parts = ", ".join(
        f'"{part}": [{deep if part == place else ""}]' for part in ("images", "annotations", "categories")
    )
    path = tmp_path / "deep.json"
    path.write_text("{" + parts + (f', "more": {deep}' if not place else "") + "}")
    with pytest.raises(ValueError, match="deep.json: not valid JSON .*recursion"):
        JsonDataset(path, tmp_path)


def test_spec_registers_itself(tmp_path, monkeypatch):
    path = write_dataset(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    name = "annotations.json:images"
    assert register_from_spec(name) and register_from_spec(name) and name in DatasetCatalog
    monkeypatch.chdir("/")
    batches = list(build_test_loader(tiny_config(), name))
    assert [batch[0]["image_id"] for batch in batches] == [1, 2]
    assert MetadataCatalog.get(name).evaluator_type == "lvis" and MetadataCatalog.get(name).json_file == str(path)


def test_invalid_specs(tmp_path):
    path = write_dataset(tmp_path, 1)
    assert not register_from_spec("lvis_v1_train") and not register_from_spec("no_such_name")
    for name, message in (
        (f"{path}.no.json:{tmp_path}", r"no\.json: no such file; expected 'annotations.json:directory"),
        (f"{path}:{tmp_path}/no", "no': no such directory; expected 'annotations.json:directory"),
        (f"{path}:", "images '': no such directory"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            register_from_spec(name)
    with pytest.raises(ValueError, match="names no images: expected 'annotations.json:directory"):
        register_from_spec(str(path))


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_data_sets_are_registered(name):
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog and Path(metadata.json_file).suffix == ".json"
    is_lvis = name.startswith(("lvis", "miniworld"))
    assert metadata.evaluator_type == ("lvis" if is_lvis else "coco")


def test_odinw_paths():
    paths = {name: (str(file), str(directory)) for name, (file, directory) in odinw_paths(Path("r")).items()}
    made = "annotations_without_background.json"
    assert len(paths) == 39
    assert paths["odinw_PascalVOC_test"] == paths["odinw_PascalVOC_val"] == (
        f"r/odinw/PascalVOC/valid/{made}", "r/odinw/PascalVOC/valid"
    )  # fmt: skip
    assert paths["odinw_pistols_val"] == (f"r/odinw/pistols/export/val_{made}", "r/odinw/pistols/export")
    assert paths["odinw_EgoHands_val"][1] == "r/odinw/EgoHands/generic/mini_val"
    assert paths["odinw_EgoHands_train"][1] == "r/odinw/EgoHands/generic/train"


def test_registration_opens_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(DatasetCatalog, "data", {"v3det_val": lambda: "mine"})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    monkeypatch.setattr("io.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: pytest.fail("a file was looked for"))
    register_all(tmp_path)
    registered, replaced = set(DatasetCatalog), DatasetCatalog.get("v3det_val")
    monkeypatch.undo()
    names = {name for name in BUILTIN if not name.startswith(("coco_2017", "lvis_v1_train", "lvis_v1_val"))}
    assert names == registered and len(names) == 51 and replaced == "mine"
