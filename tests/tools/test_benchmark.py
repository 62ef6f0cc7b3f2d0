"""Every benchmark at tiny size: its figures, and that the plain way computes the same as ours."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes
from pycocotools import mask as mask_utils

from regionspot.config import load_config
from regionspot.structures import Prompts
from tools.benchmarks import evaluation, fixed, report, suite
from tools.benchmarks.__main__ import COMMANDS
from tools.benchmarks.data import DATASET
from tools.benchmarks.measure import GIGA, Measurement, Meter, count_flops, measure_peak_flops
from tools.benchmarks.model import SIZE, Models, random_boxes
from tools.benchmarks.plain import PlainRecognizer, encode_names
from tools.benchmarks.table import Table, to_cells
from tools.benchmarks.train import PlainTraining, random_batch

from ..helpers import ROOT, TINY, tiny_config, tiny_model

CPU = torch.device("cpu")
FEW = ["TEST.DETECTIONS_PER_IMAGE", "6"]  # detections, each of which the plain way encodes


def run(directory: Path, name: str, *arguments: object) -> dict:
    """Run a benchmark at tiny size; return the JSON file, whose figures must be those that are printed."""
    path = directory / "figures.json"
    *options, overrides = arguments
    call = [name, *options, "--repeats", 1, "--json", path, "--config-file", TINY, *overrides]
    content = COMMANDS[name].call(*call[1:])
    assert json.loads(path.read_text()) == content
    machine = content["machine"]
    assert machine["device"] == "cpu" and machine["torch"] == torch.__version__ and machine["name"]
    assert content["peak_flops"] > 1e8 and content["precision"] == "float32"
    assert content["command"].startswith(f"python -m tools.benchmarks {name} ") and "--json" not in content["command"]
    return content


def check_row(row: dict, number: float) -> None:
    """Check what all measured rows have: ``number`` is of units in an image."""
    assert 0 < row["seconds"] < 60 and row["per_second"] == pytest.approx(number / row["seconds"])
    assert 0 < row["total_gigabytes"] < 50
    if "plain_seconds" in row:
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert row["plain_per_second"] == pytest.approx(number / row["plain_seconds"])
        assert 0 <= row["plain_gigabytes"] < row["plain_total_gigabytes"] < 50


def test_model_times_every_stage(tmp_path):
    sizes = ["--batch", 2, "--boxes", 1, 3, "--names", 4, 7, "--plain-boxes", 1, "--whole", 3]
    content = run(tmp_path, "model", *sizes, FEW)
    rows = {row["part"]: row for row in content["rows"]}
    stages = ["tokens", "tokens, masks", "4 names", "7 names", "masks to RLE", "embedded image to result"]
    boxes = [f"{name}: {stage}" for name in ("1 box", "3 boxes") for stage in stages]
    assert list(rows) == ["SAM image encoder", "CLIP image encoder", *boxes, "3 boxes: image to result"]
    assert content["batch"] == 2
    for part, row in rows.items():
        check_row(row, 3 if part.startswith("3 boxes") else 1)
        assert row["unit"] == ("regions" if "box" in part else "images")
        assert ("ratio" in row) == (not part.startswith("3 boxes") or part == "3 boxes: image to result")
        assert row["peak_share"] == pytest.approx(row["flops"] / row["seconds"] / content["peak_flops"])
    assert rows["3 boxes: 7 names"]["flops"] > rows["1 box: 7 names"]["flops"]
    models = Models.from_config(tiny_config())
    features = models.recognizer.encode_images([torch.zeros(3, *SIZE)] * 2)
    tokens = partial(models.recognizer.locate, features, [Prompts(boxes=random_boxes(3))] * 2)
    assert rows["3 boxes: tokens"]["flops"] == pytest.approx(count_flops(tokens) / 2)


def test_text_times_embeddings(tmp_path):
    rows = run(tmp_path, "text", "--names", 2, [])["rows"]
    for row, number in zip(rows, (2, 2, 1203), strict=True):
        check_row(row, number)
    assert "ratio" in rows[0]


@pytest.mark.parametrize("options", [(), ("--maps",)], ids=["CLIP", "maps"])
def test_train_times_loader_step_and_trainer(tmp_path, options):
    sizes = ["--images", 8, "--workers", 1, "--steps", 2, "--warm-up", 1]
    content = run(tmp_path, "train", *sizes, *options, ["SOLVER.IMS_PER_BATCH", "2"])
    loader, step, trainer = content["rows"]
    assert content["batch"] == 2 and content["training_precision"] == "float32"
    check_row(step, 1)
    check_row(trainer, 1)
    assert step["flops"] == trainer["flops"] > 0 and loader["per_second"] > 0
    assert 0 <= trainer["data_share"] < 1


def test_extract_times_the_whole_and_its_stages(tmp_path):
    sizes = ["--images", 3, "--boxes", 2, "--batch", 2, "--plain-images", 1]
    whole, *stages = run(tmp_path, "extract", *sizes, [])["rows"]
    check_row(whole, 1)
    assert whole["part"] == "2 boxes an image, batches of 2, 0 workers" and whole["flops"] > 0
    assert sum(stage["share"] for stage in stages) == pytest.approx(1) and all(stage["share"] > 0 for stage in stages)


def test_proposals_are_compared_with_the_generator(tmp_path):
    rows = run(tmp_path, "proposals", "--points", 4, "--kept", 30, 100, [])["rows"]
    for row in rows:
        check_row(row, 16)
        assert row["same_boxes"] and row["boxes"] == row["plain_boxes"] and row["ratio"] > 0
    assert 0 < rows[0]["boxes"] < rows[1]["boxes"]
    headers, cells = to_cells(rows)
    assert cells[1][headers.index("boxes")] == f"{rows[1]['boxes']}, the same"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("model", "--boxes 0", "--boxes: expected a number of at least 1, got '0'"),
        ("model", "--boxes 1 2 --whole 3", "--whole: expected some of the numbers of --boxes, [1, 2]; got [3]"),
        ("proposals", "--kept 15 101", "--kept: expected percentages, at most 100; got 101"),
        ("extract", "--images 3 --plain-images 4", "--plain-images: expected at most 3, the number of images; got 4"),
    ],
)
def test_wrong_numbers_are_refused(capsys, name, words, message):
    with pytest.raises(SystemExit):
        COMMANDS[name].parse_arguments([*words.split(), "--config-file", "never-read.yaml"])
    assert message in capsys.readouterr().err


@torch.no_grad()
def test_plain_way_computes_the_same():
    cfg = tiny_config(*FEW)
    recognizer = tiny_model(*FEW).recognizer
    plain = PlainRecognizer(cfg, recognizer)
    image, boxes = torch.randint(256, (3, *SIZE), dtype=torch.uint8), random_boxes(5)
    features = recognizer.encode_images([image])
    [located] = recognizer.locate(features, [Prompts(boxes=boxes)], with_masks=True)
    [logits] = recognizer.classify([located.tokens], features.feature_map)

    embedding, feature_map = plain.embed(image), plain.map_features([image])
    tokens, mask_logits = plain.decode(embedding, boxes, SIZE)
    [plain_logits] = plain.logits(tokens[None], feature_map, recognizer.classifier.embeddings)
    pairs = [(features.embeddings, embedding), (features.feature_map, feature_map), (located.tokens, tokens)]
    for ours_, plain_ in [*pairs, (located.masks, mask_logits[:, 0]), (logits, plain_logits)]:
        torch.testing.assert_close(ours_, plain_, atol=1e-4, rtol=1e-4)

    [detections] = recognizer([image], [Boxes(boxes)], masks="rle")
    results = plain(image, boxes, recognizer.classifier.embeddings)
    masks, plain_masks = detections.pred_masks_rle, [entry["segmentation"] for entry in results]
    for rle, plain_rle in zip(masks, plain_masks, strict=True):  # a logit may be on the threshold
        assert mask_utils.iou([rle], [plain_rle], [0]) > 0.9995
    assert len({rle["counts"] for rle in plain_masks}) > 1
    assert [entry["category_id"] for entry in results] == detections.pred_classes.tolist()
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in results]), detections.scores)
    record = {"image": plain._resize(image), "original_size": SIZE}
    record["boxes"] = plain.transform.apply_boxes_torch(boxes, SIZE)
    [forward] = plain.sam([record], multimask_output=False)
    assert torch.equal(forward["masks"], plain.full_masks(mask_logits, SIZE))


def test_plain_training_has_the_same_loss():
    no_dropout = ("MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)
    cfg, model = tiny_config(*no_dropout), tiny_model(*no_dropout)
    model.set_vocabulary([str(i) for i in range(365)], DATASET)
    for maps in (None, (17, 64)):
        batch = random_batch(model.recognizer, 3, 32, maps)
        plain = PlainTraining(cfg, model.recognizer, batch)
        before = model.train()(batch)["loss_cls"].item()
        assert plain.step() == pytest.approx(before, rel=1e-5)
        assert plain.loss().item() != pytest.approx(before, rel=1e-5)  # it has learned
        assert model(batch)["loss_cls"].item() == before  # ours has not


def test_plain_text_embeddings_are_the_same():
    encoder = tiny_model(names=None).recognizer.classifier.text_encoder
    names = ["red cup", "zebra"]
    with torch.no_grad():
        plain = encode_names(encoder.vision_language.clip_model, encoder.templates, names)
    torch.testing.assert_close(encoder.encode(names), plain, atol=1e-5, rtol=1e-5)


def test_plain_way_stays_in_float32():
    for precision, is_shared in (("float32", True), ("bf16", False)):
        models = Models.from_config(tiny_config("MODEL.REGIONSPOT.PRECISION", precision))
        assert {x.dtype for x in models.plain.parameters()} == {torch.float32}
        own, plain = models.plain.unshared_bytes(models.recognizer)
        assert (max(own, plain) < 1000) if is_shared else (1e5 < own < plain)  # bytes


def test_plain_way_refuses_other_methods():
    cfg = tiny_config("MODEL.REGIONSPOT.CLIP.FEATURES", "feature_map")
    with pytest.raises(ValueError, match="CLIP.FEATURES: the benchmark's plain way is the released method"):
        Models.from_config(cfg)


class _KnownMeter(Meter):
    """Takes calls for measurements."""

    def measure(self, function, is_counted=False):
        return function()


def test_table_is_for_one_image(capsys):
    table = Table(_KnownMeter(CPU), 4, torch.float32)
    table.own_bytes, table.plain_bytes = GIGA, 2 * GIGA
    measured, plain = Measurement(2.0, GIGA, 5 * GIGA, 800), Measurement(6.0, 3 * GIGA, 9 * GIGA)
    table.add("part", lambda: measured, lambda: plain, "regions", 10, plain_batch=2)
    assert table.rows == [
        {
            **{"part": "part", "unit": "regions", "seconds": 0.5, "per_second": 20.0},
            **{"gigabytes": 1.0, "total_gigabytes": 3.0, "flops": 200.0},
            **{"plain_seconds": 3.0, "plain_per_second": 10 / 3, "plain_gigabytes": 3.0, "plain_total_gigabytes": 8.0},
            **{"ratio": pytest.approx(6.0)},
        }
    ]
    assert capsys.readouterr().out.startswith("part ")


def test_table_notes_that_memory_was_short():
    def run_out() -> None:
        raise torch.OutOfMemoryError

    table = Table(_KnownMeter(CPU), 1, torch.float32)
    assert table.add("part", lambda: Measurement(2.0, 1, 1), run_out) is None
    headers, [cells] = to_cells(table.rows)
    assert cells[headers.index("plain: time")] == "out of memory" and "times as fast" not in headers


def test_meter_sees_memory_and_operations():
    meter = Meter(CPU, repeats=8)  # of which memory must not be the sum
    calls = []

    def allocate():
        calls.append(len(torch.ones(GIGA // 2, dtype=torch.uint8)))

    measured = meter.measure(allocate)
    # a system that takes unused memory back counts some of the process's own as new
    assert len(calls) == 8 and 0.9 * GIGA / 2 < measured.added < 4 * GIGA / 2 < 2 * measured.total
    assert measured.flops == 0 and 0 < measured.seconds < 10
    query = torch.randn(2, 3, 8, 4)
    with torch.no_grad():
        attend = partial(torch.nn.functional.scaled_dot_product_attention, query, query, query)
        assert count_flops(attend) == 2 * 2 * (2 * 3) * 8 * 8 * 4
    assert meter.measure(lambda: torch.ones(2, 3) @ torch.ones(3, 4), is_counted=True).flops == 2 * 2 * 3 * 4
    assert 1e8 < measure_peak_flops(meter, torch.float32) < 1e14


def example(name: str = "model", device: str = "cpu", part: str = "step") -> dict:
    machine = {"device": device, "torch": "2", "name": "processor", "cores": 2, "threads": 1, "bf16": True}
    row = {"part": part, "unit": "images", "seconds": 0.5, "per_second": 2.0, "flops": 1e9}
    fields = {"benchmark": name, "command": "python -m tools.benchmarks", "machine": machine, "rows": [row]}
    return fields | {"batch": 1, "precision": "float32", "peak_flops": 1e12}


def test_report_replaces_tables_alone(tmp_path):
    document, files = tmp_path / "guide.md", []
    other = "\n<!-- benchmark:model-cuda -->\nnot here\n<!-- /benchmark -->\nafter\n"
    document.write_text(f"before\n<!-- benchmark:model-cpu -->\nold\n<!-- /benchmark -->{other}")
    for part in ("first", "second"):
        files.append(tmp_path / f"{part}.json")
        files[-1].write_text(json.dumps(example(part=part)))
    for _ in range(2):  # the second time nothing changes
        report.write_tables(document, files)
        text = document.read_text()
        assert text.startswith("before\n<!-- benchmark:model-cpu -->\n") and text.endswith(
            f"<!-- /benchmark -->{other}"
        )
        assert "old" not in text and text.index("first") < text.index("second") and text.count("| 500 ms |") == 2
    assert "processor, 2 cores with bf16 instructions, 1 threads, PyTorch 2, frozen parts in float32" in text


@pytest.mark.parametrize(
    "text",
    [
        "no table",
        "<!-- benchmark:model-cpu -->\n",
        "<!-- benchmark:model-cpu -->\n<!-- benchmark:text-cpu -->\n<!-- /benchmark -->",
        2 * "<!-- benchmark:model-cpu -->\n<!-- /benchmark -->\n",
    ],
    ids=["none", "no end", "end of another", "twice"],
)
def test_report_names_a_missing_marker(tmp_path, text):
    document, path = tmp_path / "guide.md", tmp_path / "figures.json"
    document.write_text(text)
    path.write_text(json.dumps(example()))
    with pytest.raises(ValueError, match="guide.md: expected the line <!-- benchmark:model-cpu --> once"):
        report.write_tables(document, [path])
    assert document.read_text() == text


def test_report_refuses_other_files(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="other.json: expected what `python -m tools.benchmarks"):
        report.write_tables(tmp_path / "guide.md", [path])


def test_suite_writes_its_tables_into_the_guide(tmp_path):
    document = tmp_path / "guide.md"
    document.write_text("<!-- benchmark:text-cpu -->\n<!-- /benchmark -->\n")
    commands = [f"text --names 1 --repeats 1 --config-file {TINY}"]
    suite.run_suite(commands, tmp_path / "output", document, lambda words: COMMANDS[words[0]].call(*words[1:]))
    assert "text embeddings of 1 names" in document.read_text()
    assert json.loads((tmp_path / "output" / "1-text.json").read_text())["command"] in document.read_text()


@pytest.mark.parametrize("device", suite.SUITES)
def test_suite_has_valid_commands_and_markers(device):
    guide = (ROOT / "docs" / "performance.md").read_text()
    for command in suite.SUITES[device]:
        name, *words = command.split()
        args = COMMANDS[name].parse_arguments(words)
        load_config(ROOT / args.config_file, args.opts)
        guide = report.replace_section(guide, f"{name}-{device}", "", "docs/performance.md")


def test_masks_of_both_ways_are_the_same():
    """It raises where they differ."""
    row = evaluation.benchmark_masks(boxes=2, detections=5)
    seconds = [float(row[column].removesuffix(" s")) for column in (1, 3)]
    assert all(0 <= value < 60 for value in seconds)
    assert row[0].startswith("masks of 5 detections of 2 boxes") and len(row) == len(evaluation.HEADERS)


def test_fixed_ap_is_measured_from_logits_to_metrics(tmp_path):
    headers, rows = fixed.benchmark_fixed(tmp_path, images=8, boxes=5, classes=20)
    assert [row[0] for row in rows][-2:] == ["8 images, 800 detections", "metrics"]
    assert all(len(row) == len(headers) for row in rows)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bbox"]["AP"] >= 0


def test_index_is_searched_and_named(capsys):
    rows = COMMANDS["index"].call("--regions", 3000, "--dim", 8, "--names", 5, "--repeats", 1)
    assert list(rows) == ["open", "search, 1 query", "search, 100 queries", "classify, 5 names"]
    assert all(0 < row["seconds"] < 60 and 0 <= row["gigabytes"] < 1 for row in rows.values())
    assert "3,000 regions of 8 numbers" in capsys.readouterr().out
