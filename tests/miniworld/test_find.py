"""Examples as names and planted errors: what the experiments count."""

import numpy as np
import pytest

from miniworld.audit import curve, plant_errors
from miniworld.categories import NAMES, NOVEL
from miniworld.examples import table, vocabularies

POOL = {label: [{"image": f"{label}-{i}.png", "box": [0, 0, 9, 9]} for i in range(25)] for label in range(120)}


def test_planted_errors_are_a_share_of_all_labels():
    categories = [{"id": i} for i in (3, 5, 9)]
    annotations = [{"id": 100 + i, "category_id": (3, 5, 9)[i % 3]} for i in range(200)]
    content, planted = plant_errors({"annotations": annotations, "categories": categories}, 0.05, seed=1)
    changed = {
        before["id"]
        for before, after in zip(annotations, content["annotations"], strict=True)
        if before["category_id"] != after["category_id"]
    }
    assert changed == planted and len(planted) == 10
    assert {x["category_id"] for x in content["annotations"]} == {3, 5, 9}


def test_precision_and_recall_of_the_first_labels():
    is_planted = np.isin(np.arange(40), [0, 1, 2, 3])
    order = np.array([0, 9, 1, 2, *[i for i in range(40) if i not in (0, 9, 1, 2)]])
    points = {n: (precision, recall) for n, precision, recall in curve(is_planted, order)}
    assert points[1] == (1, 0.25) and points[2] == (0.5, 0.25) and points[4] == (0.75, 0.75) and points[16][1] == 1


def test_vocabularies_of_the_table():
    similar = {label: (label + 1) % 120 for label in NOVEL}
    rows = vocabularies(POOL, similar, seed=0)
    assert list(rows)[0] == "name" and rows["name"] == NAMES and len(rows) == 8
    label = NOVEL[3]
    one, five = rows["1 example"][label], rows["5 examples"][label]
    assert one["name"] == NAMES[label] and "synonyms" not in one and one["examples"] == five["examples"][:1]
    assert all(x["image"].startswith(f"{label}-") for x in five["examples"]) and len(five["examples"]) == 5
    both = rows["name and 20 examples"][label]
    assert both["synonyms"] == [NAMES[label]] and len(both["examples"]) == 20
    negatives = rows["name, 5 examples, 5 negatives"][label]["negatives"]
    assert len(negatives) == 5 and all(x["image"].startswith(f"{label + 1}-") for x in negatives)
    base = next(i for i in range(120) if i not in NOVEL)
    assert all(row[base] == NAMES[base] for row in rows.values())
    assert rows["1 example"][label] != vocabularies(POOL, similar, seed=1)["1 example"][label]


def test_table_has_means_over_seeds():
    numbers = [dict.fromkeys(("novel_top1", "base_top1", "novel_of_novel"), value) for value in (0.2, 0.4)]
    assert "| name" in table([{"name": x} for x in numbers]) and "30.0 ± 10.0" in table([{"name": x} for x in numbers])


def test_too_few_examples_are_one_error(monkeypatch):
    from detectron2.data import DatasetCatalog

    from miniworld.examples import example_pool

    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [])
    with pytest.raises(ValueError, match="miniworld_val has 0 regions of .* draw more scenes: --val"):
        example_pool("miniworld_val")
