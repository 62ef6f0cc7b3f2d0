"""Writes a model as ONNX files or torch.export programs."""

import logging
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

from detectron2.utils.logger import setup_logger

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.export import check_export, check_options, export_recognizer
from regionspot.utils.command_line import printable
from regionspot.vocabulary import load_vocabulary


def main(args: Namespace) -> None:
    setup_logger(name="regionspot")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it reports what its optimizer leaves as it is
    check_options(args.output, args.format, args.precision, args.opset)
    cfg = load_config(args.config_file, args.opts)
    vocabulary = load_vocabulary(args.vocabulary or cfg.MODEL.REGIONSPOT.VOCABULARY, with_examples=True)
    cfg.MODEL.REGIONSPOT.PRECISION = "float32"  # of what is exported; --precision is that of the export
    cfg.MODEL.REGIONSPOT.COMPILE = False
    if args.format == "onnx" and args.check:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("checking an export needs onnxruntime: pip install 'regionspot[export]'") from error
        onnxruntime.set_default_logger_severity(3)  # not what it leaves as it is, either
    predictor = RegionSpotPredictor(cfg)
    predictor.set_vocabulary(vocabulary)
    check = partial(check_export, predictor.recognizer, file_format=args.format, precision=args.precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about PyTorch's code
        description = export_recognizer(
            predictor.recognizer,
            cfg,
            args.output,
            args.format,
            args.precision,
            args.opset,
            check if args.check else None,
        )
    for model in description["models"].values():
        size = sum(path.stat().st_size for path in Path(args.output).glob(f"{model['file']}*")) / 1e6
        print(f"{model['file']}: {size:.1f} MB")
    opset = f", opset {description['opset']}" if description["opset"] else ""
    print(f"{printable(args.output)}: {args.format}, {args.precision}{opset}, {len(vocabulary)} names")
    if args.check:
        report = description["check"]
        numbers = ", ".join(f"{key} {value['absolute']:.1e}" for key, value in report["differences"].items())
        print(
            f"greatest differences from PyTorch, {report['num_boxes']} boxes x {report['num_names']} names: {numbers}"
        )
    if predictor.random_parts:
        print(
            f"No weights for {', '.join(predictor.random_parts)}: these parts are untrained, THE LABELS MEAN NOTHING."
        )
