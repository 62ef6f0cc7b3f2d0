"""``regionspot export``: a directory with the models, their text embeddings and the file that runs them."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from regionspot.checkpoint.formats import fingerprint
from regionspot.checkpoint.key_layout import PARTS, select
from regionspot.export import onnx_predictor
from regionspot.export.modules import parts_of
from regionspot.export.onnx_export import OPSET, check_opset, save_onnx
from regionspot.export.torch_export import MODELS, PRECISIONS, Traced, save_program, trace
from regionspot.modeling.open_vocabulary import BACKGROUND
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.utils.files import temporary_name, write_json

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
README = """# RegionSpot, exported

`model.json` describes the models, `text_embeddings.npy` are those of its names and then of its background names.
{run}
"""
RUN = {
    "onnx": "`pip install onnxruntime numpy pillow`, and `from onnx_predictor import OnnxRegionPredictor`.",
    "torch": "`from regionspot.export.torch_export import TorchRegionPredictor`, or `torch.export.load`.",
}
logger = logging.getLogger(__name__)


def check_options(directory: Path, file_format: str, precision: str, opset: int) -> None:
    """Refuse what an export cannot have, before a model is built.

    Raises:
        ValueError: an unknown format, precision or opset, or a directory that is not empty.
        ImportError: the exporter's packages are not installed.
    """
    if file_format not in FORMATS:
        raise ValueError(f"--format: expected {' or '.join(FORMATS)}, got {file_format!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--output {directory}: exists and is not empty; give another directory, or remove it")
    if file_format == "onnx":
        check_opset(opset)


def export_recognizer(
    recognizer: RegionRecognizer,
    cfg: CfgNode,
    directory: str | Path,
    file_format: str = "onnx",
    precision: str = "float32",
    opset: int = OPSET,
    check: Callable[[Path], dict[str, Any]] | None = None,
    programs: dict[str, Traced] | None = None,
) -> dict[str, Any]:
    """Write an export of a recognizer with the vocabulary in use; the directory appears whole or not at all.

    Args:
        recognizer: with its weights and its vocabulary; it stays as it is.
        cfg: its config, which the export's description quotes.
        directory: must not exist, or be empty.
        file_format: "onnx", or "torch" for ``torch.export`` programs.
        precision: "float32" or "fp16".
        opset: of ONNX.
        check: called with the written directory before it gets its name, see ``regionspot.export.check``; what it
            returns is in the description, and what it raises leaves no directory.
        programs: of ``trace`` in this precision, if they are known.

    Returns:
        The content of ``model.json``.

    Raises:
        ValueError: see ``check_options``; or the recognizer is not in float32.
        ImportError: see ``check_options``.
    """
    directory = Path(directory).absolute()
    check_options(directory, file_format, precision, opset)
    if (dtype := parts_of(recognizer)[0].dtype) != torch.float32:
        raise ValueError(f"export: expected a model of MODEL.REGIONSPOT.PRECISION float32, got {dtype}")
    with _new_directory(directory) as temporary:
        programs = programs or trace(recognizer, precision)
        for name in MODELS:
            path = temporary / (name + FORMATS[file_format])
            if file_format == "onnx":
                save_onnx(programs[name], path, opset)
            else:
                save_program(programs[name], path)
            logger.info("%s: %.1f MB", path.name, path.stat().st_size / 1e6)
        np.save(temporary / "text_embeddings.npy", _text_embeddings(recognizer), allow_pickle=False)
        description = describe(recognizer, cfg, programs, file_format, precision, opset)
        write_json(temporary / "model.json", description)
        (temporary / "README.md").write_text(README.format(run=RUN[file_format]), encoding="utf-8")
        if file_format == "onnx":
            shutil.copy(onnx_predictor.__file__, temporary)
        if check is not None:
            description["check"] = check(temporary)
            write_json(temporary / "model.json", description)
    return description


def describe(
    recognizer: RegionRecognizer,
    cfg: CfgNode,
    programs: dict[str, Traced],
    file_format: str,
    precision: str,
    opset: int,
) -> dict[str, Any]:
    """Return what ``model.json`` says: all that ``OnnxRegionPredictor`` needs, and where the models are from."""
    localizer, vision_language = parts_of(recognizer)
    sam, node, state = localizer.sam, cfg.MODEL.REGIONSPOT, recognizer.state_dict()
    clip = None
    if vision_language.features != "none":
        clip = {
            "size": vision_language.image_size,
            "pixel_mean": vision_language.pixel_mean.flatten().tolist(),
            "pixel_std": vision_language.pixel_std.flatten().tolist(),
        }
    return {
        "format": onnx_predictor.FORMAT,
        "models": {
            name: {"file": name + FORMATS[file_format], "inputs": traced.inputs, "outputs": traced.outputs}
            for name, traced in programs.items()
        },
        "sam": {
            "size": localizer.image_size,
            "pixel_mean": sam.pixel_mean.flatten().tolist(),
            "pixel_std": sam.pixel_std.flatten().tolist(),
            "mask_threshold": sam.mask_threshold,
        },
        "clip": clip,
        "token_dim": localizer.token_dim,
        "score_function": recognizer.rule.score_function,
        "unknown_threshold": recognizer.rule.unknown_thresh,
        "names": list(recognizer.vocabulary),
        "background": recognizer.background,
        "templates": list(recognizer.classifier.text_encoder.templates),
        "name_style": recognizer.classifier.text_encoder.name_style,
        "precision": precision,
        "opset": opset if file_format == "onnx" else None,
        "config": {
            "sam": node.SAM.NAME,
            "clip": node.CLIP.NAME,
            "features": node.CLIP.FEATURES,
            "token_stage": node.TOKEN_STAGE,
            "multimask": node.SAM.MULTIMASK,
        },
        "weights": {
            part: {"source": Path(source).name, "fingerprint": fingerprint(select(state, PARTS[part]))}
            for part, source in recognizer.weight_sources.items()
        },
        "versions": {"regionspot": sys.modules["regionspot"].__version__, "torch": str(torch.__version__)},
    }


def _text_embeddings(recognizer: RegionRecognizer) -> np.ndarray:
    """Return the (K + number of background names, D) float32 embeddings of the vocabulary in use."""
    embeddings = [recognizer.classifier.embeddings]
    if recognizer.background:
        embeddings.append(recognizer.classifier.get(BACKGROUND)[1])
    return torch.cat(embeddings).float().cpu().numpy()


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """Yield a directory beside ``directory``, which gets its name when the block succeeds, and else is removed."""
    temporary = directory.with_name(temporary_name(directory.name))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(directory)  # replaces an empty one, too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
