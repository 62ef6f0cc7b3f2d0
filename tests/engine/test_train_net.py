"""tools/train_net.py as a user runs it: training, resuming, evaluation, on one process and on two."""

import json
import subprocess
import sys

import pytest
import torch

from ..helpers import ROOT, TINY, tiny_model, write_dataset

# Registers the generated data set in the process and in those that it spawns, as a user's own script would.
SCRIPT = """
import sys
sys.path.insert(0, {tools!r})
import train_net
from regionspot.data import register_json_dataset
from detectron2.engine import default_argument_parser, launch

def main(args):
    register_json_dataset("scenes", {json!r}, {root!r}, evaluator_type={kind!r})
    return train_net.main(args)

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The annotation file; frozen weights, the same for all processes, lie beside it."""
    folder = tmp_path_factory.mktemp("scenes")
    recognizer = tiny_model(names=None).recognizer
    torch.save(recognizer.localizer.sam.state_dict(), folder / "sam.pth")
    torch.save(recognizer.vision_language.clip_model.state_dict(), folder / "clip.pth")
    return write_dataset(folder / "data")


def run(folder, dataset, *arguments, kind="lvis", expect=0):
    script = folder / f"run_{kind}.py"
    script.write_text(
        SCRIPT.format(tools=str(ROOT / "tools"), json=str(dataset), root=str(dataset.parent / "images"), kind=kind)
    )
    frozen = [f"MODEL.REGIONSPOT.{part.upper()}.WEIGHTS={dataset.parents[1] / part}.pth" for part in ("sam", "clip")]
    schedule = ["IMS_PER_BATCH=4", "BASE_LR=0.0007", "WARMUP_ITERS=5", "STEPS=()"]
    pairs = ["DATASETS.TRAIN=('scenes',)", "DATASETS.TEST=('scenes',)", f"OUTPUT_DIR={folder}", *frozen]
    opts = [part for pair in [*pairs, *(f"SOLVER.{p}" for p in schedule)] for part in pair.split("=", 1)]
    options = [a for a in arguments if a.startswith("--")]
    values = [a for a in arguments if not a.startswith("--")]
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(script),
        "--config-file",
        str(TINY),
        *options,
        "--dist-url",
        "auto",
        *opts,
        *values,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=False)
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return lines[-1]


def test_train_resume_and_evaluate(tmp_path, dataset):
    run(tmp_path, dataset, "SOLVER.MAX_ITER", "20", "SOLVER.CHECKPOINT_PERIOD", "10")
    first = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    assert first["iteration"] == 9 and "optimizer" in first["trainer"]["_trainer"]
    output = run(tmp_path, dataset, "--resume", "SOLVER.MAX_ITER", "30")
    assert "Starting training from iteration 20" in output
    assert "regionspot.checkpoint" in (tmp_path / "log.txt").read_text()
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 29
    assert metrics(tmp_path)["bbox/AP"] >= 0
    one = run(tmp_path, dataset, "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    two = run(tmp_path, dataset, "--eval-only", "--num-gpus=2", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    table = [line for line in one.splitlines() if "copypaste" in line]
    assert len(table) == 3 and "AP,AP50,AP75,APs,APm,APl,APr,APc,APf" in table[1]
    assert [t.split("copypaste")[1] for t in table] == [
        t.split("copypaste")[1] for t in two.splitlines() if "copypaste" in t
    ]


def test_two_processes_train_to_what_one_does(tmp_path, dataset):
    """The generated set has 8 images and a batch holds them all, so that their order is no matter."""
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        dropout = [
            "MODEL.REGIONSPOT.INTEGRATION.DROPOUT",
            "0.0",
            "SOLVER.MAX_ITER",
            "3",
            "SOLVER.IMS_PER_BATCH",
            "8",
            "TEST.EVAL_PERIOD",
            "0",
        ]
        run(folder, dataset, f"--num-gpus={processes}", *dropout)
        weights.append(torch.load(folder / "model_final.pth", weights_only=True))
    assert weights[0]["frozen"] == weights[1]["frozen"]
    for key, value in weights[0]["model"].items():
        torch.testing.assert_close(value, weights[1]["model"][key], atol=2e-4, rtol=0)


def test_masks_are_evaluated_and_coco_data_sets_too(tmp_path, dataset):
    for kind in ("lvis", "coco"):
        output = run(tmp_path, dataset, "--eval-only", "MODEL.MASK_ON", "True", kind=kind)
        assert "Task: bbox" in output and "Task: segm" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DATASETS.TRAIN", "('unknown',)"], "'unknown' is not registered"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["SOLVER.OPTIMIZER", "Adam"], "expected AdamW"),
        (["DATASETS.TEST", "('unknown',)"], "'unknown' is not registered"),
        (["MODEL.WEIGHTS", "no.pth"], "no.pth.*no such file"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, dataset, overrides, message):
    import re

    assert re.search(message, run(tmp_path, dataset, "SOLVER.MAX_ITER", "1", *overrides, expect=1))
