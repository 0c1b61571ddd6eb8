"""What compiled kernels cost on sm_90, and how long they would take: no GPU is needed, only Triton with its ptxas.

    python benchmarks/compiled.py                  the table of kernels/README.md, as Markdown
    python benchmarks/compiled.py --layers         predicted times of real models' layers
    python benchmarks/compiled.py --check          against what compiled.json keeps for this Triton and ptxas
    python benchmarks/compiled.py --keep           write that
    python benchmarks/compiled.py --fit            fit machine.py's model to benchmarks/results/h200-times.jsonl

Instructions are counted in the machine code, loops as often as a warp walks through them; times are predicted by
machine.py's model. `--only TEXT` takes the kernels whose name holds it.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import triton  # noqa: E402  # after the path
from layers import LAYERS  # noqa: E402  # as above
from machine import (  # noqa: E402  # as above
    H100,
    H200,
    LANES,
    Compiled,
    errors,
    fit,
    floor,
    measured,
    predicted,
    spread,
)

from qat.kernels.cached_attention.choose import choose as choose_attention  # noqa: E402  # as above
from qat.kernels.distill_rows.triton import constants as rows_constants  # noqa: E402  # as above
from qat.kernels.distill_rows.triton import warps as rows_warps  # noqa: E402  # as above
from qat.kernels.fake_quantize import triton as fake  # noqa: E402  # as above
from qat.kernels.fake_quantize.choose import plan  # noqa: E402  # as above
from qat.kernels.fake_quantize_input import triton as dynamic  # noqa: E402  # as above
from qat.kernels.packed_linear.choose import choose_panels  # noqa: E402  # as above
from qat.kernels.prompt_attention.triton import WARPS as PROMPT_WARPS  # noqa: E402  # as above
from qat.kernels.quantize_input.choose import choose as choose_input  # noqa: E402  # as above
from qat.kernels.quantize_input.triton import shares_rows  # noqa: E402  # as above
from qat.kernels.quantized_matmul.choose import choose as choose_matmul  # noqa: E402  # as above
from qat.numbers.catalog import lookup  # noqa: E402  # as above
from qat.serving.attention import RowLayout  # noqa: E402  # as above
from qat.serving.panels import tile  # noqa: E402  # as above
from qat.serving.prompt_attention import KEYS, QUERIES  # noqa: E402  # as above
from tests.kernels import (  # noqa: E402  # as above
    compile_cached_attention,
    compile_distill_rows,
    compile_fake_quantize,
    compile_packed_linear,
    compile_prompt_attention,
    compile_quantize_input,
    compile_quantized_matmul,
)
from tests.kernels.ahead import instructions, loops, resources  # noqa: E402  # as above

KEPT = ROOT / "benchmarks" / "results" / "compiled.json"
TIMES = {name: ROOT / "benchmarks" / "results" / f"{name.lower()}-times.jsonl" for name in ("H200", "H100")}
SINCE_H100 = (
    "packed_linear",
    "fake_quantize nv",
    "fake_quantize int",
    "fake_quantize_input",
)  # other kernels since then
WORSE = 1.02  # of a prediction, or of instructions, beyond which `--check` fails
Case = tuple[str, Callable[[], Compiled]]


@cache
def anatomy(make: Callable[[], Any]) -> tuple[int, tuple[int, ...], int, int, int, int, str]:
    """Instructions in all and of each loop, registers, bytes spilled and shared, bytes that the widest loads of one
    pass ask for, what multiplies. Callables that compile the same kernel are one object."""
    with contextlib.redirect_stdout(io.StringIO()):
        kernel = make()
    lines = instructions(kernel)
    inner = loops(kernel)
    longest = max(inner, key=len) if inner else lines
    sizes = {"128": 16, "64": 8}
    loads = [re.search(r"\bLDG\.E(?:\.\w+)*\.(128|64)\b", line) for line in longest]
    asked = sum(sizes[load.group(1)] for load in loads if load)
    products = ", ".join(sorted(compile_quantized_matmul.products(kernel))) or "-"
    registers, spilled = resources(kernel)
    counts = tuple(len(loop) for loop in inner)
    return len(lines), counts, registers, spilled, kernel.metadata.shared, asked, products


def described(
    what: str, make: Callable[[], Any], blocks: int, warps: int, trips: int, values: float, unit: str, moved: float,
    stages: int = 0, per_loop: bool = False, **more: Any,
) -> Compiled:  # fmt: skip
    """A kernel whose loops run `trips` times; `values` are a thread's, of one trip where the count is that of the
    longest loop (`per_loop`). With `stages`, loads come through shared memory."""
    whole, inner, registers, spilled, shared, asked, products = anatomy(make)
    issued = whole + sum(inner) * (trips - 1)
    per = max(inner) / values if per_loop else issued / values
    under_way = shared * (stages - 1) // stages if stages else asked * warps * LANES
    return Compiled(
        what, blocks, warps, issued, per, unit, registers, spilled, shared, under_way, moved, products, **more
    )


# --- operators --------------------------------------------------------------------------------------------------------


@cache
def _panels(name: str, few: bool) -> Callable[[], Any]:
    tiles = choose_panels(16 if few else 64, 8192, 8192, tile(lookup(name)), H200.processors)
    return partial(compile_packed_linear.compiled_panels, name, 90, tiles)


def panels(name: str, tokens: int, rows: int, columns: int) -> Compiled:
    """`packed_linear` of a weight in panels; the second launch, where there is one, adds the pieces of K."""
    fmt = lookup(name)
    tiles = choose_panels(tokens, rows, columns, tile(fmt), H200.processors)
    steps, per_token = columns // tile(fmt), -(-tokens // tiles.block_m)
    scale = fmt.scale.storage.itemsize / (fmt.group or columns)
    sums = 8 * tiles.pieces * tokens * rows if tiles.pieces > 1 else 0
    return described(
        f"packed_linear {name} {rows}x{columns} M={tokens}", _panels(name, tiles.block_m == 16),
        rows // tiles.block_n * per_token * tiles.pieces, tiles.warps, -(-steps // tiles.pieces),
        tile(fmt) * tiles.block_n / (LANES * tiles.warps), "weight",
        rows * columns * (fmt.element.bits / 8 + scale) + sums + 2 * tokens * (rows + columns), tiles.stages, True,
        operations=2.0 * tokens * rows * columns, launches=1 + (tiles.pieces > 1),
    )  # fmt: skip


@cache
def _dense(name: str) -> Callable[[], Any]:
    return partial(compile_packed_linear.compiled_dense, name, 90, True)


def dense(name: str, rows: int, columns: int) -> Compiled:
    """A weight decoded for the library's product, which is another launch."""
    fmt = lookup(name)
    values = tile(fmt) * 64
    scale = fmt.scale.storage.itemsize / (fmt.group or columns)
    return described(f"decode {name} {rows}x{columns}", _dense(name), rows * columns // values, 4, 1, values / 128,
                     "weight", rows * columns * (fmt.element.bits / 8 + scale + 2))  # fmt: skip


@cache
def _matmul(x: str, w: str, tokens: int, rows: int, columns: int) -> Callable[[], Any]:
    tiles = choose_matmul(tokens, rows, columns, lookup(x), lookup(w), compile_quantized_matmul.DEVICES[90])
    return partial(compile_quantized_matmul.compiled, x, w, compile_quantized_matmul.DEVICES[90], tiles)


def matmul(x: str, w: str, tokens: int, rows: int, columns: int) -> Compiled:
    """`quantized_matmul`."""
    tiles = choose_matmul(tokens, rows, columns, lookup(x), lookup(w), compile_quantized_matmul.DEVICES[90])
    step = tiles.part * tiles.parts
    blocks = -(-rows // tiles.block_n) * -(-tokens // tiles.block_m) * tiles.segments
    kind = "int8" if tiles.operand == "int8" else "fp8" if tiles.operand == "float8" else "bf16"
    return described(
        f"quantized_matmul {x} x {w} {rows}x{columns} M={tokens}", _matmul(x, w, tokens, rows, columns), blocks,
        tiles.warps, -(-columns // step // tiles.segments), step * tiles.block_n / (LANES * tiles.warps), "weight",
        rows * columns * lookup(w).element.bits / 8 + tokens * (columns * lookup(x).element.bits / 8 + 2 * rows),
        tiles.stages, True, operations=2.0 * tokens * rows * columns, kind=kind,
    )  # fmt: skip


@cache
def _attention(name: str) -> Callable[[], Any]:
    return partial(compile_cached_attention.compiled, name, 90)


def attention(name: str, batch: int, tokens: int, heads: int = 8, groups: int = 4) -> Compiled:
    """`cached_attention`: one query per sequence, `groups` query heads to a head of keys."""
    width = compile_cached_attention.WIDTH
    tiles = choose_attention(tokens, heads, groups, H200.processors, exact=False)
    pieces = -(-tokens // tiles.piece)
    moved = 2.0 * batch * heads * tokens * RowLayout(lookup(name), width).bytes
    return described(
        f"cached_attention {name} {batch}x{tokens}", _attention(name), pieces * heads * batch, tiles.warps,
        tiles.piece // tiles.block_t, 2 * width * tiles.block_t / (LANES * tiles.warps), "code", moved, tiles.stages,
        True, launches=1 + (pieces > 1),
    )  # fmt: skip


@cache
def _prompt(causal: bool) -> Callable[[], Any]:
    return partial(compile_prompt_attention.compiled, 128, 90, causal, "*fp16")


def prompt(tokens: int, heads: int = 32, width: int = 128) -> Compiled:
    """`prompt_attention` without a mask: the first of its two loops walks, and scores are multiplied twice as fast as
    values."""
    whole, inner, registers, spilled, shared, _, found = anatomy(_prompt(False))
    walked, steps = min(inner), tokens // KEYS
    sums = 2.0 * heads * tokens**2 * width
    per = walked * LANES * PROMPT_WARPS / (QUERIES * KEYS)
    return Compiled(
        f"prompt_attention 1x{tokens}, {heads} heads", heads * tokens // QUERIES, PROMPT_WARPS,
        whole + walked * (steps - 1), per, "score", registers, spilled, shared, shared * 2 // 3,
        heads * tokens * width * 6.0, found, 1.5 * sums,
    )  # fmt: skip


@cache
def _forward(name: str) -> Callable[[], Any]:
    return partial(compile_fake_quantize.forward, name, plan(lookup(name), 4096, 4096, 4096), 90)


@cache
def _backward(name: str) -> Callable[[], Any]:
    cut = plan(lookup(name), 4096, 4096, 2048, fake.PROGRAMS)
    return partial(compile_fake_quantize.backward, name, cut, 90, "ste", "xdm")


def training(name: str) -> Iterator[Compiled]:
    """`fake_quantize` of a BF16 weight of 4096 x 4096, and its gradients."""
    cut = plan(lookup(name), 4096, 4096, 4096)
    each = cut.tile_rows * cut.tile_columns / (LANES * cut.warps)
    yield described(f"fake_quantize {name} 4096x4096 bfloat16", _forward(name), cut.tiles, cut.warps, 1, each,
                    "value", 4.0 * 2**24)  # fmt: skip
    cut = plan(lookup(name), 4096, 4096, 2048, fake.PROGRAMS)
    trips = -(-cut.segment // cut.tile_columns)
    each = trips * cut.tile_rows * cut.tile_columns / (LANES * cut.warps)
    yield described(f"fake_quantize_backward {name} 4096x4096 bfloat16", _backward(name),
                    -(-cut.rows // cut.tile_rows) * cut.segments, cut.warps, trips, each, "value",
                    8.0 * 2**24)  # fmt: skip


@cache
def _input(name: str) -> Callable[[], Any]:
    return partial(compile_fake_quantize.of_input, name, 4096, 90)


def fake_input(name: str, rows: int = 8192, columns: int = 4096) -> Compiled:
    """`fake_quantize_input`."""
    group = lookup(name).group or columns
    fixed = dynamic.arguments(lookup(name), rows * columns // group, group)
    each = fixed["TILE_ROWS"] * fixed["TILE_COLUMNS"]
    return described(f"fake_quantize_input {name} {rows}x{columns}", _input(name), rows * columns // each,
                     fixed["num_warps"], 1, each / (LANES * fixed["num_warps"]), "value",
                     4.0 * rows * columns)  # fmt: skip


@cache
def _norm(name: str) -> Callable[[], Any]:
    tiles = choose_input(8192, 4096, shares_rows(lookup(name), True), H200.processors)
    return partial(compile_quantize_input.compiled, name, 90, "plain", True, tiles)


def norm(name: str, rows: int = 8192, columns: int = 4096) -> Compiled:
    """`rms_norm_quantize`."""
    fmt = lookup(name)
    tiles = choose_input(rows, columns, shares_rows(fmt, True), H200.processors)
    each = tiles.rows * tiles.block / (LANES * tiles.warps)
    return described(f"rms_norm_quantize {name} {rows}x{columns}", _norm(name), -(-rows // tiles.rows), tiles.warps,
                     1, each, "value", rows * columns * (2 + fmt.element.bits / 8))  # fmt: skip


@cache
def _rows(kind: str, vocabulary: int) -> Callable[[], Any]:
    return partial(compile_distill_rows.compiled, kind, 90, "*bf16", vocabulary)


def rows(kind: str, tokens: int, vocabulary: int) -> Compiled:
    """`distill_rows`: its passes over the logits are loops, each of as many trips."""
    block = rows_constants(kind, vocabulary)["BLOCK"]
    reads = (2 if kind in ("forward_kl", "cross_entropy") else 3) * (1 if kind == "cross_entropy" else 2)
    return described(f"distill_rows {kind} {tokens}x{vocabulary}", _rows(kind, vocabulary), tokens, rows_warps(block),
                     -(-vocabulary // block), vocabulary / (LANES * rows_warps(block)), "logit",
                     2.0 * (reads + 1) * tokens * vocabulary)  # fmt: skip


def cases() -> Iterator[Case]:
    """Every kernel of the table, by name."""
    for name in ("int4_g128", "nvfp4", "mxfp4"):
        for tokens in (1, 16, 64):
            yield f"packed_linear {name} 8192x8192 M={tokens}", partial(panels, name, tokens, 8192, 8192)
        yield f"decode {name} 8192x8192", partial(dense, name, 8192, 8192)
    for x, w, tokens in (("int8_token", "int8_channel", 16), ("int8_token", "int8_channel", 4096),
                         ("fp8_token", "fp8_channel", 16), ("int8_token", "int4_g128", 16),
                         ("fp8_token", "mxfp4", 16)):  # fmt: skip
        yield f"quantized_matmul {x} x {w} 8192x8192 M={tokens}", partial(matmul, x, w, tokens, 8192, 8192)
    for name in ("fp8_tensor", "int8_token", "int4_token", "nvfp4"):
        yield f"cached_attention {name} 8x32768", partial(attention, name, 8, 32768)
    yield "prompt_attention 1x8192, 32 heads", partial(prompt, 8192)
    for name in ("int4_g128", "nvfp4"):
        for at in range(2):
            yield f"fake_quantize {name}", lambda name=name, at=at: list(training(name))[at]
    for name in ("fp8_token", "nvfp4"):
        yield f"fake_quantize_input {name}", partial(fake_input, name)
    for name in ("int8_token", "nvfp4"):
        yield f"rms_norm_quantize {name}", partial(norm, name)
    yield "distill_rows forward_kl", partial(rows, "forward_kl", 1024, 128256)
    yield "distill_rows jsd", partial(rows, "jsd", 1024, 128256)


# --- what is told -----------------------------------------------------------------------------------------------------


def table(kernels: list[Compiled]) -> str:
    """Markdown; per processor where nothing else is said."""
    times = {name: measured(path) for name, path in TIMES.items()}
    lines = ["| kernel | instructions | registers | blocks | shared memory, under way | product | H200 floor | "
             "predicted | measured | H100 predicted | measured |",
             "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for each in kernels:
        held, told = each.held(H200), []
        for machine in (H200, H100):
            found = times[machine.name].get(each.what)
            known = found is not None and not (machine is H100 and each.what.startswith(SINCE_H100))
            told += [f"{predicted(each, machine):.0f} us", f"{found:.0f} us" if known else "-"]
        lines.append(
            f"| {each.what} | {each.per:.1f} per {each.unit} | {each.registers} | {held} | "
            f"{held * each.shared / 1024:.0f}, {held * each.under_way / 1024:.0f} KB | {each.products} | "
            f"{floor(each, H200):.0f} us | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def layers() -> str:
    """Predicted microseconds of real models' layers, as Markdown."""
    lines = ["| layer, H200 | INT4 g128, M=1 | M=16 | M=64 | NVFP4, M=1 | M=16 | M=64 |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, (height, columns) in LAYERS["models"].items():
        found = [predicted(panels(fmt, tokens, height, columns), H200)
                 for fmt in ("int4_g128", "nvfp4") for tokens in (1, 16, 64)]  # fmt: skip
        lines.append(f"| {name} {height} x {columns} | " + " | ".join(f"{time:.1f}" for time in found) + " |")
    return "\n".join(lines)


def toolchain() -> str:
    """Versions that decide what is compiled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    told = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV(\d\S+)", told)
    return f"triton {triton.__version__}, ptxas {version.group(1) if version else '?'}"


def worse(kernels: list[Compiled], kept: dict[str, dict[str, Any]]) -> list[str]:
    """In words, what takes longer, issues more or spills more than is kept."""
    found = []
    for now in kernels:
        if now.what not in kept:
            found.append(f"{now.what}: nothing is kept of it; run with --keep")
            continue
        before = Compiled(**kept[now.what])
        pairs = {"predicted us": (predicted(now, H200), predicted(before, H200)),
                 "instructions": (now.instructions, before.instructions),
                 "bytes spilled": (now.spilled, before.spilled)}  # fmt: skip
        found += [f"{now.what}: {name} {new:.6g}, kept {old:.6g}" for name, (new, old) in pairs.items()
                  if new > old * WORSE]  # fmt: skip
    return found


def fitted() -> None:
    """Fit, and say by how much the model misses what it was and was not fitted to."""
    times = measured(TIMES["H200"])
    own = [panels(name, tokens, height, columns) for name in ("int4_g128", "nvfp4") for tokens in (1, 16, 64, 256)
           for height, columns in ((8192, 8192), (4096, 4096), (28672, 4096), (4096, 14336))]  # fmt: skip
    others = [matmul(f"{kind}_token", f"{kind}_channel", tokens, 8192, 8192)
              for kind in ("int8", "fp8") for tokens in (1, 16, 4096)]  # fmt: skip
    machine = fit(own, H200, times)
    print(machine)
    for what, kernels in (("fitted to", own), ("not fitted to", others)):
        found = errors(kernels, machine, times)
        print(f"{what} {len(found)} times: {spread(found.values()):.1%} (root of the mean square), "
              f"at most {max(map(abs, found.values())):.1%}")  # fmt: skip
        for name, error in found.items():
            print(f"    {name}: {times[name]:.1f} us, predicted {times[name] * (1 + error):.1f}")


def main() -> None:
    """See the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "check", "keep", "fit"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    arguments = parser.parse_args()
    if arguments.fit:
        fitted()
        return
    if arguments.layers:
        print(layers())
        return
    kernels = [make() for name, make in cases() if arguments.only in name]
    known = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    if arguments.keep:
        known[toolchain()] = {**known.get(toolchain(), {}), **{each.what: asdict(each) for each in kernels}}
        KEPT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if arguments.check:
        if toolchain() not in known:
            raise SystemExit(
                f"nothing is kept for {toolchain()}, but for {', '.join(known) or 'none'}; run with --keep"
            )
        if problems := worse(kernels, known[toolchain()]):
            raise SystemExit("\n".join(problems))
        print(f"no worse: {len(kernels)} kernels, {toolchain()}")
        return
    print(table(kernels))


if __name__ == "__main__":
    main()
