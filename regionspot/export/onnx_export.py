"""ONNX files of the traced programs, by PyTorch's exporter."""

from pathlib import Path
from typing import Any

import torch

from regionspot.export.torch_export import Traced

OPSETS = range(18, 24)  # that PyTorch's exporter writes
OPSET = 20
MAX_BYTES = 1 << 30  # of weights in the file of a model; Protocol Buffers end at 2 GB


def save_onnx(traced: Traced, path: Path, opset: int = OPSET) -> None:
    """Write a program as ONNX file; weights above a gigabyte are beside it, in ``<path>.data``.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: an opset that the exporter does not write.
    """
    check_opset(opset)
    exported = torch.onnx.export(
        traced.program,
        dynamo=True,
        input_names=list(traced.inputs),
        output_names=list(traced.outputs),
        opset_version=opset,
        custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attend},
        verbose=False,
    )
    assert exported is not None
    if (written := exported.model.opset_imports[""]) != opset:
        raise ValueError(f"--opset {opset}: PyTorch's exporter could only write opset {written}; give that one")
    _name_dimensions(exported.model, traced)
    _clear_metadata(exported.model)
    num_bytes = sum(x.nbytes for x in traced.program.state_dict.values())
    exported.save(path, external_data=num_bytes > MAX_BYTES)


def check_opset(opset: int) -> None:
    """Refuse an opset that is not one of ``OPSETS``, and say so if the exporter's packages are missing."""
    if opset not in OPSETS:
        raise ValueError(f"--opset: expected {OPSETS.start} to {OPSETS.stop - 1}, got {opset}")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX export needs onnx and onnxscript: pip install 'regionspot[export]'") from error


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write attention of any rank; the exporter's own version takes (B, heads, L, D) alone."""
    from onnxscript import opset18 as op

    assert attn_mask is None and not is_causal and not dropout_p and not enable_gqa
    rank, channels = len(query.shape), query.shape[-1]
    factor: Any = op.CastLike(op.Constant(value_float=float(scale or channels**-0.5)), query)  # type: ignore[type-var]
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    return op.MatMul(op.Softmax(op.MatMul(op.Mul(query, factor), transposed), axis=-1), value)


def _name_dimensions(model: Any, traced: Traced) -> None:
    """Give the dynamic dimensions of inputs and outputs their names, in place of the trace's symbols."""
    import onnx_ir

    names = {}
    for value, shape in zip(model.graph.inputs, traced.inputs.values()):
        names.update({str(dim.value): name for dim, name in zip(value.shape, shape) if isinstance(name, str)})
    for value in [*model.graph.inputs, *model.graph.outputs]:
        dims = [dim if isinstance(dim, int) else names.get(str(dim.value), str(dim.value)) for dim in value.shape]
        value.shape = onnx_ir.Shape(dims)


def _clear_metadata(model: Any) -> None:
    """Remove the exporter's notes on each node: half of a small file, and paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
