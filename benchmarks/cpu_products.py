"""Products with packed weights on a CPU, one thread, against torch's dense product: medians of the ratios of turns.

Contenders take turns and every turn gives a ratio, of wall time and of the processor time of the thread: the second is
what counts on a machine that others use. QAT_CPU_ISA (with ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY for torch) asks
for fewer instructions than the processor has.

    python benchmarks/cpu_products.py [--shape 4096x4096] [--tokens 1,4,16] [--formats int4_g64,nvfp4] [--dtype float32]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from qat.kernels.load import load
from qat.kernels.packed_linear.cpu import road
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.packed import pack, packed_linear

COLD_BYTES = 96e6  # of dense weights that rotate


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    wall, own = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - wall, time.thread_time() - own


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="rows x columns")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--formats", default="int4_g64,int4_g128,nvfp4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load()
    rows, columns = map(int, arguments.shape.split("x"))
    dtype = getattr(torch, arguments.dtype)
    weights = [torch.randn(rows, columns) for _ in range(max(2, int(COLD_BYTES / (2 * rows * columns))))]
    packed = {name: [pack(quantize(w, lookup(name))) for w in weights] for name in arguments.formats.split(",")}
    dense = [weight.to(dtype) for weight in weights]
    print(f"| tokens | road | dense {arguments.dtype}, ms | " + " | ".join(packed) + " |")
    print("|---:|---|---:|" + "---:|" * len(packed))
    for tokens in map(int, arguments.tokens.split(",")):
        x, base, ratios = torch.randn(tokens, columns).to(dtype), [], {name: [] for name in packed}
        with torch.inference_mode():
            for turn in range(arguments.repeats + 1):
                at = turn % len(dense)
                wall, own = _seconds(partial(functional.linear, x, dense[at]))
                for name, many in packed.items():
                    found = _seconds(partial(packed_linear, x, many[at]))
                    if turn:
                        ratios[name].append((wall / found[0], own / found[1]))
                base.append(own)
        cells = [" / ".join(f"{statistics.median(v):.2f}x" for v in zip(*of, strict=True)) for of in ratios.values()]
        told = f"{1000 * statistics.median(base[1:]):.2f}"
        print(f"| {tokens} | {road(tokens, dtype)} | {told} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
