"""Our kernels beside what else this machine has for the same product: times, ratios, bandwidth, a plot and JSON.

On a GPU every call starts with a cold L2 cache (`triton.testing.do_bench` flushes it) and the median counts; on a CPU
contenders take turns, operands rotate through more memory than the caches hold, and the median counts. Data is random.
Every peer that is installed (benchmarks/peers.py) runs beside ours, on the same codes, once its result is right; those
that are not installed, or do not take a shape, are named with the reason: nothing is left out silently.

    python benchmarks/operators.py [--device cuda|cpu] [--only packed,matmul,rows] [--layers small|large]
                                 [--peers all|none|gemlite,vllm ...] [--out FOLDER]
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers import LAYERS
from measurements import Row, plot, table, write
from peers import PACKAGES, Peers, choose
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from qat.kernels.explain import explain
from qat.kernels.load import load
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, find_scales, quantize
from qat.serving.inputs import dequantize_input, quantize_input
from qat.serving.matmul import hold, quantized_matmul
from qat.serving.packed import PackedWeight, pack, packed_linear
from qat.training.activations import static_part
from qat.training.ops import fake_quantize_reference
from qat.training.rows import reference as reference_rows

Call = Callable[[], Any]
TOKENS = {"cuda": (1, 4, 16, 64, 128, 256, 1024, 4096), "cpu": (1, 4, 16, 64, 256, 1024)}
WEIGHTS = ("int4_g128", "int4_g64", "nvfp4", "mxfp4", "int8_channel", "mxfp8")
PAIRS = (  # input, weight
    ("int8_token", "int8_channel"),
    ("fp8_token", "fp8_channel"),
    ("int8_token", "int4_g128"),
    ("fp8_token", "int4_g128"),
    ("fp8_token", "mxfp4"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
)
COLD_BYTES = 64 << 20  # of operands that rotate on a CPU


def timed(device: str, calls: dict[str, list[Call]], repeats: int) -> dict[str, float]:
    """Median microseconds per contender; each brings several calls on different memory, used in turn. One that fails is
    left out and said: what the others answered is not lost."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(1 if device == "cuda" else repeats + 2):
        for name in list(times):
            try:
                us = once(device, calls[name][index % len(calls[name])])
            except Exception as error:  # whatever a kernel raises: it has no time
                print(f"{name} fails: {type(error).__name__}: {str(error)[-300:]}", file=sys.stderr, flush=True)
                del times[name]
                continue
            if device == "cuda" or index >= 2:  # a CPU's first calls warm up
                times[name].append(us)
    return {name: statistics.median(values) for name, values in times.items()}


def once(device: str, call: Call) -> float:
    """Microseconds: of one call on a CPU, the median of many on a GPU. Raises what the call raises."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1000 * float(do_bench(call, return_mode="median"))
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


def packed(device: str, layers: dict[str, tuple[int, int]], repeats: int, peers: Peers) -> Iterator[Row]:
    """x times a weight that stays packed, against the BF16 weight and the 4-bit products that torch has."""
    for layer, (rows, columns) in layers.items():
        weight = torch.randn(rows, columns, device=device).bfloat16()
        dense = copies(device, weight.nbytes, weight.clone)
        quantized = {(name,): quantize(weight, lookup(name)) for name in WEIGHTS if lookup(name).divides(columns)}
        others, weights = peers.products("packed", quantized, layer), {}
        for (name,), codes in quantized.items():
            held = pack(codes)
            weights[name] = copies(device, held.nbytes, partial(_copied, held))
        torch_int4 = copies(device, weight.numel() // 2, partial(_torch_int4, rows, columns, device))
        for tokens in TOKENS[device]:
            x = torch.randn(tokens, columns, device=device).bfloat16()
            calls = {"BF16": [partial(functional.linear, x, w) for w in dense]}
            for name, many in weights.items():
                calls[name] = [partial(packed_linear, x, w) for w in many]
            if torch_int4[0] is not None:
                calls["torch int4 g128"] = [partial(call, x) for call in torch_int4 if call is not None]
            given = dict.fromkeys(quantized, (x,))
            with torch.inference_mode():
                found = timed(device, calls, repeats)
                timings = peers.timings(
                    others, given, partial(_product, quantized, x.float()), f"{layer}, {tokens} tokens"
                )
            moved = 2 * tokens * (rows + columns)
            for name, us in found.items():
                size = (
                    weights[name][0].nbytes if name in weights else rows * columns * (2 if name == "BF16" else 0.53125)
                )
                note = f"{explain(name, tokens, rows, columns)['kernel']}" if name in weights else "torch"
                yield Row("packed", layer, f"{rows}x{columns}", tokens, name, us, int(size) + moved, note)
            for timing in timings:
                size = weights[timing.beside[0]][0].nbytes + moved
                yield Row("packed", layer, f"{rows}x{columns}", tokens, *timing.cells(size))


def _product(quantized: dict[tuple[str, ...], QTensor], x: Tensor, which: tuple[str, ...]) -> Tensor:
    return functional.linear(x, quantized[which].dequantize())


def copies(device: str, size: int, make: Callable[[], Any]) -> list[Any]:
    """One on a GPU, whose cache is flushed; on a CPU as many as its caches cannot hold."""
    return [make() for _ in range(1 if device == "cuda" else max(1, COLD_BYTES // size))]


def _copied(weight: PackedWeight) -> PackedWeight:
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return replace(weight, words=weight.words.clone(), scales=weight.scales.clone(), zeros=zeros)


def _torch_int4(rows: int, columns: int, device: str) -> Callable[[Tensor], Tensor] | None:
    """torch's own 4-bit weight-only product on random codes, or None where it does not take the shape."""
    group = 128
    if columns % group:
        return None
    scales = torch.randn(columns // group, rows, 2, device=device).bfloat16()
    if device == "cpu":
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        held = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, held, group, scales)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    held = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, held, group, scales)


def matmul(device: str, layers: dict[str, tuple[int, int]], repeats: int, peers: Peers) -> Iterator[Row]:
    """Codes times codes, against BF16, torch's 8-bit products, and inputs rounded before a packed weight."""
    for layer, (rows, columns) in layers.items():
        weight = torch.randn(rows, columns, device=device)
        pairs = [p for p in PAIRS if all(lookup(name).divides(columns) for name in p)]
        quantized = {pair: quantize(weight, lookup(pair[1])) for pair in pairs}
        held = {pair: hold(codes) for pair, codes in quantized.items()}
        others = peers.products("matmul", quantized, layer)
        dense = weight.bfloat16()
        for tokens in TOKENS[device]:
            x = torch.randn(tokens, columns, device=device).bfloat16()
            calls: dict[str, list[Call]] = {"BF16": [partial(functional.linear, x, dense)]}
            given = {}
            for pair, kept in held.items():
                fmt = lookup(pair[0])
                static = static_part(fmt, x.abs().amax().float())
                codes, scales = quantize_input(x, pair[0], static)
                options = {"input_format": pair[0], "dtype": torch.bfloat16}
                calls[" x ".join(pair)] = [partial(quantized_matmul, codes, scales, kept, **options)]
                given[pair] = (x, codes, scales)
            calls |= _torch_products(x, weight)
            truth = partial(_codes_product, quantized, given)
            with torch.inference_mode():
                found = timed(device, calls, repeats)
                timings = peers.timings(others, given, truth, f"{layer}, {tokens} tokens")
            moved = 2 * tokens * (rows + columns)
            for name, us in found.items():
                size = 2 * rows * columns if name == "BF16" else rows * columns
                yield Row("matmul", layer, f"{rows}x{columns}", tokens, name, us, size + moved)
            for timing in timings:
                yield Row("matmul", layer, f"{rows}x{columns}", tokens, *timing.cells(rows * columns + moved))


def _codes_product(quantized: dict[Any, QTensor], given: dict[Any, Any], pair: tuple[str, ...]) -> Tensor:
    _, codes, scales = given[pair]
    return _product(quantized, dequantize_input(codes, scales, None, pair[0]), pair)


def _torch_products(x: Tensor, weight: Tensor) -> dict[str, list[Call]]:
    """What torch has for 8-bit operands on this device and shape; what it refuses is left out and said."""
    x8, w8 = (t.clamp(-4, 4).to(torch.float8_e4m3fn) for t in (x, weight))
    row_scale, column_scale = (torch.ones(n, 1, device=x.device) for n in (len(x), len(weight)))
    xi, wi = (t.clamp(-4, 4).mul(30).to(torch.int8) for t in (x, weight))
    candidates: dict[str, Call] = {
        "torch._scaled_mm fp8": partial(
            torch._scaled_mm, x8, w8.t(), scale_a=row_scale, scale_b=column_scale.t(), out_dtype=torch.bfloat16
        ),
        "torch._int_mm": partial(torch._int_mm, xi, wi.t()),
    }
    usable = {}
    for name, call in candidates.items():
        try:
            call()
            usable[name] = [call]
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0][:90]
            print(f"{name} does not take {len(x)} x {tuple(weight.shape)}: {reason}", file=sys.stderr)
    return usable


def rows(device: str, layers: dict[str, tuple[int, int]], repeats: int, peers: Peers) -> Iterator[Row]:
    """What is done row by row: fake quantization, inputs to codes after RMSNorm or SiLU, losses over a vocabulary."""
    side, vocabulary = (4096, 128256) if device == "cuda" else (1024, 49152)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).bfloat16()

    x, gain = normal(2 * side, side), normal(side)
    for name in ("int4_g128", "nvfp4", "mxfp4", "fp8_channel"):
        fmt = lookup(name)
        weight = normal(side, side)
        scale = find_scales(weight, fmt).effective()
        given = (weight, scale, scale, None, None, name, "ste", True)
        calls: dict[str, list[Call]] = {
            "reference": [partial(fake_quantize_reference, *given)],
            "ours": [partial(torch.ops.qat.fake_quantize, *given)],
        }
        for contender, us in timed(device, calls, repeats).items():
            yield Row("fake quantize", name, f"{side}x{side}", side, contender, us, 4 * side * side)
    norms = peers.products("rows", {("rms_norm",): None}, "RMSNorm")
    for name in ("int8_token", "fp8_token", "nvfp4", "mxfp4"):
        static = static_part(lookup(name), torch.tensor(6.0, device=device))
        steps = partial(_norm_then_quantize, x, gain, static, name)
        fused = partial(torch.ops.qat.rms_norm_quantize, x, None, gain, static, 1e-5, name)
        for contender, us in timed(device, {"separate": [steps], "fused": [fused]}, repeats).items():
            yield Row("RMSNorm + quantize", name, f"{len(x)}x{side}", len(x), contender, us, 3 * x.numel())
        given = {("rms_norm",): (x, gain, static, name)}
        for timing in peers.timings(norms, given, partial(_norm, x, gain), name):
            yield Row("RMSNorm + quantize", name, f"{len(x)}x{side}", len(x), *timing.cells(3 * x.numel()))
    student, teacher = normal(256, vocabulary), normal(256, vocabulary)
    for kind in ("forward_kl", "jsd", "cross_entropy"):
        targets = torch.arange(256, device=device) if kind == "cross_entropy" else None
        other = None if kind == "cross_entropy" else teacher
        given = (other, targets, kind, 1.0, 0.5, 1.0)
        calls = {
            "reference": [lambda given=given: reference_rows(student.clone(), *given)],
            "ours": [lambda given=given: torch.ops.qat.distill_rows(student.clone(), *given)],
        }
        for contender, us in timed(device, calls, repeats).items():
            yield Row("distill rows", kind, f"256x{vocabulary}", 256, contender, us, 6 * student.numel())
        losses = peers.products("rows", {(kind,): None}, kind)
        arguments = {(kind,): (student, teacher, targets)}
        for timing in peers.timings(losses, arguments, partial(_gradient, student, given), kind):
            yield Row("distill rows", kind, f"256x{vocabulary}", 256, *timing.cells(6 * student.numel()))


def _norm_then_quantize(x: Tensor, gain: Tensor, static: Tensor | None, name: str) -> Any:
    return torch.ops.qat.quantize_input(functional.rms_norm(x, x.shape[-1:], gain, 1e-5), static, name)


def _norm(x: Tensor, gain: Tensor, _: tuple[str, ...]) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], gain.float(), 1e-5)


def _gradient(student: Tensor, given: tuple[Any, ...], _: tuple[str, ...]) -> Tensor:
    logits = student.float()
    reference_rows(logits, *given)
    return logits


FAMILIES = {"packed": packed, "matmul": matmul, "rows": rows}


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = statistics.median(once(device, lambda: target.copy_(source)) for _ in range(1 if device == "cuda" else 9))
    return 2 * source.numel() / us * 1e6


def machine(device: str, peers: Peers) -> dict[str, Any]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    versions = {}
    for package in ("torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": done.stdout.strip() or "unknown",
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        **peers.versions(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", help="packed,matmul,rows (default: all; on a CPU, packed: the others have no kernel there)"
    )
    parser.add_argument("--layers", choices=list(LAYERS), help="default: large on a GPU, small on a CPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls per contender on a CPU")
    parser.add_argument("--peers", type=choose, default="all", help=f"all, none or some of {','.join(PACKAGES)}")
    parser.add_argument("--out", type=Path, help="folder for operators.json and operators.png")
    arguments = parser.parse_args()
    wanted = arguments.only or ("packed" if arguments.device == "cpu" else ",".join(FAMILIES))
    unknown = set(wanted.split(",")) - FAMILIES.keys()
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(FAMILIES)}")
    device, repeats = arguments.device, arguments.repeats
    turns = 1 if device == "cuda" else repeats + 2
    peers = Peers(
        device, lambda call: statistics.median([once(device, call) for _ in range(turns)][-repeats:]), arguments.peers
    )
    if device not in load():
        print(f"no kernels for {device}: the references are timed", file=sys.stderr)
    bandwidth = copy_rate(device)
    about = {**machine(device, peers), "copy_bytes_per_s": bandwidth}
    layers = LAYERS[arguments.layers or ("large" if device == "cuda" else "small")]
    found = measured(wanted.split(","), device, layers, repeats, peers)
    rows: list[Row] = []
    for row in track(found, description="timing", disable=not sys.stderr.isatty()):
        rows.append(row)
        write(arguments.out, about, peers.report(), rows)
    print(json.dumps(about))
    print(table(rows))
    print("\n".join(peers.report()))
    if arguments.out and rows:
        told = f"{about['device']}, torch {about['torch']}, commit {about['commit']}"
        plot(rows, bandwidth, arguments.out / "operators.png", told)


def measured(
    families: list[str], device: str, layers: dict[str, tuple[int, int]], repeats: int, peers: Peers
) -> Iterator[Row]:
    """Rows of every family, layer by layer; one that fails outside of a contender is said and left out."""
    for family in families:
        for some in [{name: shape} for name, shape in layers.items()] if family != "rows" else [{}]:
            try:
                yield from FAMILIES[family](device, some, repeats, peers)
            except Exception:  # the next layer may do
                print(f"{family} {', '.join(some)}: {traceback.format_exc(limit=-3)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
