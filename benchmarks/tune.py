"""Measures tiles of the Triton products on this GPU and writes kernels/tuned/<GPU>.json, which overrides the rules.

Every candidate computes the product of the closed-form rule (compared once, else it is dropped) and is timed with
a cold L2 cache; where none beats the rule by --gain, the entry says that the rule stays. Pieces of K stay as they are,
so that a table never changes the order of sums. Candidates that do not compile or do not fit are counted.

    python benchmarks/tune.py [--formats int4_g128,nvfp4,mxfp4] [--pairs fp8_token:fp8_channel] [--tokens 1,16,64]
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from layers import LAYERS
from rich.progress import Progress
from torch import Tensor
from triton.testing import do_bench

from qat.kernels import tuned
from qat.kernels.load import load
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.inputs import quantize_input
from qat.serving.matmul import hold, quantized_matmul
from qat.serving.packed import pack, packed_linear
from qat.training.activations import static_part

CLOSE = 2.0**-6  # of the largest result: BF16 sums in another order
CANDIDATES = [
    tuned.Launch(*values) for values in itertools.product((64, 128), (16, 32, 64, 128, 256), (4, 8), (2, 3, 4))
]


@contextmanager
def trial(name: str, tokens: int, launch: tuned.Launch | None) -> Iterator[None]:
    """`launch` for one product, or the rule, whatever the GPU's table says."""
    before = tuned.table
    tuned.table = lambda gpu: ("trial", {name: {tokens: launch}})  # type: ignore[assignment]  # without its cache
    try:
        yield
    finally:
        tuned.table = before


def products(
    formats: list[str], pairs: list[str], tokens: list[int], layers: dict[str, tuple[int, int]], device: str
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Case, tokens and call of every product that is asked for and possible."""
    for (rows, columns), names in itertools.product(layers.values(), [*formats, *pairs]):
        weight = torch.randn(rows, columns, device=device)
        given, _, name = names.rpartition(":")
        if not all(lookup(part).divides(columns) for part in (given, name) if part):
            continue
        q = quantize(weight, lookup(name))
        held = hold(q) if given else None
        packed = None if given else pack(q)
        for count in tokens:
            x = torch.randn(count, columns, device=device).bfloat16()
            if packed is not None:
                yield tuned.case("packed_linear", name, rows, columns), count, partial(packed_linear, x, packed)
                continue
            codes, scales = quantize_input(x, given, static_part(lookup(given), x.abs().amax().float()))
            call = partial(quantized_matmul, codes, scales, held, input_format=given, dtype=torch.bfloat16)
            yield tuned.case("quantized_matmul", f"{given} x {name}", rows, columns), count, call


def best(
    name: str, tokens: int, call: Callable[[], Tensor], timed: Callable[[Callable[[], Tensor]], float]
) -> tuple[tuned.Launch | None, float, float, int]:
    """The fastest candidate or None, its time, the rule's time, and how many candidates could not be used."""
    with trial(name, tokens, None):
        expected, rule = call().float(), timed(call)
    found, least, refused = None, float("inf"), 0
    for launch in CANDIDATES:
        if launch.block_m > max(16, triton.next_power_of_2(tokens)):
            continue
        with trial(name, tokens, launch):
            try:
                error = float((call().float() - expected).abs().max())
                if not error <= CLOSE * float(expected.abs().max()):
                    raise RuntimeError(f"wrong by {error}")
                us = timed(call)
            except Exception as reason:  # compilers and drivers raise what they like; the next candidate may do
                refused += 1
                print(f"{name}, {tokens} tokens, {launch}: {str(reason).splitlines()[0][:100]}", file=sys.stderr)
                continue
        if us < least:
            found, least = launch, us
    return found, least, rule, refused


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int4_g128,nvfp4,mxfp4", help="of weights with 16-bit activations")
    parser.add_argument("--pairs", default="", help="INPUT:WEIGHT,... for products of codes")
    parser.add_argument("--tokens", default="1,16,64,256,4096")
    parser.add_argument("--gain", type=float, default=1.03, help="how much faster than the rule an entry must be")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; the tables are measured, so there is nothing to write")
    load()
    gpu = torch.cuda.get_device_name(0)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = f"commit {done.stdout.strip() or 'unknown'}, triton {triton.__version__}, torch {torch.__version__}"
    tokens = [int(count) for count in arguments.tokens.split(",")]
    names = (arguments.formats.split(","), [pair for pair in arguments.pairs.split(",") if pair])
    total = len(LAYERS["large"]) * len(tokens) * sum(map(len, names))
    launches: dict[str, dict[str, Any]] = {}
    with torch.inference_mode(), Progress() as progress:
        task = progress.add_task("measuring tiles", total=total)
        for name, count, call in products(*names, tokens, LAYERS["large"], "cuda"):
            found, us, rule, refused = best(
                name, count, call, lambda call: 1000 * float(do_bench(call, return_mode="median"))
            )
            progress.console.print(f"{name:<50}{count:>6}{rule:>9.1f} us -> {us:>8.1f} us {found} ({refused} refused)")
            wins = found is not None and us * arguments.gain < rule
            launches.setdefault(name, {})[str(count)] = list(found) if wins else None
            progress.advance(task)
    path = tuned.file(gpu)
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("about") == about:  # measured by the same code: another part of the table
        for name, rows in before["launches"].items():
            launches[name] = rows | launches.get(name, {})
    path.write_text(json.dumps({"about": about, "launches": launches}, indent=1), encoding="utf-8")
    tuned.table.cache_clear()
    tuned.table(gpu)  # as every user will read it
    print(f"{sum(map(len, launches.values()))} entries in {path}")


if __name__ == "__main__":
    main()
