"""Where regions come from and what runs write: the numbers are those of evaluation, and the same in all files."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from detectron2.data import DatasetCatalog

from regionspot.data.coco_io import read_results
from regionspot.data.proposals import ProposalArrays, write_proposals
from regionspot_cli.commands import COMMANDS

from ..helpers import (
    NAMES,
    TINY,
    as_inputs,
    frozen_overrides,
    spread_tokens,
    tiny_model,
    write_dataset,
    write_frozen_parts,
)

IMAGE_IDS = (40, 7, 99, 12, 3, 1000)  # with gaps, not sorted
AUTOMATIC = "MODEL.REGIONSPOT.PROPOSALS.SAM_AUTOMATIC."
LOOSE = [f"{AUTOMATIC}POINTS_PER_SIDE", "4", f"{AUTOMATIC}PRED_IOU_THRESH", "-1.0"]
LOOSE += [f"{AUTOMATIC}STABILITY_SCORE_THRESH", "0.0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set with gaps in its ids, and a model whose regions have several classes."""
    directory = tmp_path_factory.mktemp("world")
    model = tiny_model()
    torch.manual_seed(1)
    spread_tokens(model.recognizer, as_inputs(0))
    write_frozen_parts(model.recognizer, directory)
    torch.save({"model": model.state_dict()}, directory / "model.pth")
    path = write_dataset(directory / "data", num_scenes=6)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = IMAGE_IDS[image["id"] - 1]
    for annotation in content["annotations"]:
        annotation["image_id"] = IMAGE_IDS[annotation["image_id"] - 1]
    path.write_text(json.dumps(content))
    return directory


def predict(directory, output, *options):
    overrides = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    split = options.index("MODEL") if "MODEL" in options else len(options)
    COMMANDS["predict"].call(
        *(
            "--config-file",
            TINY,
            "--output",
            output,
            "--workers",
            0,
            *options[:split],
            *overrides,
            *options[split + 1 :],
        )
    )
    return output


def dataset(directory):
    return f"{directory}/data/annotations.json:{directory}/data/images"


def regions(output):
    """Return boxes and labels of the JSON of each image."""
    contents = {path.stem: json.loads(path.read_text())["regions"] for path in output.glob("?.json")}
    return {stem: [(tuple(x["box"]), x["label"]) for x in content] for stem, content in contents.items()}


@pytest.fixture(scope="module")
def whole(world):
    """All outputs of the data set's own boxes."""
    output = world / "whole"
    formats = "drawing,json,results,coco,labelme,yolo,crops,csv,parquet"
    return predict(world, output, "--input", dataset(world), "--regions", "gt", "--format", formats, "--embeddings")


def test_results_have_the_numbers_of_evaluation(world, whole):
    options = ["MODEL.REGIONSPOT.LABELS_PER_BOX", "1", "DATASETS.TEST", f"('{dataset(world)}',)"]
    overrides = [*frozen_overrides(world), "MODEL.WEIGHTS", world / "model.pth", "OUTPUT_DIR", world / "evaluated"]
    COMMANDS["evaluate"].call("--config-file", TINY, *overrides, *options, "MODEL.MASK_ON", "True")
    [expected] = (world / "evaluated").rglob("metrics.json")
    COMMANDS["evaluate-predictions"].call(
        *("--annotations", world / "data" / "annotations.json", "--predictions", whole / "results.json"),
        *("--output", world / "of_results"),
    )
    metrics = json.loads((world / "of_results" / "metrics.json").read_text())
    expected = json.loads(expected.read_text())
    assert metrics["bbox"]["AP"] > 5 and metrics["segm"].keys() == expected["segm"].keys()
    for task in ("bbox", "segm"):
        for name, value in metrics[task].items():
            assert value == pytest.approx(expected[task][name], abs=1e-9, nan_ok=True), (task, name)


def test_tables_equal_results(whole):
    results = read_results(whole / "results.json")
    with (whole / "regions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(whole / "regions.parquet").to_pylist()
    assert len(rows) == len(table) == len(results.scores) > 12
    categories = dict(zip(NAMES, (3, 1, 10, 7)))
    for row, parquet_row, image_id, category, score, box in zip(
        rows, table, results.image_ids, results.category_ids, results.scores, results.boxes
    ):
        assert int(row["image_id"]) == parquet_row["image_id"] == image_id and row["image"] == parquet_row["image"]
        assert row["label"] == parquet_row["label"] and categories[row["label"]] == category
        assert float(row["detection_score"]) == score == pytest.approx(parquet_row["detection_score"])
        corners = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
        assert corners == [parquet_row[name] for name in ("x0", "y0", "x1", "y1")]
        assert [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]] == box.tolist()
        assert np.linalg.norm(parquet_row["embedding"]) == pytest.approx(1, abs=1e-5)
    assert len({row["label"] for row in rows}) > 1


def test_every_output_is_written(whole):
    for stem in "012345":
        assert (whole / f"{stem}.png").is_file() and (whole / "labelme" / f"{stem}.json").is_file()
        assert (whole / "yolo" / "labels" / f"{stem}.txt").is_file()
    assert (whole / "yolo" / "data.yaml").is_file()
    number = sum(map(len, regions(whole).values()))
    assert len(list((whole / "crops").rglob("*.png"))) == number
    content = json.loads((whole / "annotations.json").read_text())
    assert [image["id"] for image in content["images"]] == list(IMAGE_IDS) and len(content["annotations"]) == number
    first = json.loads((whole / "0.json").read_text())["regions"][0]
    assert list(first)[-1] == "embedding" and len(first["embedding"]) == 32


def test_formats_of_whole_runs_can_be_added(world, tmp_path, monkeypatch):
    arguments = ("--input", dataset(world), "--regions", "gt", "--format")
    predict(world, tmp_path / "out", *arguments, "results")
    expected = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr("regionspot_cli.predict.RegionBatchPredictor", None)  # no model is built
    monkeypatch.setattr("regionspot.prediction.parts.FEW_IMAGES", 0)
    predict(world, tmp_path / "out", *arguments, "results,csv")
    assert (tmp_path / "out" / "regions.csv").is_file()
    assert (tmp_path / "out" / "results.json").read_bytes() == expected
    with pytest.raises(ValueError, match="formats was"):
        predict(world, tmp_path / "out", *arguments, "results,json")


@pytest.mark.parametrize("kind", ["coco", "labelme", "yolo", "predictions", "proposals", "results"])
def test_regions_come_from_files_of_every_format(world, whole, tmp_path, kind):
    paths = {
        "coco": world / "data" / "annotations.json",
        "labelme": whole / "labelme",
        "yolo": whole / "yolo" / "labels",
    }
    paths |= {"predictions": tmp_path / "predictions", "proposals": tmp_path / "p.safetensors"}
    paths |= {"results": whole / "results.json"}
    paths["predictions"].mkdir()
    for path in whole.glob("?.json"):
        (paths["predictions"] / path.name).write_bytes(path.read_bytes())
    if kind == "proposals":
        write_gt_proposals(paths[kind], dataset(world))
    is_by_id = kind in ("proposals", "results")
    images = dataset(world) if is_by_id else world / "data" / "images"
    output = predict(
        world, tmp_path / "out", "--input", images, "--regions", paths[kind], "--vocabulary", ",".join(NAMES)
    )
    got, expected = regions(output), regions(whole)
    assert got.keys() == expected.keys()
    for stem, content in expected.items():
        got_boxes, boxes = np.array([box for box, _ in got[stem]]), np.array([box for box, _ in content])
        np.testing.assert_allclose(got_boxes, boxes, atol=2e-3)
        assert [label for _, label in got[stem]] == [label for _, label in content]


def write_gt_proposals(path, name):
    records = sorted(DatasetCatalog.get(name), key=lambda record: record["image_id"])
    boxes = [np.array([x["bbox"] for x in record["annotations"]], np.float32) for record in records]
    boxes = [np.concatenate([x[:, :2], x[:, :2] + x[:, 2:]], axis=1) for x in boxes]
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in boxes])])
    ids = np.array([record["image_id"] for record in records])
    scores = np.full(offsets[-1], 0.5, np.float32)
    write_proposals(path, "safetensors", ProposalArrays(ids, offsets, np.concatenate(boxes), scores, None))


def test_regions_of_another_set_are_refused(world, tmp_path):
    arrays = ProposalArrays(np.array([5]), np.array([0, 1]), np.array([[0, 0, 9, 9]], np.float32), None, None)
    write_proposals(tmp_path / "p.safetensors", "safetensors", arrays)
    with pytest.raises(ValueError, match="none of the 6 images"):
        predict(world, tmp_path / "out", "--input", dataset(world), "--regions", tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="expected a data set as --input"):
        predict(world, tmp_path / "out", "--input", world / "data" / "images", "--regions", "gt", "--vocabulary", "a")


def test_everything_is_named_by_default(world, tmp_path):
    image = world / "data" / "images" / "0.png"
    arguments = ("--input", image, "--vocabulary", ",".join(NAMES))
    everything = regions(predict(world, tmp_path / "all", *arguments, "MODEL", *LOOSE))["0"]
    assert len(everything) > 5 and {label for _, label in everything} <= set(NAMES)
    by_flag = regions(predict(world, tmp_path / "sam", *arguments, "--regions", "sam", "MODEL", *LOOSE))["0"]
    assert by_flag == everything
    few = predict(world, tmp_path / "few", *arguments, "--top-k", "2", "--nms", "0.5", "MODEL", *LOOSE)
    assert len(regions(few)["0"]) == 2 and set(regions(few)["0"]) <= set(everything)


def test_names_of_classes_survive_in_files(world, tmp_path):
    names = ['wooden "spoon", large', "<b>cup</b>", "ünï/çödé", "a'b"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    formats = "json,coco,csv,parquet,labelme,yolo,crops"
    arguments = ("--input", world / "data" / "images", "--boxes", "5,5,30,30;20,10,60,40", "--format", formats)
    output = predict(world, tmp_path / "out", *arguments, "--vocabulary", f"@{tmp_path}/names.json")
    with (output / "regions.csv").open(newline="", encoding="utf-8") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert labels == pyarrow.parquet.read_table(output / "regions.parquet")["label"].to_pylist()
    assert labels == [label for _, content in sorted(regions(output).items()) for _, label in content]
    assert set(labels) <= set(names) and len(labels) == 12
    content = json.loads((output / "annotations.json").read_text())
    assert [category["name"] for category in content["categories"]] == names
