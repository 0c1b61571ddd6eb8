"""Which kernels there are: registers them on the operators of `qat`, and says what would run and why.

Importing it changes nothing until `load` is called.
"""

from typing import Any

import torch

from qat.catalog import CATALOG, lookup
from qat.kernels.packed_linear.choose import choose
from qat.kernels.quantized_matmul import choose as matmul
from qat.layouts import tile
from qat.matmul import problem as matmul_problem
from qat.packed import problem

_loaded: set[str] = set()


def available() -> bool:
    """Whether Triton is installed and a GPU that it supports is here."""
    try:
        import triton  # noqa: F401  # looked for, not used
    except ImportError:
        return False
    return torch.cuda.is_available()


def load() -> bool:
    """Put the kernels under the operators, once; returns whether there are any to put."""
    if not available():
        return False
    if "packed_linear" not in _loaded:
        from qat.kernels.packed_linear.triton import packed_linear

        torch.library.register_kernel("qat::packed_linear", "cuda", packed_linear)
        _loaded.add("packed_linear")
    if "quantized_matmul" not in _loaded:
        from qat.kernels.quantized_matmul.triton import quantized_matmul

        torch.library.register_kernel("qat::quantized_matmul", "cuda", quantized_matmul)
        _loaded.add("quantized_matmul")
    return True


def explain(format: str, tokens: int, rows: int, columns: int, input_format: str | None = None) -> dict[str, Any]:
    """What runs x (tokens, columns) times a weight (rows, columns) on this machine after `load`, and why.

    Args:
        format: of the weight.
        tokens, rows, columns: the shape of the product.
        input_format: of x; by default it is not quantized.

    Raises:
        FormatError: no such format.
    """
    if input_format is not None:
        return _explain_quantized(format, tokens, rows, columns, input_format)
    fmt = lookup(format)
    told: dict[str, Any] = {"format": format, "operator": "qat::packed_linear", "kernel": "none", "why": problem(fmt)}
    if told["why"] is not None:
        return told
    if not available():
        return {**told, "kernel": "reference", "why": "no GPU with Triton here: weights are dequantized at every call"}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    return {**told, "kernel": "triton", "why": tiles.why}


def _explain_quantized(format: str, tokens: int, rows: int, columns: int, input_format: str) -> dict[str, Any]:
    x, w = lookup(input_format), lookup(format)
    told: dict[str, Any] = {"format": format, "input": input_format, "operator": "qat::quantized_matmul"}
    reason = matmul_problem(x, w)
    if reason is not None:
        return {**told, "kernel": "none", "why": reason}
    if not available():
        why = "no GPU with Triton here: both sides are dequantized at every call"
        return {**told, "kernel": "reference", "why": why}
    from qat.kernels.quantized_matmul.triton import device_of

    device = device_of(torch.empty(0, device="cuda"))
    if matmul.block_scaled(x, w, columns, device.capability):
        return {**told, "kernel": "triton", "why": f"block-scaled units, by {matmul.BLOCK_SCALED}=1; never measured"}
    return {**told, "kernel": "triton", "why": matmul.choose(tokens, rows, columns, x, w, device).why}


def explain_all(tokens: int, rows: int, columns: int, input_format: str | None = None) -> list[dict[str, Any]]:
    """`explain` for every format that weights are stored in (float32 scales belong to inputs)."""
    return [explain(name, tokens, rows, columns, input_format) for name, fmt in CATALOG.items() if fmt.scale != "f32"]
