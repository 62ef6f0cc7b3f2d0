import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from regionspot.index import RegionIndex
from regionspot_cli.commands import COMMANDS

from ..helpers import TINY, draw_scene, frozen_overrides, released_state, write_user_files

AUDIT = ["--annotations", "my.json", "--images", "my_images", "--config-file", "a.yaml", "--output", "audit"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("find")
    model = write_user_files(directory)
    torch.save({"model": released_state(model)}, directory / "model.pth")
    Image.fromarray(draw_scene(0)[0]).save(directory / "cup.png")
    overrides = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    data = f"{directory}/my.json:{directory}/my_images"
    COMMANDS["index"].call("--input", data, "--config-file", TINY, "--output", directory / "index", *overrides)
    return directory


def read_csv(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_index_needs_no_config_file_later(directory, capsys):
    box = draw_scene(0)[1][1]
    region = f"{directory}/my_images/0.png:{','.join(str(x) for x in box)}"
    output = directory / "search"
    COMMANDS["search"].call("--index", directory / "index", "--region", region, "--top-k", 4, "--output", output)
    rows = read_csv(output / "regions.csv")
    assert len(rows) == 4 and [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["image"] == "0.png" and [float(rows[0][x]) for x in ("x0", "y0", "x1", "y1")] == box.tolist()
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    assert np.asarray(Image.open(output / "sheet.png")).std() > 10
    assert "   1  " in capsys.readouterr().out
    COMMANDS["search"].call(
        "--index", directory / "index", "--text", "red square", "--text", "a disc", "--image", directory / "cup.png"
    )
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_index_opens_from_another_directory(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cup\n")
    (tmp_path / "index").mkdir()
    overrides = ["MODEL.WEIGHTS", directory / "model.pth", "MODEL.REGIONSPOT.VOCABULARY", "@names.txt"]
    data = f"{directory}/my.json:{directory}/my_images"
    options = ["--config-file", TINY, "--output", "index", *frozen_overrides(directory), *overrides]
    COMMANDS["index"].call("--input", data, *options)
    monkeypatch.chdir(directory)
    search = ["--index", tmp_path / "index", "--text", "cup", "--output", tmp_path / "search"]
    COMMANDS["search"].call(*search)
    config = tmp_path / "index" / "config.yaml"
    text = config.read_text()
    assert "SOURCE: gt" in text and "VOCABULARY: ''" in text
    config.write_text(text.replace(" VOCABULARY: ''", " VOCABULARY: '@none.txt'"))  # as older indexes have it
    COMMANDS["search"].call(*search)
    assert (tmp_path / "search" / "regions.csv").is_file()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_classify_writes_a_table(directory, suffix, capsys):
    path, counts = directory / f"names.{suffix}", directory / "counts.csv"
    names = "red square,green disc,blue square"
    COMMANDS["classify-index"].call(
        *("--index", directory / "index", "--vocabulary", names), "--top-k", 2, "--output", path, "--counts", counts
    )
    if suffix == "csv":
        rows = read_csv(path)
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = parquet.read_table(path).to_pylist()
    index = RegionIndex(directory / "index")
    assert len(rows) == len(index)
    for row, region in zip(rows, index.regions(range(len(index)))):
        assert row["image"] == region.image and int(row["region"]) == region.row
        assert float(row["x1"]) == region.box[2] and row["name"] in names and row["name_2"] != row["name"]
        assert 1 >= float(row["score"]) >= float(row["score_2"]) >= 0
    total = sum(int(row["regions"]) for row in read_csv(counts))
    assert total == len(index) and f"{len(index)} regions of 3 names in" in capsys.readouterr().out


def test_index_of_other_weights_is_refused(directory):
    with pytest.raises(ValueError, match="region index .* is of another sam: expected .*model.pth"):
        COMMANDS["search"].call("--index", directory / "index", "--text", "cup", "MODEL.WEIGHTS", "")


def test_index_of_files_with_boxes_of_a_file(directory):
    """Boxes of a labeling tool, by the images' names; an image that the file lacks costs a line."""
    boxes = {f"{i}.png": draw_scene(i)[1].tolist() for i in range(3)}
    (directory / "boxes.json").write_text(json.dumps(boxes))
    weights = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    images = [directory / "my_images" / f"{i}.png" for i in range(4)]
    output = directory / "index_of_boxes"
    options = ["--regions", directory / "boxes.json", "--config-file", TINY, "--output", output]
    COMMANDS["index"].call("--input", *images, *options, *weights)
    index = RegionIndex(output)
    assert len(index) == sum(map(len, boxes.values())) and index.left_out() == ["3.png: it has no regions in the file"]
    for region in index.regions(range(len(index))):
        assert region.box.tolist() in boxes[region.image]


def test_gt_without_a_data_set_is_refused(directory):
    with pytest.raises(ValueError, match="--regions gt: expected a data set as --input"):
        COMMANDS["index"].call(
            *("--input", directory / "cup.png", "--regions", "gt"),
            *("--config-file", TINY, "--output", directory / "none"),
        )


def test_verify(directory, capsys):
    assert COMMANDS["index"].call("--verify", directory / "index") == 0
    assert "regions of 8 images, all as written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("index", ["--input", "photos", "--config-file", "a.yaml"], "expected --input, --config-file and --output, or"),
        ("search", ["--index", "index"], "expected --text, --image or --region"),
        (
            "classify-index",
            ["--index", "index", "--vocabulary", "a", "--output", "a.xlsx"],
            "expected one of the suffixes .csv",
        ),
        ("audit", [*AUDIT, "--worst", "-1"], "--worst: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_end_at_once(name, arguments, message, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name].parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_audit_writes_three_files(directory, capsys):
    overrides = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    files = ["--annotations", directory / "audited.json", "--images", directory / "my_images"]
    content = json.loads((directory / "my.json").read_text())
    ids = [category["id"] for category in content["categories"]]
    for number in ids[:2]:  # the second time a label is corrected, and the index is there
        content["annotations"][0]["category_id"] = number
        (directory / "audited.json").write_text(json.dumps(content))
        COMMANDS["audit"].call(*files, "--config-file", TINY, "--output", directory / "audit", "--top-k", 5, *overrides)
    assert len(read_csv(directory / "audit" / "suspicious.csv")) == 5
    assert len(json.loads((directory / "audit" / "suspicious.json").read_text())["annotations"]) == 5
    assert (directory / "audit" / "audit.html").stat().st_size > 10_000
    assert "labels are suspicious, 0 images left out" in capsys.readouterr().out


def test_audit_of_one_class_ends_before_the_index(directory, tmp_path):
    content = json.loads((directory / "my.json").read_text())
    first = content["categories"][0]["id"]
    content["categories"] = content["categories"][:1]
    content["annotations"] = [x for x in content["annotations"] if x["category_id"] == first]
    (tmp_path / "one.json").write_text(json.dumps(content))
    files = ["--annotations", tmp_path / "one.json", "--images", directory / "my_images"]
    with pytest.raises(ValueError, match=r"one.json: expected at least two categories, got 1"):
        COMMANDS["audit"].call(*files, "--config-file", TINY, "--output", tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_reference_without_regions_is_refused(directory, tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps({"cup.png": []}))
    (tmp_path / "names.json").write_text(
        json.dumps([{"name": "mine", "examples": [{"image": f"{directory}/cup.png"}]}])
    )
    overrides = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    options = ["--regions", tmp_path / "boxes.json", "--config-file", TINY, "--output", tmp_path / "index"]
    COMMANDS["index"].call("--input", directory / "cup.png", *options, *overrides)
    embed = ["--vocabulary", tmp_path / "names.json", "--config-file", TINY, "--reference", tmp_path / "index"]
    with pytest.raises(ValueError, match=r"--reference .*: expected an index of many regions, got 0"):
        COMMANDS["vocabulary"].call("embed", *embed, "--output", tmp_path / "names.safetensors", *overrides)


def test_embedded_vocabulary_in_all_commands(directory, capsys):
    box = draw_scene(0)[1][0].tolist()
    entries = ["red square", {"name": "mine", "examples": [{"image": "cup.png", "box": box}]}]
    (directory / "names.json").write_text(json.dumps(entries))
    overrides = [*frozen_overrides(directory), "MODEL.WEIGHTS", directory / "model.pth"]
    path = directory / "names.safetensors"
    config = ["--config-file", TINY]
    COMMANDS["vocabulary"].call(
        *["embed", "--vocabulary", directory / "names.json", *config, "--output", path],
        *["--reference", directory / "index", *overrides],
    )
    assert "2 names of 32 numbers each" in capsys.readouterr().out
    for source in (path, directory / "names.json"):
        output = directory / "mine.csv"
        COMMANDS["classify-index"].call(
            "--index", directory / "index", "--vocabulary", f"@{source}", "--output", output
        )
        assert {row["name"] for row in read_csv(output)} <= {"red square", "mine"}
    boxes = ";".join(",".join(map(str, row)) for row in draw_scene(0)[1].tolist())
    COMMANDS["predict"].call(
        *[*config, "--input", directory / "cup.png", "--boxes", boxes, "--vocabulary", f"@{path}"],
        *["--output", directory / "predicted", *overrides],
    )
    assert (directory / "predicted" / "cup.json").is_file()
