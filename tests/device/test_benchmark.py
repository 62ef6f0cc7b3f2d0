"""The benchmarks on a simulated accelerator: of what they measure nothing meets tensors of the CPU."""

from argparse import Namespace

from tools.benchmarks.extract import benchmark_extract
from tools.benchmarks.model import Models, benchmark_model
from tools.benchmarks.proposals import benchmark_proposals
from tools.benchmarks.train import benchmark_train

from ..helpers import tiny_config

ON_DEVICE = ("MODEL.DEVICE", "meta", "TEST.DETECTIONS_PER_IMAGE", 4)


def test_model_benchmark_runs_on_the_device():
    cfg = tiny_config(*ON_DEVICE, "MODEL.REGIONSPOT.PRECISION", "bf16")
    models = Models.from_config(cfg)
    assert models.plain.device.type == "meta"
    table = models.build_table(cfg, repeats=1, batch=2)
    benchmark_model(models, Namespace(boxes=[2], names=[5], whole=None, plain_boxes=2), table)
    assert all(row["ratio"] > 0 and row["flops"] > 0 for row in table.rows)


def test_train_benchmark_runs_on_the_device(tmp_path):
    args = Namespace(images=4, maps=False, workers=0, steps=1, warm_up=1, repeats=1)
    table = benchmark_train(tiny_config(*ON_DEVICE, "SOLVER.IMS_PER_BATCH", 2), tmp_path, args)
    assert [row["per_second"] > 0 for row in table.rows] == [True] * 3


def test_extract_benchmark_runs_on_the_device(tmp_path):
    args = Namespace(images=2, boxes=2, batch=2, workers=0, plain_images=1, repeats=1)
    assert benchmark_extract(tiny_config(*ON_DEVICE), tmp_path, args).rows[0]["ratio"] > 0


def test_proposals_benchmark_runs_on_the_device():
    [row] = benchmark_proposals(tiny_config(*ON_DEVICE), Namespace(points=3, kept=[50], repeats=1)).rows
    assert row["same_boxes"] and row["boxes"]
