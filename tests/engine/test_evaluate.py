"""Evaluation: its protocol, resuming after kills, and boxes from all sources."""

import json
import logging
import multiprocessing
import pickle
import random
import time

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from segment_anything import SamAutomaticMaskGenerator

from regionspot.data import build_test_loader
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.evaluate import describe_protocol
from regionspot.evaluation import GroundTruth, evaluate_lvis, read_results
from regionspot.evaluation.region_evaluator import RegionEvaluator
from regionspot.evaluation.report import region_accuracy
from regionspot.modeling import RegionSpot
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.postprocessing import DetectionRule
from regionspot_cli import table as table_command
from regionspot_cli.calibrate import threshold_of
from regionspot_cli.commands import COMMANDS

from ..helpers import NAMES, TINY, draw_scene, tiny_config, tiny_model, write_dataset

NAME = "test_evaluate"


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 10), tmp_path / "data" / "images")


def config(tmp_path, *overrides):
    fixed = ["DATASETS.TEST", (NAME,), "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.MASK_ON", True]
    return tiny_config(*fixed, *overrides)


def evaluate(tmp_path, *overrides):
    cfg = config(tmp_path, *overrides)
    return RegionSpotTrainer.test(cfg, tiny_model(*overrides, "MODEL.MASK_ON", True, names=None))


def written(tmp_path, name="metrics.json"):
    return (tmp_path / "out" / "inference" / NAME / name).read_text()


def test_results_state_their_protocol(dataset, tmp_path):
    metrics = evaluate(tmp_path)
    assert list(metrics) == ["bbox", "segm", "region"] and list(metrics["bbox"])[-3:] == ["APr", "APc", "APf"]
    report = json.loads(written(tmp_path))
    assert report["bbox"] == {k: None if np.isnan(v) else v for k, v in metrics["bbox"].items()}
    for part in (
        "protocol: lvis on test_evaluate (",
        "boxes: annotated",
        "labels per box: all",
        "detections per image: 300",
        "score: product, softmax",
        "vocabulary: 4 names (",
        "templates: 1 (",
        "checkpoint: RegionSpot no file (",
        "images: 10 of 10",
    ):
        assert part in report["protocol"]
    results = read_results(tmp_path / "out" / "inference" / NAME / "lvis_instances_results.json")
    regions = sum(len(draw_scene(i)[1]) for i in range(10))
    assert len(results) == 4 * regions and len(results.rles) == regions
    rows = written(tmp_path, "per_class_bbox.csv").splitlines()
    assert len(rows) == 5 and rows[0] == "category_id,name,frequency,annotations,AP"


def test_batch_size_does_not_change_metrics(dataset, tmp_path, monkeypatch):
    overrides, batches = ("MODEL.REGIONSPOT.VOCABULARY", ",".join(NAMES)), []
    inference = RegionSpot.inference

    def record(model, batch, **options):
        batches.append(len(batch))
        return inference(model, batch, **options)

    monkeypatch.setattr(RegionSpot, "inference", record)
    one = evaluate(tmp_path / "1", *overrides)
    assert batches == [1] * 10
    several = evaluate(tmp_path / "4", *overrides, "TEST.BATCH_SIZE", 4)
    assert batches[10:] == [4, 4, 2]
    assert one.keys() == several.keys()
    for task in one:
        assert several[task] == pytest.approx(one[task], abs=1e-3, nan_ok=True)
    with pytest.raises(ValueError, match="TEST.BATCH_SIZE: expected at least 1, got 0"):
        evaluate(tmp_path / "0", *overrides, "TEST.BATCH_SIZE", 0)


def test_detectron2s_evaluator_agrees(dataset, tmp_path):
    MetadataCatalog.get(NAME).set(evaluator_type="coco")
    cfg, model = config(tmp_path), tiny_model("MODEL.MASK_ON", True, names=None)
    results = RegionSpotTrainer.test(cfg, model)
    reference = RegionSpotTrainer.test(cfg, model, [COCOEvaluator(NAME, output_dir=str(tmp_path), use_fast_impl=False)])
    for task in ("bbox", "segm"):
        for key in ("AP", "AP50", "AP75"):
            assert results[task][key] == pytest.approx(reference[task][key], abs=1e-9)


def test_protocols_fixed_coco_and_unknown(dataset, tmp_path, register):
    for protocol in ("fixed", "coco"):
        metrics = evaluate(tmp_path, "TEST.PROTOCOL", protocol)
        assert f"protocol: {protocol} on" in written(tmp_path) and ("APr" in metrics["bbox"]) == (protocol == "fixed")
    with pytest.raises(ValueError, match="TEST.PROTOCOL: expected lvis, fixed, coco or nothing, got 'fixd'"):
        evaluate(tmp_path, "TEST.PROTOCOL", "fixd")
    register("test_coco", tmp_path / "data" / "annotations.json", tmp_path / "data" / "images", "coco")
    with pytest.raises(ValueError, match="is no LVIS data set"):
        evaluate(tmp_path, "TEST.PROTOCOL", "fixed", "DATASETS.TEST", ("test_coco",))


def test_protocol_depends_on_config_and_weights(dataset, tmp_path):
    model, lines = tiny_model(), set()
    changes = [[], ["MODEL.REGIONSPOT.CROP.MASKED", True], ["INPUT.MIN_SIZE_TEST", 32], ["INPUT.FORMAT", "BGR"]]
    changes += [["MODEL.REGIONSPOT.UNKNOWN.BACKGROUND", (name,)] for name in ("sky", "wall")]
    for overrides in changes:
        lines.add(describe_protocol(config(tmp_path, *overrides), model, NAME).identity())
    assert len(lines) == len(changes)
    elsewhere = config(tmp_path, "OUTPUT_DIR", "elsewhere")
    elsewhere.MODEL.DEVICE = "cuda:1"
    assert describe_protocol(elsewhere, model, NAME).identity() in lines
    for base_names in ("", "cup", "saucer"):
        model.recognizer.ensemble = GeometricEnsemble(0.0, 0.2, frozenset(filter(None, [base_names])))
        protocol = describe_protocol(config(tmp_path), model, NAME)
        assert "geometric ensemble with exponent 0.2" in protocol.score and protocol.identity() not in lines
        lines.add(protocol.identity())
    model.recognizer.ensemble = None
    model.set_vocabulary({name: [name, "thing"] for name in NAMES})
    assert describe_protocol(config(tmp_path), model, NAME).identity() not in lines


def test_lvis_ap_is_limited_to_300_detections(dataset, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(
        "regionspot.evaluation.region_evaluator.evaluate_task", lambda *args: limits.append(args[-1]) or 1 / 0
    )
    for limit in (20, 1000, -1):
        with pytest.raises(ZeroDivisionError):
            evaluate(tmp_path, "TEST.DETECTIONS_PER_IMAGE", limit)
    assert limits == [20, 300, 300]


def test_only_boxes_without_annotated_masks(tmp_path, register, caplog):
    path = write_dataset(tmp_path / "data", 4)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    register(NAME, path, tmp_path / "data" / "images", "coco")
    metrics = evaluate(tmp_path)
    assert set(metrics) == {"bbox", "region"} and "masks are not evaluated" in caplog.text


def test_killed_evaluation_resumes_exactly(dataset, tmp_path):
    evaluate(tmp_path)
    names = ("metrics.json", "lvis_instances_results.json", "per_class_segm.csv")
    expected = [written(tmp_path, name) for name in names]
    context, rng, seen = multiprocessing.get_context("fork"), random.Random(2), []
    other = tmp_path / "killed"
    directory = other / "out" / "inference" / NAME

    def number_written():
        return sum(path.read_bytes().count(b"image_id") for path in directory.glob("predictions.*"))

    for _ in range(5):
        target = number_written() + rng.randrange(3)
        process = context.Process(target=evaluate, args=(other,))
        process.start()
        while process.is_alive() and number_written() < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()  # which may have ended by itself
        process.join()
        seen.append(number_written())
    evaluate(other)
    assert max(seen) > 0  # a run was resumed
    assert [(other / "out" / "inference" / NAME / name).read_text() for name in names] == expected
    assert not list(directory.glob("predictions.*"))


def test_finished_predictions_are_not_computed_again(dataset, tmp_path, monkeypatch):
    """The run was interrupted between its last image and the metrics."""
    evaluate(tmp_path)
    expected = written(tmp_path)
    monkeypatch.setattr("regionspot.evaluation.region_evaluator.GroundTruth", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("regionspot.modeling.meta_arch.RegionSpot.forward", lambda *_: pytest.fail("recognized again"))
    evaluate(tmp_path)
    assert written(tmp_path) == expected


def test_missing_images_are_an_error(dataset, tmp_path, monkeypatch):
    whole = build_test_loader
    monkeypatch.setattr(
        "regionspot.engine.evaluate.build_test_loader", lambda *args, **more: [*whole(*args, **more)][1:]
    )
    with pytest.raises(ValueError, match="predictions of 9 images, expected all 10"):
        evaluate(tmp_path)
    monkeypatch.undo()
    evaluate(tmp_path)
    assert "images: 10 of 10" in written(tmp_path)


def _evaluate_and_hold(tmp_path, started, ended):
    torch.set_num_threads(1)

    def process(self, *_):
        started.set()
        ended.wait()

    RegionEvaluator.process = process
    evaluate(tmp_path)


def test_second_evaluation_in_a_directory_is_refused(dataset, tmp_path):
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    started, ended = context.Event(), context.Event()
    process = context.Process(target=_evaluate_and_hold, args=(tmp_path, started, ended))
    process.start()
    assert started.wait(60)
    with pytest.raises(ValueError, match=f"another run is at work there .process {process.pid} on "):
        evaluate(tmp_path, "MODEL.REGIONSPOT.SCORE_RULE", "class")
    process.kill()
    process.join()
    evaluate(tmp_path)  # the lock ended with the process


@pytest.mark.parametrize("limit", [3, 7])
def test_fixed_ap_keeps_best_per_class(dataset, tmp_path, monkeypatch, limit):
    """With only three different scores the image id and the order decide which detections are within the limit."""
    probabilities = DetectionRule.probabilities
    monkeypatch.setattr(DetectionRule, "probabilities", lambda *args: (probabilities(*args) * 3).round() / 3)
    fixed = ["TEST.PROTOCOL", "fixed", "TEST.DETECTIONS_PER_IMAGE", -1]
    truth = GroundTruth(tmp_path / "data" / "annotations.json")
    path = tmp_path / "out" / "inference" / NAME / "lvis_instances_results.json"
    evaluate(tmp_path, *fixed)
    whole = read_results(path)
    monkeypatch.setattr("regionspot.evaluation.region_evaluator.DETS_PER_CLASS", limit)
    monkeypatch.setattr("regionspot.evaluation.class_cap._PENDING", 1)
    evaluate(tmp_path, *fixed)
    capped = read_results(path)
    assert len(capped) < len(whole)
    for task in ("bbox", "segm"):
        evaluations = [evaluate_lvis(truth, x, task, "fixed", dets_per_class=limit) for x in (whole, capped)]
        np.testing.assert_array_equal(evaluations[0].precision, evaluations[1].precision)


def test_region_accuracy():
    targets, top = [np.array([0, 1]), np.array([2])], [np.array([[0, 1, 2], [0, 1, 2]]), np.array([[0, 1, 3]])]
    rates = region_accuracy(targets, top, ["r", "f", "f", "c"])
    assert rates["top1"] == pytest.approx(100 / 3) and rates["top5"] == pytest.approx(200 / 3)
    assert rates["top1_r"] == 100 and rates["top1_f"] == 0 and rates["top5_f"] == 50 and np.isnan(rates["top1_c"])
    assert set(region_accuracy(targets, top, ["", "", "", ""])) == {"top1", "top5"}


def boxes_of(model, tmp_path, *overrides):
    """Return the boxes that the model recognized in each image."""
    outputs = [output for batch in build_test_loader(config(tmp_path, *overrides), NAME) for output in model(batch)]
    return [output["regions"].pred_boxes.tensor for output in outputs]


def test_sam_automatic_masks(dataset, tmp_path):
    settings = {"PRED_IOU_THRESH": -10.0, "STABILITY_SCORE_THRESH": -1.0, "POINTS_PER_SIDE": 3}
    overrides = ["MODEL.REGIONSPOT.PROPOSALS.SOURCE", "sam_automatic"]
    overrides += [p for k, v in settings.items() for p in (f"MODEL.REGIONSPOT.PROPOSALS.SAM_AUTOMATIC.{k}", v)]
    model = tiny_model(*overrides)
    boxes = boxes_of(model, tmp_path, *overrides)
    names = {key.lower(): value for key, value in settings.items()}
    masks = SamAutomaticMaskGenerator(model.recognizer.localizer.sam, **names).generate(draw_scene(0)[0])
    expected = torch.tensor([mask["bbox"] for mask in masks]).float()
    assert len(boxes[0]) == len(masks) > 0
    torch.testing.assert_close(boxes[0][:, :2], expected[:, :2])
    evaluate(tmp_path, *overrides, "MODEL.REGIONSPOT.PROPOSALS.TOP_K", 2)
    assert "SAM's automatic masks (points_per_side 3, " in written(tmp_path) and "best 2" in written(tmp_path)
    assert "region" not in json.loads(written(tmp_path))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A small Faster R-CNN with random weights: its directory, with detector.yaml and the weights, and the model."""
    directory = tmp_path_factory.mktemp("detector")
    stages, levels = ([f"{letter}{k}" for k in (2, 3, 4, 5)] for letter in ("res", "p"))
    cfg = get_cfg()
    changes = {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64, "DEVICE": "cpu", "ROI_HEADS.NUM_CLASSES": 3}
    changes |= {"RPN.POST_NMS_TOPK_TEST": 20, "ROI_HEADS.SCORE_THRESH_TEST": 0.0, "ROI_HEADS.NAME": "StandardROIHeads"}
    changes |= {"BACKBONE.NAME": "build_resnet_fpn_backbone", "FPN.OUT_CHANNELS": 32}
    changes |= {"RESNETS.OUT_FEATURES": stages, "FPN.IN_FEATURES": stages}
    changes |= {"RPN.IN_FEATURES": [*levels, "p6"], "ROI_HEADS.IN_FEATURES": levels}
    changes |= {"ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]], "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead"}
    changes |= {"ROI_BOX_HEAD.NUM_FC": 1, "ROI_BOX_HEAD.FC_DIM": 64, "ROI_BOX_HEAD.POOLER_RESOLUTION": 7}
    cfg.merge_from_list([part for key, value in changes.items() for part in (f"MODEL.{key}", value)])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 96, "TEST.DETECTIONS_PER_IMAGE", 5])
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, directory / "detector.pth")
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    (directory / "detector.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "a test"}))
    cfg.MODEL.WEIGHTS = str(directory / "detector.pth")
    (directory / "detector.yaml").write_text(cfg.dump())
    return directory, model


@pytest.mark.parametrize("weights", ["detector.pth", "detector.pkl"])
def test_detector_boxes(dataset, detector, tmp_path, weights):
    directory, plain = detector
    node = "MODEL.REGIONSPOT.PROPOSALS"
    overrides = [f"{node}.SOURCE", "detector", f"{node}.DETECTOR.CONFIG_FILE", str(directory / "detector.yaml")]
    overrides += [f"{node}.DETECTOR.WEIGHTS", str(directory / weights)]
    boxes = boxes_of(tiny_model(*overrides), tmp_path, *overrides)
    for index in range(10):
        image = np.ascontiguousarray(draw_scene(index)[0][..., ::-1])  # BGR, as DefaultPredictor expects
        large = T.ResizeShortestEdge([96, 96], 1333).get_transform(image).apply_image(image)
        with torch.no_grad():
            [output] = plain([{"image": torch.as_tensor(large.transpose(2, 0, 1).copy()), "height": 48, "width": 64}])
        torch.testing.assert_close(boxes[index], output["instances"].pred_boxes.tensor, atol=1e-3, rtol=0)
    evaluate(tmp_path, *overrides)
    assert "boxes: boxes of detector (config " in written(tmp_path) and f"weights {weights} " in written(tmp_path)
    rpn = [*overrides, f"{node}.DETECTOR.OUTPUT", "rpn"]
    boxes = boxes_of(tiny_model(*rpn), tmp_path, *rpn)
    assert all(0 < len(image) <= 20 and image[:, 2].max() > 32 for image in boxes)


def test_proposals_of_rpn_without_heads(dataset, detector, tmp_path):
    node = "MODEL.REGIONSPOT.PROPOSALS"
    overrides = [f"{node}.SOURCE", "detector", f"{node}.DETECTOR.CONFIG_FILE", str(detector[0] / "detector.yaml")]
    overrides += [f"{node}.DETECTOR.OPTS", ("MODEL.META_ARCHITECTURE", "ProposalNetwork")]
    overrides += [f"{node}.DETECTOR.OUTPUT", "rpn"]
    faster = boxes_of(tiny_model(*overrides[:4], *overrides[-2:]), tmp_path, *overrides)
    for alone, whole in zip(boxes_of(tiny_model(*overrides), tmp_path, *overrides), faster):
        torch.testing.assert_close(alone, whole, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="ProposalNetwork has an RPN alone; take rpn"):
        tiny_model(*overrides, f"{node}.DETECTOR.OUTPUT", "boxes")


def test_missing_or_malicious_detectors_are_refused(dataset, detector, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Evil(), "__author__": "evil"}))
    node = "MODEL.REGIONSPOT.PROPOSALS"
    base = [f"{node}.SOURCE", "detector", f"{node}.DETECTOR.CONFIG_FILE"]
    with pytest.raises(ValueError, match="evil.pkl"):
        tiny_model(*base, str(detector[0] / "detector.yaml"), f"{node}.DETECTOR.WEIGHTS", str(tmp_path / "evil.pkl"))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="no config of Detectron2's model zoo"):
        tiny_model(*base, "no.yaml")
    with pytest.raises(ValueError, match="expected boxes or rpn, got 'masks'"):
        tiny_model(*base, str(detector[0] / "detector.yaml"), f"{node}.DETECTOR.OUTPUT", "masks")
    with pytest.raises(ValueError, match="expected one of auto, gt, file, sam_automatic, detector; got 'grid'"):
        tiny_model(f"{node}.SOURCE", "grid")


def test_threshold_keeps_share_of_regions(dataset, tmp_path, capsys):
    arguments = ["--config-file", str(TINY), "--dataset", NAME]
    thresholds = [COMMANDS["calibrate"].call(*arguments, "--keep", keep) for keep in (0.9, 0.5)]
    assert thresholds[0] < thresholds[1] and "MODEL.REGIONSPOT.UNKNOWN.THRESHOLD 0." in capsys.readouterr().out
    scores = np.linspace(0, 1, (1 << 24) + 2, dtype=np.float32)  # more than torch.quantile takes
    assert threshold_of(scores, 0.75) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("table", ["table1", "table6", "released", "odinw", "sam_automatic"])
def test_tables_list_missing_rows(table, tmp_path, capsys):
    COMMANDS["table"].call(table, "--output", tmp_path)
    output = capsys.readouterr().out
    assert output.count("not run, missing:") == len(
        json.loads((table_command.TABLES / f"{table}.json").read_text())["rows"]
    )
    if table == "table1":
        assert "- / 56.6" in output and "weights/regionspot_bl.pth" in output and "lvis_v1_val" in output


def test_table_row_is_run_once(tmp_path, dataset, monkeypatch):
    calls, annotations = [], tmp_path / "data" / "annotations.json"

    def run(command, check):
        calls.append(command)
        (tmp_path / "results.json").write_text(
            json.dumps({"one": {"bbox": {"AP": 10.0}}, "two": {"bbox": {"AP": 20.0, "APm": None}}})
        )
        return table_command.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(table_command.subprocess, "run", run)
    test_set = ["DATASETS.TEST", f"('{NAME}',)"]
    for overrides, num_calls in (([], 1), ([], 1), (["TEST.DETECTIONS_PER_IMAGE", "7"], 2)):
        results = table_command.run_row(TINY, tmp_path, [*test_set, *overrides], [])
        assert len(calls) == num_calls
    annotations.write_text(annotations.read_text() + "\n")
    table_command.run_row(TINY, tmp_path, [*test_set, *overrides], [])
    assert len(calls) == 3
    assert table_command.average(results, "bbox", "AP") == 15 and table_command.average(results, "bbox", "APm") is None


def test_odinw_average(tmp_path, register):
    names = ("odinw_One_test", "odinw_Two_test")
    for first, name in enumerate(names):
        register(name, write_dataset(tmp_path / name, 4, first=10 * first), tmp_path / name / "images", "coco")
    cfg = tiny_config("DATASETS.TEST", names, "OUTPUT_DIR", str(tmp_path))
    results = RegionSpotTrainer.test(cfg, tiny_model(names=None))
    expected = np.mean([results[name]["bbox"]["AP"] for name in names])
    assert results["odinw_average"]["bbox"]["AP"] == pytest.approx(expected) and len(DatasetCatalog.get(names[0])) == 4


def test_dataset_registered_with_detectron2(dataset, tmp_path):
    records = [dict(record) for record in DatasetCatalog.get(NAME)]
    for record in records:  # annotations in the format of Detectron2's data sets
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    DatasetCatalog.register("test_list", lambda: records)
    MetadataCatalog.get("test_list").set(thing_classes=["a", "b", "c", "d"])
    try:
        cfg = config(tmp_path, "DATASETS.TEST", ("test_list",))
        results = RegionSpotTrainer.test(cfg, tiny_model("MODEL.MASK_ON", True, names=None))
    finally:
        DatasetCatalog.remove("test_list")
        MetadataCatalog.remove("test_list")
    assert results["bbox"]["AP50"] > 0 and set(results) == {"bbox", "segm", "region"}


def test_unreadable_image_counts_without_detections(dataset, tmp_path, caplog):
    image = tmp_path / "data" / "images" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 10 images are unreadable"):
        evaluate(tmp_path)
    with caplog.at_level(logging.WARNING):
        damaged = evaluate(tmp_path, "DATALOADER.SKIP_UNREADABLE", True)
    results = json.loads(written(tmp_path, "lvis_instances_results.json"))
    assert {result["image_id"] for result in results} == {*range(1, 11)} - {2}
    [line] = json.loads(written(tmp_path))["unreadable"]
    assert "1.png" in line and "1 images could not be read" in caplog.text
    assert "images: 10 of 10, 1 unreadable" in written(tmp_path)
    image.write_bytes(whole)
    assert evaluate(tmp_path, "DATALOADER.SKIP_UNREADABLE", True) != damaged


def test_repaired_image_is_evaluated_when_resumed(dataset, tmp_path, monkeypatch):
    evaluate(tmp_path)
    expected = written(tmp_path)
    image = tmp_path / "data" / "images" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    monkeypatch.setattr("regionspot.evaluation.region_evaluator.GroundTruth", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path, "DATALOADER.SKIP_UNREADABLE", True)
    monkeypatch.undo()
    image.write_bytes(whole)
    evaluate(tmp_path, "DATALOADER.SKIP_UNREADABLE", True)
    assert written(tmp_path) == expected


def test_names_at_chance_beside_decent_ap_are_warned_about(dataset, tmp_path, caplog):
    """A model that gives every region the same tokens, and so the same name: AP is that of four classes by chance."""
    model = tiny_model("MODEL.MASK_ON", True, names=None)
    torch.nn.init.zeros_(model.recognizer.knowledge_integration.projector.weight)
    with caplog.at_level(logging.WARNING, "regionspot"):
        metrics = RegionSpotTrainer.test(config(tmp_path), model)
    classes = np.concatenate([draw_scene(i)[2] for i in range(10)])
    constant = 100 * np.bincount(classes).max() / len(classes)
    assert metrics["bbox"]["AP"] > 10 and metrics["region"]["top1"] <= constant
    warning = json.loads(written(tmp_path))["warning"]
    assert f"frequent name alone would be for {constant:.1f}%" in warning and warning in caplog.text
