"""Models for use without this package: ONNX and ``torch.export``, and what runs them."""

from regionspot.export.check import check_export
from regionspot.export.onnx_predictor import OnnxRegionPredictor
from regionspot.export.package import check_options, export_recognizer
from regionspot.export.torch_export import TorchRegionPredictor

__all__ = ["OnnxRegionPredictor", "TorchRegionPredictor", "check_export", "check_options", "export_recognizer"]
