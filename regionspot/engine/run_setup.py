"""The beginning of a run: directory, loggers, seed, and a few lines about it."""

import argparse
import logging
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import detectron2
import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from regionspot.utils.files import atomic_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"  # of Detectron2's log files
_COLOR = re.compile(r"\x1b\[[\d;]*m")
_CONTROL = re.compile(rf"(?!{_COLOR.pattern})[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except tabs, newlines and colors


class PrintableFormatter(logging.Formatter):
    """Escapes control characters, which could steer a terminal; only terminals get colors."""

    def __init__(self, formatter: logging.Formatter, with_colors: bool) -> None:
        """Wrap ``formatter``; Detectron2 and fvcore put colors into messages, which ``with_colors`` keeps."""
        super().__init__()
        self.formatter, self.with_colors = formatter, with_colors

    def format(self, record: logging.LogRecord) -> str:
        line = self.formatter.format(record)
        line = line if self.with_colors else _COLOR.sub("", line)
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def set_up_run(cfg: "CfgNode | DictConfig", args: argparse.Namespace) -> None:
    """Set up a run as Detectron2's ``default_setup`` does, with a log that a person can read.

    The hundreds of lines that ``default_setup`` would log go to files beside ``log.txt``: ``config.yaml`` (the whole
    config) and ``environment.txt``.

    Args:
        cfg: Detectron2's config, or a lazy config with ``train.output_dir``, ``train.seed`` and so on.
        args: of the command line.
    """
    is_lazy, rank = not isinstance(cfg, CfgNode), comm.get_rank()
    output = Path(cfg.train.output_dir if is_lazy else cfg.OUTPUT_DIR)
    seed = cfg.train.get("seed", -1) if is_lazy else cfg.SEED
    output.mkdir(parents=True, exist_ok=True)
    for name in ("fvcore", "detectron2", "regionspot"):
        for handler in setup_logger(str(output), rank, name=name).handlers:
            if isinstance(handler, logging.StreamHandler) and not handler.stream.closed:
                is_terminal = handler.stream.isatty()
                colored = handler.formatter if is_terminal else None
                plain = logging.Formatter(_FORMAT, "%m/%d %H:%M:%S")
                handler.setFormatter(PrintableFormatter(colored or plain, is_terminal))
    if comm.is_main_process():
        with atomic_path(output / "config.yaml") as temporary:
            if is_lazy:
                LazyConfig.save(cfg, str(temporary))
            else:
                temporary.write_text(cfg.dump(), encoding="utf-8")
        with atomic_path(output / "environment.txt") as temporary:
            temporary.write_text(f"{collect_env_info()}\n", encoding="utf-8")
    versions = {"regionspot": sys.modules["regionspot"].__version__, "detectron2": detectron2.__version__}
    versions |= {"torch": torch.__version__, "Python": platform.python_version()}
    logger.info(", ".join(f"{name} {version}" for name, version in versions.items()))
    logger.info("process %d of %d: %s", rank + 1, comm.get_world_size(), shlex.join(sys.argv))
    logger.info("whole config: %s, environment: %s", output / "config.yaml", output / "environment.txt")
    # each process draws its own dropout; DDP gives all the main process's weights, and data have seeds of their own
    seed_all_rng(None if seed < 0 else seed + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.train.get("cudnn_benchmark", False) if is_lazy else cfg.CUDNN_BENCHMARK


def log_size(model: nn.Module) -> None:
    """Log how many parameters a model has, and which modules are trained."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name, device = type(model).__name__, next(model.parameters()).device
    parts = ", ".join(learning_modules(model)) or "none"
    logger.info("%s on %s: %.2f million parameters learn, of %.2f: %s", name, device, trained / 1e6, total / 1e6, parts)


def learning_modules(model: nn.Module, name: str = "") -> list[str]:
    """Return the names of the largest modules all of whose parameters learn, and of other parameters that do."""
    parameters = list(model.parameters())
    if name and parameters and all(parameter.requires_grad for parameter in parameters):
        return [name]
    prefix = f"{name}." if name else ""
    single = [prefix + key for key, value in model.named_parameters(recurse=False) if value.requires_grad]
    return single + [part for key, child in model.named_children() for part in learning_modules(child, prefix + key)]
