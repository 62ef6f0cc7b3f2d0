"""Category ids of classes: from metadata, by Detectron2's conventions, and mismatched names."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data import dataset_vocabulary
from regionspot.data.datasets import category_ids
from regionspot.data.training_set import open_training_images

from ..helpers import tiny_config, write_dataset

NAME = "test_categories"


@pytest.fixture
def register_categories(tmp_path):
    """Register a data set as Detectron2 does, with these categories in its file and these metadata."""

    def add(categories, **metadata):
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
        DatasetCatalog.register(NAME, list)
        MetadataCatalog.get(NAME).set(json_file=str(path), **metadata)

    yield add
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def entries(**ids):
    return [{"id": category_id, "name": name} for name, category_id in ids.items()]


def test_default_mapping_follows_id_order(register_categories):
    register_categories(entries(cup=3, bowl=2, dog=1), thing_classes=["dog", "bowl", "cup"])
    assert category_ids(NAME).tolist() == [1, 2, 3]


def test_default_mapping_of_lvis_is_id_minus_1(register_categories):
    register_categories(entries(cup=3, bowl=2, dog=1), thing_classes=["dog", "bowl", "cup"], evaluator_type="lvis")
    assert category_ids(NAME).tolist() == [1, 2, 3]


def test_lvis_ids_from_0_are_refused(register_categories):
    """Detectron2's loader makes label -1 of id 0."""
    register_categories(entries(cup=2, bowl=1, dog=0), thing_classes=["dog", "bowl", "cup"], evaluator_type="lvis")
    with pytest.raises(ValueError, match="category 0 is 'dog', but 'no class' in metadata"):
        category_ids(NAME)


def test_mapping_of_some_categories(register_categories):
    register_categories(
        entries(cup=2, dog=7, bowl=90), thing_classes=["bowl", "cup"], thing_dataset_id_to_contiguous_id={90: 0, 2: 1}
    )
    assert category_ids(NAME).tolist() == [90, 2]


def test_mapping_from_metadata(register_categories):
    mapping = {7: 0, 90: 1, 2: 2}
    register_categories(
        entries(cup=2, dog=7, bowl=90), thing_classes=["dog", "bowl", "cup"], thing_dataset_id_to_contiguous_id=mapping
    )
    assert category_ids(NAME).tolist() == [7, 90, 2]


@pytest.mark.parametrize("name", ["bull", "horned_cow"])
def test_lvis_names_and_first_synonyms(register_categories, name):
    categories = [{"id": 1, "name": "bull", "synonyms": ["horned_cow", "bull"]}, {"id": 2, "name": "cow"}]
    register_categories(categories, thing_classes=[name, "cow"])
    assert category_ids(NAME).tolist() == [1, 2]


def test_ids_without_annotation_file(tmp_path):
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(thing_classes=["dog", "bowl"])
    try:
        assert category_ids(NAME).tolist() == [0, 1]
        MetadataCatalog.get(NAME).set(thing_dataset_id_to_contiguous_id={5: 1, 9: 0})
        assert category_ids(NAME).tolist() == [9, 5]
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


@pytest.mark.parametrize(
    ("ids", "mapping", "message"),
    [
        ({"dog": 1, "bowl": 2, "cap": 3}, None, "category 3 is 'cap', but 'cup' in metadata; is it the right file"),
        ({"dog": 1, "cup": 2, "bowl": 3}, None, "category 2 is 'cup', but 'bowl' in metadata"),
        ({"dog": 1, "bowl": 2, "cup": 3, "hat": 4}, None, "category 4 is 'hat', but 'no class' in metadata"),
        ({"dog": 1, "bowl": 2}, None, "1 of 3 classes have no category, the first is 'cup'"),
        ({"dog": 1, "bowl": 2, "cup": 3}, {1: 0, 2: 1}, "1 of 3 classes have no category, the first is 'cup'"),
        ({"dog": 1, "bowl": 2, "cup": 3}, {1: 1, 2: 0, 3: 2}, "category 1 is 'dog', but 'bowl' in metadata"),
    ],
)
def test_mismatched_names_are_refused(register_categories, ids, mapping, message):
    more = {} if mapping is None else {"thing_dataset_id_to_contiguous_id": mapping}
    register_categories(entries(**ids), thing_classes=["dog", "bowl", "cup"], **more)
    cfg = tiny_config()
    for function in (lambda: dataset_vocabulary(cfg, NAME), lambda: open_training_images(cfg, NAME)):
        with pytest.raises(ValueError, match=f"data set 'test_categories', annotations .*: {message}"):
            function()


def test_two_categories_of_one_class_are_refused(register_categories):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]
    register_categories(categories, thing_classes=["dog"], thing_dataset_id_to_contiguous_id={1: 0, 2: 0})
    with pytest.raises(ValueError, match="class 'dog' has two categories, 1 and 2"):
        category_ids(NAME)


def test_changed_annotation_file_is_refused(tmp_path, register):
    path = write_dataset(tmp_path, 2)
    register(NAME, path, tmp_path / "images")
    DatasetCatalog.get(NAME)
    path.write_text(path.read_text().replace("green disc", "green ball"))
    with pytest.raises(ValueError, match="category 1 is 'green ball', but 'green disc' in metadata"):
        DatasetCatalog.get(NAME)


def test_class_without_an_id_is_named():
    DatasetCatalog.register(NAME, list)
    try:
        MetadataCatalog.get(NAME).set(thing_classes=["dog", "cup"], thing_dataset_id_to_contiguous_id={3: 0})
        with pytest.raises(ValueError, match="class 'cup' has no id in the metadata"):
            category_ids(NAME)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
