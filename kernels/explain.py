"""What would run on this machine for a format and a shape, and why: `qat kernels`."""

from typing import Any

import torch

from qat.kernels.device import device_of
from qat.kernels.fake_quantize.choose import input_problem
from qat.kernels.fake_quantize.choose import problem as training_problem
from qat.kernels.load import available, cpu_problem
from qat.kernels.packed_linear.choose import choose
from qat.kernels.quantized_matmul import choose as matmul
from qat.numbers.catalog import CATALOG, lookup
from qat.serving.matmul import problem as matmul_problem
from qat.serving.packed import problem
from qat.serving.words import tile


def explain(format: str, tokens: int, rows: int, columns: int, input_format: str | None = None) -> dict[str, Any]:
    """What runs x (tokens, columns) times a packed weight (rows, columns) after `load`, and why.

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
        return {**told, **_on_a_cpu(tokens)}
    processors = device_of(torch.empty(0, device="cuda")).processors
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    return {**told, "kernel": "triton", "why": tiles.why}


def _on_a_cpu(tokens: int) -> dict[str, str]:
    from qat.kernels.packed_linear.cpu import FEW

    reason = cpu_problem()
    if reason is not None:
        return {"kernel": "reference", "why": f"weights are dequantized at every call, slower than BF16: {reason}"}
    few = f"at most {FEW} tokens: codes are decoded in registers"
    many = f"more than {FEW} tokens: slices of dense weights for the library's product, somewhat slower than BF16"
    return {"kernel": "c", "why": few if tokens <= FEW else many}


def _explain_quantized(format: str, tokens: int, rows: int, columns: int, input_format: str) -> dict[str, Any]:
    x, w = lookup(input_format), lookup(format)
    told: dict[str, Any] = {"format": format, "input": input_format, "operator": "qat::quantized_matmul"}
    reason = matmul_problem(x, w)
    if reason is not None:
        return {**told, "kernel": "none", "why": reason}
    if not available():
        packed = explain(format, tokens, rows, columns)
        if packed["kernel"] == "none":
            why = f"weights are held dense, no faster than BF16: {packed['why']}"
            return {**told, "kernel": "reference", "why": why}
        why = f"no product of codes here; inputs are rounded, then qat::packed_linear: {packed['why']}"
        return {**told, "kernel": packed["kernel"], "why": why}
    device = device_of(torch.empty(0, device="cuda"))
    if matmul.block_scaled(x, w, columns, device.capability):
        return {**told, "kernel": "triton", "why": f"block-scaled units, by {matmul.BLOCK_SCALED}=1; never measured"}
    return {**told, "kernel": "triton", "why": matmul.choose(tokens, rows, columns, x, w, device).why}


def explain_all(tokens: int, rows: int, columns: int, input_format: str | None = None) -> list[dict[str, Any]]:
    """`explain` for every format that weights are stored in (float32 scales belong to inputs)."""
    return [explain(name, tokens, rows, columns, input_format) for name, fmt in CATALOG.items() if fmt.scale != "f32"]


def explain_training(format: str) -> dict[str, dict[str, str]]:
    """Per operator of training, what would run it for `format` on this machine after `load`, and why.

    Raises:
        FormatError: no such format.
    """
    fmt = lookup(format)
    problems = {
        "qat::fake_quantize": (training_problem(fmt), "one pass over memory"),
        "qat::fake_quantize_backward": (training_problem(fmt), "one pass over memory, sums in a fixed order"),
        "qat::quantized_linear": (training_problem(fmt), "one pass over the weight, then the library's product"),
        "qat::fake_quantize_input": (input_problem(fmt), "maximum, scale and rounding in one pass over memory"),
        "qat::distill_rows": (None, "loss and gradient of a row of logits together, in place"),
    }
    missing = None if available() else "no GPU with Triton here, or QAT_KERNELS=0"
    told = {}
    for operator, (reason, how) in problems.items():
        why = reason or missing
        told[operator] = {"kernel": "triton" if why is None else "reference", "why": why or how}
    if not available() and cpu_problem(["fake_quantize_input"]) is None:
        from qat.kernels.fake_quantize_input.cpu import computes

        reason, how = problems["qat::fake_quantize_input"]
        why = reason or (None if computes(fmt) else "cpu.c has no instance for its elements or scales")
        told["qat::fake_quantize_input"] = {"kernel": "c" if why is None else "reference", "why": why or how}
    return told
