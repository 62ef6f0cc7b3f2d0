"""Check RegionSpot on this machine's GPU: the golden numbers, training, resuming, extraction, evaluation and the demo.

What is computed there is compared with the CPU, in float32 without TF32. Prints a line for each check with its time and
the peak memory of this process, and exits with 1 if one failed. Without CUDA it says so and exits with 0.

Example:
    python -m tests.gpu_check --output output   (in RegionSpot's checkout, as make gpu-check does)
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from safetensors.torch import load_file

from miniworld import experiment
from miniworld.__main__ import COMMANDS
from regionspot.checkpoint.checkpointer import load_model
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.utils.command_line import run_command
from regionspot.utils.memory import peak_memory

from . import golden_numbers
from .helpers import ROOT

LOSS_TOLERANCE = {"float32": 0.02, "bf16": 0.05, "fp16": 0.05}  # relative to the CPU's losses in float32
WEIGHT_TOLERANCE = 5e-3  # a step of AdamW moves a weight by BASE_LR, 1e-3, at the most


@dataclass
class Setting:
    """What to check on, and how much."""

    device: str
    directory: Path
    scenes: int = 48
    steps: int = 10
    images: int = 8

    def config(self, output: str, *overrides: Any) -> CfgNode:
        """Return the config of a short training in the miniature world that uses EMA and accumulation."""
        solver = {
            **{"MAX_ITER": self.steps, "CHECKPOINT_PERIOD": self.steps // 2, "IMS_PER_BATCH": self.images},
            **{"WARMUP_ITERS": 0, "ACCUMULATE": 2, "EMA.ENABLED": True},
        }
        fixed: list[Any] = [part for key, value in solver.items() for part in (f"SOLVER.{key}", value)]
        fixed += ["MODEL.REGIONSPOT.CLIP.TEMPLATES", "one"]
        fixed += ["MODEL.DEVICE", self.device, "MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0, "DATASETS.TEST", ()]
        return experiment.miniworld_config(experiment.CONFIG, self.directory / output, 0, [*fixed, *overrides])


def train(cfg: CfgNode, resume: bool = False) -> list[float]:
    """Train with SAM and CLIP in the loop; return the losses."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights of two checkpoints."""
    first, second = (torch.load(path, map_location="cpu", weights_only=True)["model"] for path in (one, other))
    return max(float((value.float() - second[key].float()).abs().max()) for key, value in first.items())


def expect(value: float, tolerance: float, what: str) -> str:
    """Return a line about a value; raise an AssertionError if it is NaN or exceeds the tolerance."""
    line = f"{what} {value:.1e} (at most {tolerance:.0e})" if value else f"{what} none, to the bit"
    if not value <= tolerance:
        raise AssertionError(line)
    return line


def check_golden(setting: Setting) -> str:
    """The golden numbers of a RegionSpot-BB, to a thousandth of the spread of each."""
    return expect(
        golden_numbers.largest_error(golden_numbers.compute(setting.directory, setting.device)), 1e-3, "error"
    )


def check_training(setting: Setting, precision: str) -> str:
    """Train in a precision with EMA and accumulation, and compare with the CPU's losses in float32.

    Of other precisions only the first loss is compared: fp16 skips steps until its loss scale fits.
    """
    expected = train(setting.config("training-cpu", "MODEL.DEVICE", "cpu"))
    amp = ["SOLVER.AMP.ENABLED", precision != "float32", "SOLVER.AMP.DTYPE", precision.replace("float32", "bf16")]
    cfg = setting.config(f"training-{precision}", *amp)
    _reset_peak(setting)
    losses = train(cfg)
    state = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", map_location="cpu", weights_only=True)
    if not state["ema"] or len(losses) != setting.steps or not losses[-1] < losses[0]:
        raise AssertionError(f"expected an average and {setting.steps} losses that fall, got {losses}")
    pairs = list(zip(losses, expected))[: setting.steps if precision == "float32" else 1]
    return expect(max(abs(a - b) / b for a, b in pairs), LOSS_TOLERANCE[precision], "largest difference of a loss")


def check_resuming(setting: Setting) -> str:
    """A run that resumes in the middle ends with the weights of one that was not interrupted."""
    train(setting.config("whole"))
    whole, cut = setting.directory / "whole", setting.directory / "cut"
    shutil.copytree(whole, cut, dirs_exist_ok=True)
    for path in cut.glob("model_final*"):
        path.unlink()
    (cut / "last_checkpoint").write_text(f"model_{setting.steps // 2 - 1:07d}.pth")
    assert len(train(setting.config("cut"), resume=True)) < setting.steps
    difference = largest_difference(whole / "model_final.pth", cut / "model_final.pth")
    return expect(difference, WEIGHT_TOLERANCE, "difference of weights")


def check_extraction(setting: Setting) -> str:
    """Stores of tokens of all stages and of feature maps equal the CPU's."""
    tensors: list[list[dict[str, torch.Tensor]]] = []
    for device in ("cpu", setting.device):
        directory = setting.directory / f"store-{len(tensors)}"
        model = load_model(setting.config("extraction", "MODEL.DEVICE", device))
        extraction = Extraction(("prompt_encoder", "transformer", "mlp"), flip=True, feature_maps=True)
        _reset_peak(setting)
        extract_tokens(model.recognizer, "miniworld_train", directory, extraction, show_progress=False)
        tensors.append([load_file(path) for path in sorted(directory.rglob("*.safetensors"))])
    errors = [
        float((value.float() - there[key].float()).abs().max() / (value.float().std() + 1e-6))
        for here, there in zip(*tensors, strict=True)
        for key, value in here.items()
        if value.is_floating_point() and value.numel() > 1
    ]
    return expect(max(errors), 0.02, "largest difference (of the standard deviation)")


def check_stored_tokens(setting: Setting) -> str:
    """Training from stored tokens, extracted in batches, with CLIP in the loop and workers equals the CPU's."""
    losses: list[list[float]] = []
    for device in ("cpu", setting.device):
        directory, on_gpu = setting.directory / f"tokens-{len(losses)}", torch.device(device).type == "cuda"
        model = load_model(setting.config("extraction", "MODEL.DEVICE", device))
        extraction = Extraction(batch_size=4, workers=2)
        extract_tokens(model.recognizer, "miniworld_train", directory, extraction, show_progress=False)
        overrides = ["DATASETS.TOKEN_STORES_TRAIN", (str(directory),), "MODEL.REGIONSPOT.COMPILE", on_gpu]
        overrides += ["DATALOADER.NUM_WORKERS", 2, "MODEL.DEVICE", device]
        _reset_peak(setting)
        losses.append(train(setting.config(f"stored-{len(losses)}", *overrides)))
    difference = max(abs(one - other) / one for one, other in zip(*losses, strict=True))
    return expect(difference, LOSS_TOLERANCE["float32"], "largest difference of a loss")


def check_evaluation(setting: Setting) -> str:
    """AP of boxes and masks equal the CPU's."""
    results: list[dict[str, float]] = []
    for device in ("cpu", setting.device):
        cfg = setting.config(f"evaluation-{len(results)}", "MODEL.DEVICE", device)
        model = load_model(cfg)
        _reset_peak(setting)
        results.append(experiment.average_precision(cfg, model, "test"))
    differences = [abs(results[0][key] - results[1][key]) for key in ("AP", "mask_AP")]
    return expect(max(differences), 0.5, "largest difference of AP")


def check_precision(setting: Setting, precision: str) -> str:
    """The frozen parts in half precision give nearly the features, tokens and text embeddings of float32."""
    [scene], results = experiment.test_scenes("test", 1), []
    for name in ("float32", precision):
        recognizer = load_model(setting.config("precision", "MODEL.REGIONSPOT.PRECISION", name)).recognizer
        _reset_peak(setting)
        features, located, _ = experiment.locate_boxes(recognizer, scene, scene.boxes)
        embeddings = recognizer.encode_vocabulary(["striped red star", "plain blue ring", "dotted green disc"])[1]
        results.append((features.embeddings, features.feature_map, located.tokens, located.masks, embeddings))
    errors = [float((one - other).std() / one.std()) for one, other in zip(*results)]
    return expect(max(errors), 0.05, "largest error (of the standard deviation)")


def check_processes(setting: Setting) -> str:
    """Two processes, joined by NCCL where there are two GPUs, end with the weights of one."""
    several = setting.device == "cuda" and torch.cuda.device_count() > 1
    device, paths = (setting.device if several else "cpu"), []
    for num_processes in (1, 2):
        cfg = setting.config(f"processes-{num_processes}", "MODEL.DEVICE", device)
        path = Path(cfg.OUTPUT_DIR) / "config.in.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cfg.dump())
        options = ["--config-file", path, "--num-gpus", num_processes, "--dist-url", "auto"]
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *map(str, options)]
        env = {**os.environ, "DETECTRON2_DATASETS": str(setting.directory / "data")}
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
        if result.returncode:
            raise AssertionError(f"{' '.join(command)}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        paths.append(path.parent / "model_final.pth")
    line = expect(largest_difference(*paths), WEIGHT_TOLERANCE, "difference of weights")
    return f"{line}, by {'NCCL' if several else 'gloo on the CPU: this machine has no second GPU'}"


def check_demo(setting: Setting) -> str:
    """The demo runs, with TF32 as PyTorch has it by default."""
    config = experiment.CONFIGS / "RegionSpot-mini-quick.yaml"
    options: list[Any] = ["--config-file", config, "--output", setting.directory / "demo", "--workers", 1]
    options += ["--train", 4 * setting.scenes, "--test", setting.scenes, "MODEL.DEVICE", setting.device]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        COMMANDS["demo"].call(*options)
    return f"ran: {printed.getvalue().split('RegionSpot, true boxes')[1].splitlines()[0].split()} base and novel top-1"


def _reset_peak(setting: Setting) -> None:
    if torch.device(setting.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)


CHECKS: dict[str, Callable[[Setting], str]] = {
    "golden numbers": check_golden,
    **{f"training, {name}": partial(check_training, precision=name) for name in LOSS_TOLERANCE},
    "resuming": check_resuming,
    "extraction": check_extraction,
    "stored tokens": check_stored_tokens,
    "evaluation": check_evaluation,
    **{f"frozen parts, {name}": partial(check_precision, precision=name) for name in ("bf16", "fp16")},
    "two processes": check_processes,
    "demo": check_demo,
}


def run_checks(setting: Setting, names: list[str]) -> bool:
    """Run checks, print a line for each, and return whether all passed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    experiment.draw_data(setting.directory / "data", {"train": setting.scenes, "test": setting.scenes // 4}, 1)
    passed = True
    for name in names:
        start = time.perf_counter()
        _reset_peak(setting)
        try:
            line = f"ok      {CHECKS[name](setting)}"
        except Exception:  # one failure must not hide the results of other checks
            passed, line = False, f"FAILED  {traceback.format_exc()}"
        memory = peak_memory(torch.device(setting.device))
        print(f"{name:20} {time.perf_counter() - start:6.1f} s  peak {memory:6.2f} GB  {line}", flush=True)
    return passed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("output"), metavar="DIR", help="DIR/gpu-check is made again"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="names as they are printed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if unknown := set(args.only) - set(CHECKS):
        raise ValueError(f"--only: expected some of {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA, so there is nothing to check")
        return 0
    logging.basicConfig(level=logging.ERROR)
    print(f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} of them), PyTorch {torch.__version__}")
    directory = args.output / "gpu-check"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return 0 if run_checks(Setting("cuda", directory), args.only or list(CHECKS)) else 1


if __name__ == "__main__":
    run_command(main)
