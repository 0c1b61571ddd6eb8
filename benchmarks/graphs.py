"""Kernel time and host time of every operator on a GPU, in a minute: a CUDA graph walks over copies of the operands.

The copies are larger than the L2 cache, so that every call reads memory; the graph leaves the host out, whose time per
call is told beside it. operators.py compares with other libraries and takes longer. Cases are compiled by several
processes first; each result is a line of JSON, written as it comes, and one that fails is a result, too.

    python3 benchmarks/graphs.py [--device cuda|cpu] [--seconds 60] [--jobs 8] [--only TEXT] [--out FOLDER]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402  # after the path
from torch.nn import functional  # noqa: E402  # as above

from qat.kernels.load import load  # noqa: E402  # as above
from qat.numbers.catalog import lookup  # noqa: E402  # as above
from qat.numbers.numerics import find_scales, quantize  # noqa: E402  # as above
from qat.serving.attention import RowLayout, cached_attention  # noqa: E402  # as above
from qat.serving.inputs import quantize_input, rms_norm_quantize  # noqa: E402  # as above
from qat.serving.matmul import hold, quantized_matmul  # noqa: E402  # as above
from qat.serving.packed import pack, packed_linear  # noqa: E402  # as above
from qat.training.activations import fake_quantize_input, static_part, vllm_scales  # noqa: E402  # as above
from qat.training.ops import fake_quantize_reference  # noqa: E402, F401  # as above; defines the operators of training
from qat.training.rows import distill_rows  # noqa: E402  # as above

Call = Callable[[], Any]
Case = tuple[str, int, Callable[[], Call]]  # name, bytes that a call has to move, and what makes a call on its own copy
COLD = 160e6  # bytes of copies: three times the L2 cache of an H100
REPLAYS, HOST_CALLS = 7, 200
ops = torch.ops.qat


def cases(device: str) -> Iterator[Case]:
    """In the order of what is wanted most: decoding, training, products, the rest."""
    side = 4096 if device == "cuda" else 128
    source = torch.empty((1 << 29) if device == "cuda" else 1 << 12, dtype=torch.uint8, device=device)
    yield "copy", 2 * source.numel(), lambda: _copy(source)
    layers = ((2 * side, 2 * side), (side, side), (7 * side, side), (side, 7 * side // 2)) if device == "cuda" else (
        (side, side),
    )  # fmt: skip
    groups = [_linear(device, *layer) for layer in layers]
    groups += [_attention(device), _training(device, side), _products(device, 2 * side), _rounded(device, 2 * side)]
    for group in (*groups, _rows(device, side)):
        try:
            yield from group
        except Exception as error:  # in what comes before a call
            yield group.__name__, 0, partial(_raise, error)


def _raise(error: Exception) -> Call:
    raise error


def normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, device=device).to(dtype)


def _copy(source: torch.Tensor) -> Call:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _linear(device: str, rows: int, columns: int) -> Iterator[Case]:
    weight = normal(device, rows, columns)
    held = {name: pack(quantize(weight, lookup(name))) for name in ("int4_g128", "nvfp4")}
    for tokens in (1, 16, 64, 256, 1024, 4096) if device == "cuda" else (1,):
        x, what = normal(device, tokens, columns), f"{rows}x{columns} M={tokens}"

        def dense(x: torch.Tensor = x) -> Call:
            own = weight.clone()
            return lambda: functional.linear(x, own)

        yield f"BF16 {what}", weight.nbytes, dense
        for name, packed in held.items():

            def call(x: torch.Tensor = x, packed: Any = packed) -> Call:
                own = replace(packed, words=packed.words.clone(), scales=packed.scales.clone())
                return lambda: packed_linear(x, own)

            yield f"packed_linear {name} {what}", packed.nbytes, call


def _products(device: str, side: int) -> Iterator[Case]:
    weight = normal(device, side, side)
    for x_name, w_name in (("int8_token", "int8_channel"), ("fp8_token", "fp8_channel"), ("nvfp4", "nvfp4")):
        held = hold(quantize(weight, lookup(w_name)))
        for tokens in (1, 16, 4096) if device == "cuda" else (1,):
            x = normal(device, tokens, side)
            codes, scales = quantize_input(x, x_name, static_part(lookup(x_name), x.abs().amax().float()))
            given = {"input_format": x_name, "dtype": torch.bfloat16}

            def call(codes: Any = codes, scales: Any = scales, held: Any = held, given: Any = given) -> Call:
                own = replace(held, codes=held.codes.clone(), scales=held.scales.clone())
                return lambda: quantized_matmul(codes, scales, own, **given)

            yield f"quantized_matmul {x_name} x {w_name} {side}x{side} M={tokens}", held.codes.nbytes, call
    if device == "cuda":
        yield from _by_the_library(device, weight, 4096)


def _by_the_library(device: str, weight: torch.Tensor, tokens: int) -> Iterator[Case]:
    """8-bit products as the library has them, FP8 with precise sums and with fast ones."""
    x, ones = normal(device, tokens, weight.shape[1]), torch.ones(max(tokens, len(weight)), 1, device=device)
    what = f"{len(weight)}x{weight.shape[1]} M={tokens}"

    def fp8(fast: bool) -> Call:
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        given = {"scale_a": ones[:tokens], "scale_b": ones[: len(weight)].t(), "out_dtype": torch.bfloat16}
        return lambda: torch._scaled_mm(a, b.t(), use_fast_accum=fast, **given)

    def int8() -> Call:
        a, b = (30 * x.clamp(-4, 4)).to(torch.int8), (30 * weight.clamp(-4, 4)).to(torch.int8)
        return lambda: torch._int_mm(a, b.t())

    yield f"_scaled_mm, precise sums, {what}", weight.numel(), partial(fp8, False)
    yield f"_scaled_mm, fast sums, {what}", weight.numel(), partial(fp8, True)
    yield f"_int_mm {what}", weight.numel(), int8


def _rounded(device: str, side: int) -> Iterator[Case]:
    """NVFP4 times NVFP4 where no units multiply block scales: rounded inputs, packed weights."""
    weight = normal(device, side, side)
    fmt = lookup("nvfp4")
    held = pack(quantize(weight, fmt))
    for tokens in (1, 16, 4096) if device == "cuda" else (1,):
        x = normal(device, tokens, side)
        static = static_part(fmt, x.abs().amax().float())

        def call(x: Any = x, static: Any = static) -> Call:
            own = replace(held, words=held.words.clone(), scales=held.scales.clone())
            return lambda: packed_linear(fake_quantize_input(x, fmt, "vllm", "ste", static), own)

        yield f"packed_linear nvfp4 x rounded nvfp4 {side}x{side} M={tokens}", held.nbytes, call


def _attention(device: str) -> Iterator[Case]:
    """A step of decoding of 8 sequences of 32768 tokens, 32 query heads to 8 heads of 128 columns. The numbers
    repeat, so that making them takes no memory worth mentioning."""
    batch, tokens, repeats = (8, 1024, 32) if device == "cuda" else (2, 64, 1)
    query, one = normal(device, batch, 32, 1, 128), normal(device, 1, 8, tokens, 128)
    what = f"{batch}x{tokens * repeats}"

    def dense() -> Call:
        keys, values = one.repeat(batch, 1, repeats, 1), one.repeat(batch, 1, repeats, 1)
        return lambda: functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    yield f"BF16 attention {what}", 2 * batch * repeats * one.nbytes, dense
    for name in ("fp8_tensor", "int8_token", "int4_token", "nvfp4", "fp8_token", "int8_tensor"):
        layout = RowLayout(lookup(name), 128)
        static = static_part(layout.format, one.abs().amax().float())
        rows = layout.join(quantize(one, layout.format, vllm_scales(one, layout.format, static)))

        def call(rows: Any = rows, static: Any = static, name: str = name) -> Call:
            keys, values = rows.repeat(batch, 1, repeats, 1), rows.repeat(batch, 1, repeats, 1)
            return lambda: cached_attention(
                query, keys, values, None, static, static, 128, 128**-0.5, False, name, name
            )

        yield f"cached_attention {name} {what}", 2 * batch * repeats * rows.nbytes, call


def _training(device: str, side: int) -> Iterator[Case]:
    for name in ("nvfp4", "int4_g128"):
        for dtype in (torch.bfloat16, torch.float32):
            weight = normal(device, side, side, dtype=dtype)
            one = find_scales(weight, lookup(name)).effective()

            def call(weight: Any = weight, one: Any = one, name: str = name) -> Call:
                own = weight.clone()
                return lambda: ops.fake_quantize(own, one, one, None, None, name, "ste", True)

            def back(weight: Any = weight, one: Any = one, name: str = name) -> Call:
                own, grad = weight.clone(), torch.ones_like(weight)
                needs = [True, True, True]
                return lambda: ops.fake_quantize_backward(grad, own, own, one, one, None, name, "ste", needs)

            kind = str(dtype).removeprefix("torch.")
            yield f"fake_quantize {name} {side}x{side} {kind}", 2 * weight.nbytes, call
            yield f"fake_quantize_backward {name} {side}x{side} {kind}", 4 * weight.nbytes, back
    x = normal(device, 2 * side, side)
    for name in ("nvfp4", "fp8_token", "int8_token"):
        static = static_part(lookup(name), torch.tensor(6.0, device=device))

        def dynamic(static: Any = static, name: str = name) -> Call:
            own = x.clone()
            return lambda: ops.fake_quantize_input(own, static, name, "ste")

        yield f"fake_quantize_input {name} {2 * side}x{side}", 2 * x.nbytes, dynamic


def _rows(device: str, side: int) -> Iterator[Case]:
    for vocabulary in (49152, 128256) if device == "cuda" else (501,):
        student, teacher = normal(device, side // 4, vocabulary), normal(device, side // 4, vocabulary)

        def loss(student: Any = student, teacher: Any = teacher) -> Call:
            own = student.clone()
            return lambda: distill_rows(own, teacher, None, "forward_kl")

        yield f"distill_rows forward_kl {side // 4}x{vocabulary}", 3 * student.nbytes, loss
    x, gain = normal(device, 2 * side, side), normal(device, side)
    for name in ("int8_token", "fp8_token", "nvfp4"):
        static = static_part(lookup(name), torch.tensor(6.0, device=device))

        def norm(static: Any = static, name: str = name) -> Call:
            own = x.clone()
            return lambda: rms_norm_quantize(own, None, gain, 1e-5, name, static)

        yield f"rms_norm_quantize {name} {2 * side}x{side}", 3 * x.numel(), norm


def measured(device: str, size: int, make: Callable[[], Call]) -> dict[str, float]:
    """Microseconds of the device and of the host per call."""
    if device == "cpu":  # a rehearsal
        call = make()
        began = time.perf_counter()
        call()
        return {"us": 1e6 * (time.perf_counter() - began)}
    calls = [make() for _ in range(max(2, min(40, int(COLD // size) + 1)))]
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        calls[0]()
    host = 1e6 * (time.perf_counter() - began) / HOST_CALLS
    torch.cuda.synchronize()
    return {"us": statistics.median(times[2:]), "host_us": host}


def compile_all(device: str, share: int, shares: int, only: str) -> None:
    """Call every case of a share once, for Triton's cache."""
    for index, (name, _, make) in enumerate(cases(device)):
        if index % shares == share and only in name:
            try:
                make()()
            except Exception as error:  # told where it is timed
                print(f"{name}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    """Compile in parallel, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="begin no case after these (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for times.jsonl")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began, device = time.perf_counter(), arguments.device
    if device == "cuda" and "cuda" not in load():
        raise SystemExit("no kernels for cuda here: torch.cuda or Triton is missing, or QAT_KERNELS=0")
    if arguments.share is not None:
        compile_all(device, arguments.share, arguments.jobs, arguments.only)
        return
    if arguments.jobs > 1:
        command = [sys.executable, __file__, *sys.argv[1:], "--jobs", str(arguments.jobs), "--share"]
        for process in [subprocess.Popen([*command, str(i)]) for i in range(arguments.jobs)]:
            process.wait()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with torch.inference_mode(), (arguments.out / "times.jsonl").open("w") as file:
        for name, size, make in cases(device):
            if arguments.only not in name:
                continue
            if time.perf_counter() - began > arguments.seconds:
                print(f"{arguments.seconds:g} s are over: the rest, from {name} on, is not timed")
                break
            try:
                row: dict[str, Any] = {"what": name, "bytes": size, **measured(device, size, make)}
                said = f"{row['us']:9.1f} us {size / row['us'] / 1e6:6.2f} TB/s  host {row.get('host_us', 0):6.1f} us"
            except Exception as error:  # the next may run
                row, failed = {"what": name, "error": f"{type(error).__name__}: {str(error)[-500:]}"}, failed + 1
                said = f"FAILED {row['error'][:200]}"
            print(f"{name:<60}{said}", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
