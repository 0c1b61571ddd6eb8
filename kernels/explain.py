"""What would run on this machine for a format and a shape, and why: `qat kernels`."""

from typing import Any

import torch

from qat.kernels.device import device_of
from qat.kernels.fake_quantize.choose import input_problem, scales_problem
from qat.kernels.fake_quantize.choose import problem as training_problem
from qat.kernels.load import KERNELS, available, cpu_problem
from qat.kernels.npu import npu_problem
from qat.kernels.packed_linear import choose as packed
from qat.kernels.packed_linear.dense import choose as dense
from qat.kernels.quantized_matmul import choose as matmul
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.scale import F32
from qat.serving import panels
from qat.serving.matmul import problem as matmul_problem
from qat.serving.packed import problem as packing_problem
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
    answer: dict[str, Any] = {"format": format, "operator": "qat::packed_linear"}
    reason = packing_problem(fmt)
    if reason is not None:
        return {**answer, "kernel": "none", "why": reason}
    if not available():
        return {**answer, **_on_a_cpu(fmt, tokens)}
    reason = packed.problem(fmt)
    if reason is not None:
        return {**answer, "kernel": "reference", "why": reason}
    if dense.pays(tokens, fmt.element.bits):
        why = f"{tokens} tokens: decoded to dense rows, for the library's product"
        return {**answer, "kernel": "triton", "why": why}
    processors = device_of(torch.empty(0, device="cuda")).processors
    if panels.problem(fmt, rows, columns) is None:
        why = packed.choose_panels(tokens, rows, columns, panels.tile(fmt), processors).why
    else:
        why = packed.choose(tokens, rows, columns, tile(fmt.element.bits), processors).why
    return {**answer, "kernel": "triton", "why": why}


def _on_a_cpu(fmt: Format, tokens: int) -> dict[str, str]:
    from qat.kernels.packed_linear.cpu import problem, road

    reason = cpu_problem() or problem(fmt)
    if reason is not None:
        return {"kernel": "reference", "why": f"weights are dequantized at every call, slower than BF16: {reason}"}
    why = {
        "lanes": "codes are looked up by AVX2 and multiplied in registers or in the cache, weights and sums in float32",
        "registers": "codes are decoded in registers",
        "tiles": "BF16 tokens: blocks of the weight are decoded in the cache and multiplied there by AMX",
        "dots": "BF16 tokens: rows are decoded in the cache and multiplied there by AVX-512 BF16",
        "slices": "slices of dense weights for the library's product, somewhat slower than BF16",
    }[road(tokens, torch.bfloat16)]
    return {"kernel": "c", "why": f"{tokens} token{'s' * (tokens != 1)}: {why}"}


def _explain_quantized(format: str, tokens: int, rows: int, columns: int, input_format: str) -> dict[str, Any]:
    x, w = lookup(input_format), lookup(format)
    answer: dict[str, Any] = {"format": format, "input": input_format, "operator": "qat::quantized_matmul"}
    reason = matmul_problem(x, w)
    if reason is not None:
        return {**answer, "kernel": "none", "why": reason}
    if not available():
        alone = explain(format, tokens, rows, columns)
        if alone["kernel"] == "none":
            why = f"weights are dense, no faster than BF16: {alone['why']}"
            return {**answer, "kernel": "reference", "why": why}
        why = f"no product of codes here; inputs are rounded, then qat::packed_linear: {alone['why']}"
        return {**answer, "kernel": alone["kernel"], "why": why}
    reason = matmul.problem(x, w)
    if reason is not None:
        return {**answer, "kernel": "reference", "why": reason}
    device = device_of(torch.empty(0, device="cuda"))
    reason = matmul.rounded_reason(x, w, columns, device.capability)
    if reason is not None:
        alone = explain(format, tokens, rows, columns)
        return {**alone, "input": input_format, "why": f"{reason}; {alone['why']}"}
    if matmul.block_scaled_problem(x, w, columns, device.capability) is None:
        return {**answer, "kernel": "triton", "why": "units that multiply block scales themselves; never measured"}
    return {**answer, "kernel": "triton", "why": matmul.choose(tokens, rows, columns, x, w, device).why}


def explain_all(tokens: int, rows: int, columns: int, input_format: str | None = None) -> list[dict[str, Any]]:
    """`explain` for every format that weights are stored in (float32 scales belong to inputs)."""
    return [explain(name, tokens, rows, columns, input_format) for name, fmt in CATALOG.items() if fmt.scale is not F32]


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
        "qat::effective_scales": (
            scales_problem(fmt.scale),
            "one launch after PyTorch's exponentials",
        ),
        "qat::effective_scales_backward": (None, "their gradients, likewise"),
        "qat::fake_quantize_input": (input_problem(fmt), "maximum, scale and rounding in one pass over memory"),
        "qat::distill_rows": (None, "loss and gradient of a row of logits together, in place"),
    }
    missing = None if available() else "no GPU with Triton here, or QAT_KERNELS=0"
    answer = {}
    for operator, (reason, how) in problems.items():
        why = reason or missing
        answer[operator] = {"kernel": "triton" if why is None else "reference", "why": why or how}
    if not available() and cpu_problem(["fake_quantize_input"]) is None:
        from qat.kernels.fake_quantize_input.cpu import problem

        why, how = problem(fmt), problems["qat::fake_quantize_input"][1]
        answer["qat::fake_quantize_input"] = {"kernel": "c" if why is None else "reference", "why": why or how}
    return answer


def explain_all_training() -> dict[str, dict[str, dict[str, str]]]:
    """`explain_training` for every format."""
    return {name: explain_training(name) for name in CATALOG}


def lines(answers: list[dict[str, Any]], sizes: tuple[int, int, int], input_format: str | None) -> list[str]:
    """What `qat kernels` prints of `explain_all`."""
    tokens, rows, columns = sizes
    found = [f"{tokens} token(s) in {input_format or '16 bits'} times packed weights of {rows} x {columns}:"]
    found += [f"{answer['format']:<20}{answer['kernel']:<11}{answer['why']}" for answer in answers]
    where = ", on GPUs" if input_format else ""
    return [*found, "", f"of {answers[0]['operator']}, which `qat generate` and `qat serve` run{where}", for_npus()]


def for_npus() -> str:
    """What there is for Ascend NPUs, and why it does not run here."""
    operators = ", ".join(name for name, files in KERNELS.items() if "npu" in files)
    return f"for Ascend NPUs: {operators}; frontend-checked only, no NPU has run them ({npu_problem() or 'ready here'})"


def training_lines(answers: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """What `qat kernels --training` prints."""
    found = ["what `qat train` runs here, by format and operator:"]
    for name, by_operator in answers.items():
        kinds: dict[tuple[str, str], list[str]] = {}
        for operator, answer in by_operator.items():
            kinds.setdefault((answer["kernel"], answer["why"]), []).append(operator.removeprefix("qat::"))
        found += [f"{name:<20}{kernel:<11}{', '.join(what)}: {why}" for (kernel, why), what in kinds.items()]
    return found
