"""What every operator has to give on a device, as a list of checks: for the tests marked `gpu`, which take a few, and
for benchmarks/contact.py, which runs them all and goes on after a failure.

Each compares with arithmetic on the CPU, in float64 or by the reference: codes, scales and rounded values to the bit,
products and sums by the norm of their error. Nothing is computed before a check runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.kernels.fake_quantize.choose import input_problem as dynamic_problem
from qat.kernels.quantized_matmul import library
from qat.kernels.quantized_matmul.choose import rounded_reason
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import find_scales, quantize
from qat.serving.inputs import dequantize_input
from qat.serving.inputs import problem as input_problem
from qat.serving.matmul import MatmulWeight, hold, quantized_matmul
from qat.serving.packed import pack, packed_linear
from qat.serving.packed import problem as packing_problem
from qat.serving.quantize_pack import quantize_pack_reference
from qat.training.activations import (
    fake_quantize_input,
    fake_quantize_input_reference,
    static_part,
)
from qat.training.losses import chunked
from qat.training.objectives import ForwardKL
from qat.training.ops import (
    fake_quantize_backward_reference,
    fake_quantize_reference,
    quantized_linear_reference,
)
from qat.training.rows import KINDS, reference
from qat.training.scales import effective_scales_backward_reference, effective_scales_reference
from tests.kernels.contact_caches import CACHES, cache_checks, page_checks
from tests.kernels.contact_prompts import prompt_checks
from tests.kernels.holding import ROUNDED, Check, error, normal, same, there

PAIRS = (("int8_token", "int8_channel"), ("fp8_token", "fp8_channel"), ("int8_token", "int4_g128"),
         ("fp8_token", "int4_g128"), ("fp8_token", "mxfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"),
         ("mxfp8", "mxfp8"), ("fp8_g128", "fp8_b128"), ("fp8_tensor", "fp8_channel"))  # fmt: skip
WIDE = ("int4_g128", "nvfp4", "mxfp4", "int8_channel", "int4_g64_asym")  # every way through `packed_linear`
NEIGHBOURS = 2e-3  # share of codes that may be the neighbouring one
ops = torch.ops.qat


@dataclass(frozen=True)
class Sizes:
    """How large: weights (rows, columns), tokens, columns of inputs, a vocabulary, tokens in a cache."""

    weights: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    columns: int
    vocabulary: int
    cached: tuple[int, ...]


# Segments of K and one token; a tall weight; odd rows. 300 tokens are several tiles.
LARGE = Sizes(((4096, 4096), (8448, 1024), (1000, 2048)), (1, 3, 16, 33, 64, 300), 2048, 32001,
              (1, 63, 257, 4099))  # fmt: skip
SMALL = Sizes(((4096, 4096), (100, 640)), (1, 33), 768, 5003, (1, 1029))
TINY = Sizes(((64, 256),), (1, 3), 256, 501, (1, 65))


def checks(device: str, sizes: Sizes) -> Iterator[Check]:
    """All of them; those that differ in the number of tokens follow each other."""
    yield from _packed(device, sizes)
    yield from _products(device, sizes)
    for tokens in (1, 33):
        yield from _codes(device, tokens, sizes.columns)
    yield from _training(device, sizes.columns)
    yield from _losses(device, sizes.vocabulary)
    for pair in CACHES:
        yield from cache_checks(device, pair, sizes.cached)
        yield from page_checks(device, pair, sizes.cached)
    for tokens in sizes.cached:
        yield from prompt_checks(device, tokens)


# --- linear layers ------------------------------------------------------------------------------------------------


def _packed(device: str, sizes: Sizes) -> Iterator[Check]:
    for name, fmt in CATALOG.items():
        if packing_problem(fmt) is not None:
            continue
        for rows, columns in sizes.weights if name in WIDE else sizes.weights[-1:]:
            weight = cache(lambda fmt=fmt, rows=rows, columns=columns: quantize(normal("cpu", rows, columns), fmt))
            held = cache(lambda weight=weight: pack(weight()).to(device))

            def run(tokens: int, dtype: torch.dtype, weight: Any = weight, held: Any = held) -> float:
                dense = weight().dequantize().double()
                x, bias = normal(device, tokens, dense.shape[1], dtype=dtype), normal(device, len(dense), dtype=dtype)
                truth = x.cpu().double() @ dense.T + bias.cpu().double()
                return error(packed_linear(x, held(), bias), truth)

            def alone(held: Any = held, columns: int = columns) -> bool:
                """A row's result is the same in any company, until there are so many that the library multiplies."""
                x = normal(device, 192, columns)
                results = [packed_linear(x[:tokens], held())[:1] for tokens in (1, 16, 17, 64, 192)]
                return all(same(result, results[0]) for result in results)

            def rounded(weight: Any = weight, held: Any = held, columns: int = columns) -> float:
                """Share of weights that a prompt does not find rounded once to BF16, under its global scale."""
                x, dense = torch.eye(columns)[::7][:1200], weight().dequantize()
                found = packed_linear(x.repeat(-(-200 // len(x)), 1).to(device, torch.bfloat16), held())[: len(x)]
                return float((found.cpu() != dense[:, ::7][:, :1200].T.bfloat16()).double().mean())

            what = f"packed_linear {name} {rows}x{columns}"
            for tokens in sizes.tokens:
                yield Check(f"{what} M={tokens}", ROUNDED, lambda t=tokens, run=run: run(t, torch.bfloat16))
            if name in WIDE and device != "cpu":
                yield Check(f"{what} alone", None, alone)
            if device != "cpu":
                yield Check(f"{what} one-hot prompt", NEIGHBOURS, rounded)
            if name in WIDE:
                yield Check(f"{what} float32", 1e-5, lambda run=run: run(3, torch.float32))


def _products(device: str, sizes: Sizes) -> Iterator[Check]:
    for x_name, w_name in PAIRS:
        for rows, columns in sizes.weights:
            weight = cache(lambda w=w_name, r=rows, c=columns: quantize(normal("cpu", r, c), lookup(w)))

            def run(tokens: int, x_name: str = x_name, weight: Any = weight) -> float:
                dense, held, fmt = weight().dequantize(), hold(weight()), lookup(x_name)
                x = normal("cpu", tokens, dense.shape[1])
                static = static_part(fmt, x.abs().amax().float())
                codes, scales = ops.quantize_input(x, static, x_name)
                truth = dequantize_input(codes, scales, None, x_name).double() @ dense.double().T
                moved = MatmulWeight(
                    held.format, held.columns, held.codes.to(device), held.scales.to(device), held.global_scale
                )
                given = there(device, codes, scales)
                return error(quantized_matmul(*given, moved, input_format=x_name, dtype=torch.bfloat16), truth)

            many = 520  # of which some are the library's
            shape = many, rows, columns, torch.bfloat16, library.HOPPER
            for tokens in (*sizes.tokens, *((many,) if library.takes(x_name, w_name, *shape) else ())):
                name = f"quantized_matmul {x_name} x {w_name} {rows}x{columns} M={tokens}"
                yield Check(name, ROUNDED, lambda t=tokens, run=run: run(t))
            if rounded_reason(lookup(x_name), lookup(w_name), columns, 0) is None:
                continue
            packed = cache(lambda weight=weight: pack(weight()).to(device))

            def rounded(tokens: int, x_name: str = x_name, weight: Any = weight, packed: Any = packed) -> float:
                """The other way to the same product, which engines take where no units multiply block scales."""
                fmt, dense = lookup(x_name), weight().dequantize()
                x = normal("cpu", tokens, dense.shape[1])
                static = static_part(fmt, x.abs().amax().float())
                truth = dequantize_input(*ops.quantize_input(x, static, x_name), static, x_name).double()
                found = fake_quantize_input(x.to(device), fmt, "vllm", "ste", *there(device, static))
                return error(packed_linear(found, packed()), truth @ dense.double().T)

            for tokens in (sizes.tokens[0], sizes.tokens[-1]):
                name = f"packed_linear {w_name} x rounded {x_name} {rows}x{columns} M={tokens}"
                yield Check(name, ROUNDED, lambda t=tokens, rounded=rounded: rounded(t))


# --- inputs -------------------------------------------------------------------------------------------------------


def _codes(device: str, tokens: int, columns: int) -> Iterator[Check]:
    for name, fmt in CATALOG.items():
        if input_problem(fmt) is not None:
            continue
        x, up = 3 * normal("cpu", tokens, columns), normal("cpu", tokens, columns, seed=1)
        gain = 1 + 0.1 * normal("cpu", columns, seed=2)
        static = static_part(fmt, torch.tensor(12.0))
        given = {
            "quantize_input": (x, static, name),
            "rms_norm_quantize": (x, up, gain, static, 1e-5, name),
            "silu_mul_quantize": (x, up, static, name),
        }
        for operator, arguments in given.items():

            def run(operator: str = operator, arguments: Any = arguments) -> float | bool:
                found, truth = getattr(ops, operator)(*there(device, *arguments)), getattr(ops, operator)(*arguments)
                if operator == "quantize_input":
                    return same(found, truth)
                codes = [result[0].cpu().view(torch.uint8) for result in (found, truth)]
                assert len(found) < 3 or same(found[2], truth[2]), "another residual"
                return float((codes[0] != codes[1]).double().mean())

            limit = None if operator == "quantize_input" else NEIGHBOURS
            yield Check(f"{operator} {name} M={tokens}", limit, run)


# --- training -----------------------------------------------------------------------------------------------------


def _training(device: str, columns: int) -> Iterator[Check]:
    for name, fmt in CATALOG.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield from _fake(device, name, fmt, columns, dtype)
        if fmt.block[0] in (0, 1) and dynamic_problem(fmt) is None:
            x, static = normal("cpu", 65, columns), static_part(fmt, torch.tensor(4.0))

            def dynamic(x: Tensor = x, static: Tensor | None = static, name: str = name) -> bool:
                given = (x, static, name, "clipped")
                return same(ops.fake_quantize_input(*there(device, *given)), fake_quantize_input_reference(*given))

            yield Check(f"fake_quantize_input {name}", None, dynamic)


def _fake(device: str, name: str, fmt: Format, columns: int, dtype: torch.dtype) -> Iterator[Check]:
    @cache
    def given() -> tuple[Any, ...]:
        weight = normal("cpu", 130, columns, dtype=dtype)
        scales = find_scales(weight, fmt)
        one = scales.effective()
        return weight, one * 1.01, one, scales.offset, scales.choice

    def forward() -> bool:
        arguments = (*given(), name, "ste", True)
        return same(ops.fake_quantize(*there(device, *arguments)), fake_quantize_reference(*arguments))

    def backward() -> float:
        weight, divisor, one, zeros, choice = given()
        grad = normal("cpu", *weight.shape, dtype=dtype, seed=1)
        y = fake_quantize_reference(weight, divisor, one, zeros, choice, name, "ste", True)
        arguments = (grad, weight, y, divisor, one, zeros, name, "clipped", [True, True, True])
        found = ops.fake_quantize_backward(*there(device, *arguments))
        return max(map(error, found, fake_quantize_backward_reference(*arguments)))

    def linear() -> float:
        weight, divisor, one, zeros, choice = given()
        x = normal("cpu", 5, columns, dtype=dtype, seed=2)
        arguments = (x, weight, None, divisor, one, zeros, choice, name, True)
        found, kept = ops.quantized_linear(*there(device, *arguments))
        truth, expected = quantized_linear_reference(*arguments)
        assert kept is None or expected is None or same(kept, expected), "another weight"
        return error(found, truth)

    def scales() -> bool:
        """Exponentials are those of the device."""
        start, log = given()[2].to(device), 0.1 * normal(device, *given()[2].shape, dtype=torch.float32, seed=3)
        arguments = (start, log, log, None, name)
        found, truth = ops.effective_scales(*arguments), effective_scales_reference(*arguments)
        return same(found, truth)

    def scales_backward() -> bool:
        start, log = given()[2].to(device), 0.1 * normal(device, *given()[2].shape, dtype=torch.float32, seed=3)
        arguments = (start, log, start, log, log)
        return same(ops.effective_scales_backward(*arguments), effective_scales_backward_reference(*arguments))

    def packing() -> bool:
        weight, divisor, _, zeros, _ = given()
        arguments = (weight, divisor, zeros, name)
        return same(ops.quantize_pack(*there(device, *arguments)), quantize_pack_reference(*arguments))

    kind = str(dtype).removeprefix("torch.")
    yield Check(f"fake_quantize {name} {kind}", None, forward)
    yield Check(f"fake_quantize_backward {name} {kind}", 2e-5 if dtype == torch.float32 else ROUNDED, backward)
    if dtype == torch.float32:
        yield Check(f"effective_scales {name}", None, scales)
        yield Check(f"effective_scales_backward {name}", None, scales_backward)
    yield Check(f"quantized_linear {name} {kind}", 2e-3 if dtype == torch.float32 else 2 * ROUNDED, linear)
    if packing_problem(fmt) is None:
        yield Check(f"quantize_pack {name} {kind}", None, packing)


def _losses(device: str, vocabulary: int) -> Iterator[Check]:
    for kind in KINDS:

        def rows(kind: str = kind) -> float:
            student, teacher = (3 * normal("cpu", 65, vocabulary, seed=seed) for seed in (0, 1))
            targets = torch.arange(65) if kind == "cross_entropy" else None
            other = None if kind == "cross_entropy" else teacher
            exact, work = student.double(), student.to(device)
            truth = reference(exact, None if other is None else other.double(), targets, kind, 1.5, 0.3, 1.0)
            found = ops.distill_rows(work, *there(device, other, targets), kind, 1.5, 0.3, 1.0)
            return max(error(found, truth), error(work, exact) / 2)

        yield Check(f"distill_rows {kind}", 3e-3, rows)

    def head() -> float:
        """The loss over a whole batch: chunks of logits in BF16, their products summed in float32."""
        torch.manual_seed(0)
        student, teacher = (torch.nn.Linear(128, 2003, bias=False).to(device) for _ in range(2))
        teacher = teacher.bfloat16()
        x, targets = normal(device, 1, 700, 128, dtype=torch.float32), torch.zeros(1, 700, dtype=torch.long).to(device)
        gradients = []
        for chunk in (128, 700):
            student.weight.grad, given = None, x.clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                loss = chunked(ForwardKL(), given, student, x.bfloat16(), teacher, targets, chunk)
            loss.backward()
            gradients.append(torch.cat((student.weight.grad.flatten(), given.grad.flatten())))
        return error(*gradients)

    yield Check("distill_rows in chunks", 1e-2, head)
