"""Other projects' kernels beside ours: which there are, whether one is right before it is timed, what became of each.

A table of adapters (how each is called is in benchmarks/peer_calls.py): the package a peer lives in, the format or
operator of ours that it stands beside, and a function that turns our quantized weight into a call. Every peer so
multiplies the very codes and scales that our kernel multiplies, and its result is compared with the float32 product of
those codes before it is timed: a peer that runs on a wrong layout would be an unfair number. That first call also
compiles and autotunes, outside the timing. What is not installed, refuses, fails or is wrong is named with the reason
and never ends the run; only an illegal memory access takes the process with it: `--peers` leaves packages out.

4-bit inputs have no peer here: vLLM's CUTLASS FP4 and QuTLASS need a Blackwell GPU. Liger's fused-linear losses have no
counterpart among the rows either, which start from logits.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peer_calls import (
    Product,
    cutlass,
    gemlite,
    humming,
    liger_loss,
    liger_norm,
    marlin_fp4,
    marlin_int4,
    summed,
    triton_kernels,
)
from torch import Tensor

NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Adapter:
    """One contender that is not ours.

    Attributes:
        name: its column in the table.
        package: key of `PACKAGES`.
        family: of the benchmark: packed, matmul or rows.
        beside: what of ours it is compared with: (weight,), (input, weight) or (operator,).
        build: from the quantized weight (None for rows) to a call. The call takes x in `packed`; x, its codes and their
            scales in `matmul`; what benchmarks/operators.py says in `rows`.
        note: how its figure differs from ours.
        result: what of the call's return value is compared with the truth; by default all of it.
        tolerance: error of a whole result over its norm; four times as much for its worst row or column.
        devices: where it runs.
    """

    name: str
    package: str
    family: str
    beside: tuple[str, ...]
    build: Callable[[Any], Product]
    note: str = ""
    result: Callable[[Any], Tensor] = lambda out: out
    tolerance: float = 0.02
    devices: tuple[str, ...] = ("cuda",)


@dataclass(frozen=True)
class Package:
    """Where a peer is found.

    Attributes:
        distribution: the name that pip knows.
        module: what to look for.
        install: what to do where it is missing.
        absent: said of an installed package that has nothing to compare.
        inside: (module, folder) of another package that brings a copy.
    """

    distribution: str
    module: str
    install: str
    absent: str = ""
    inside: tuple[str, str] | None = None

    @property
    def version(self) -> str:
        """As installed, or "not installed"; imports nothing."""
        if _folders(self.module):
            try:
                return importlib.metadata.version(self.distribution)
            except importlib.metadata.PackageNotFoundError:
                return str(getattr(sys.modules.get(self.module), "__version__", "of unknown version"))
        if self.inside is not None:
            host, folder = self.inside
            if any(Path(place, folder).is_dir() for place in _folders(host)):
                return f"inside {host}"
        return NOT_INSTALLED

    @property
    def installed(self) -> bool:
        """Whether Python finds it."""
        return self.version != NOT_INSTALLED


def _folders(module: str) -> list[str]:
    """Where a package lies that can be imported; a folder of that name which is no package does not count."""
    spec = importlib.util.find_spec(module)
    return [] if spec is None or spec.origin is None else list(spec.submodule_search_locations or ())


@dataclass(frozen=True)
class Timing:
    """What a peer took, in microseconds, for what of ours it stands beside."""

    name: str
    beside: tuple[str, ...]
    us: float
    note: str
    version: str

    def cells(self, size: int) -> tuple[str, float, int, str, str]:
        """How a row of the benchmark ends; `size`: bytes that the call cannot avoid to move."""
        return self.name, self.us, size, self.note, self.version


TRITON_KERNELS = (
    'pip install "git+https://github.com/triton-lang/triton@release/3.6.x#subdirectory=python/triton_kernels"'
    " (the branch of your Triton)"
)
PACKAGES = {
    "gemlite": Package("gemlite", "gemlite", "pip install gemlite"),
    "liger": Package("liger-kernel", "liger_kernel", "pip install liger-kernel"),
    "humming": Package("humming-kernels", "humming", "pip install humming-kernels"),
    "vllm": Package("vllm", "vllm", "pip install vllm (its CUDA build has Marlin and CUTLASS)"),
    "triton_kernels": Package(
        "triton-kernels", "triton_kernels", TRITON_KERNELS, inside=("vllm", "third_party/triton_kernels")
    ),
    "sageattention": Package(
        "sageattention", "sageattention", "pip install sageattention", "attention has no kernel among ours yet"
    ),
}
AUTOTUNED = "gemlite's default (fast) autotuning ran before the timing"
ROUNDS = f"rounds x inside the timed call, while ours and others are given codes; {AUTOTUNED}"
LOG_SOFTMAX = "Liger takes log-probabilities: torch's float32 log-softmax, forward and backward, is timed with it"

PEERS = (
    Adapter("gemlite int4 g128", "gemlite", "packed", ("int4_g128",), gemlite("A16W4_HQQ_INT"), AUTOTUNED),
    Adapter("gemlite int4 g64", "gemlite", "packed", ("int4_g64",), gemlite("A16W4_HQQ_INT"), AUTOTUNED),
    Adapter("gemlite int8", "gemlite", "packed", ("int8_channel",), gemlite("A16W8_INT8"), AUTOTUNED),
    Adapter("gemlite mxfp4", "gemlite", "packed", ("mxfp4",), gemlite("A16W4_MXFP"), AUTOTUNED),
    Adapter("gemlite mxfp8", "gemlite", "packed", ("mxfp8",), gemlite("A16W8_MXFP"), AUTOTUNED),
    Adapter("gemlite nvfp4", "gemlite", "packed", ("nvfp4",), gemlite("A16W4_NVFP"), AUTOTUNED),
    Adapter("Marlin int4 g128", "vllm", "packed", ("int4_g128",), marlin_int4),
    Adapter("Marlin int4 g64", "vllm", "packed", ("int4_g64",), marlin_int4),
    Adapter("Marlin mxfp4", "vllm", "packed", ("mxfp4",), marlin_fp4),
    Adapter("Marlin nvfp4", "vllm", "packed", ("nvfp4",), marlin_fp4),
    Adapter("triton_kernels mxfp4", "triton_kernels", "packed", ("mxfp4",), triton_kernels),
    *(
        Adapter(f"Humming {name}", "humming", "packed", (name,), humming(None))
        for name in ("int4_g128", "int4_g64", "mxfp4", "nvfp4", "int8_channel")
    ),
    Adapter(
        "gemlite W8A8 int8", "gemlite", "matmul", ("int8_token", "int8_channel"), gemlite("A8W8_INT8_dynamic"), ROUNDS
    ),
    Adapter("gemlite W8A8 fp8", "gemlite", "matmul", ("fp8_token", "fp8_channel"), gemlite("A8W8_FP8_dynamic"), ROUNDS),
    Adapter(
        "gemlite W4A8 fp8",
        "gemlite",
        "matmul",
        ("fp8_token", "int4_g128"),
        gemlite("A8W4_HQQ_INT_dynamic"),
        f"from five tokens on it also rounds scaled weights to FP8; {ROUNDS}",
        tolerance=0.06,
    ),
    Adapter("gemlite MXFP4A8", "gemlite", "matmul", ("fp8_token", "mxfp4"), gemlite("A8W4_MXFP_dynamic"), ROUNDS),
    Adapter("CUTLASS W8A8 int8", "vllm", "matmul", ("int8_token", "int8_channel"), cutlass),
    Adapter("CUTLASS W8A8 fp8", "vllm", "matmul", ("fp8_token", "fp8_channel"), cutlass),
    Adapter("Humming W4A8 int8", "humming", "matmul", ("int8_token", "int4_g128"), humming("int8")),
    Adapter("Humming W4A8 fp8", "humming", "matmul", ("fp8_token", "int4_g128"), humming("float8e4m3")),
    Adapter("Humming MXFP4A8", "humming", "matmul", ("fp8_token", "mxfp4"), humming("float8e4m3")),
    Adapter(
        "Liger, then ours",
        "liger",
        "rows",
        ("rms_norm",),
        liger_norm,
        "Liger's RMSNorm, then qat::quantize_input",
        result=lambda out: out[0],
    ),
    *(
        Adapter("Liger", "liger", "rows", (kind,), liger_loss(kind), note, result=summed)
        for kind, note in (
            ("forward_kl", LOG_SOFTMAX),
            ("jsd", LOG_SOFTMAX),
            ("cross_entropy", "takes logits, as ours"),
        )
    ),
)


def choose(text: str) -> frozenset[str]:
    """Keys of `PACKAGES` from what stands behind --peers."""
    names = frozenset({"all": PACKAGES, "none": ()}.get(text, text.split(",")))
    if names - PACKAGES.keys():
        raise argparse.ArgumentTypeError(f"{text}: say all, none or some of {','.join(PACKAGES)}")
    return names


@dataclass
class Peers:
    """The peers of one run: builds, checks and times them, and remembers why one was not compared.

    Attributes:
        device: "cuda" or "cpu".
        timer: microseconds of a call.
        chosen: keys of `packages` to use; the others are reported as left out.
        table, packages: what there is.
        problems: where each (contender, reason) was met.
        compared: names of what was timed.
    """

    device: str
    timer: Callable[[Callable[[], Any]], float]
    chosen: frozenset[str] = frozenset(PACKAGES)
    table: tuple[Adapter, ...] = PEERS
    packages: Mapping[str, Package] = field(default_factory=lambda: PACKAGES)
    problems: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)

    def products(
        self, family: str, weights: Mapping[tuple[str, ...], Any], where: str
    ) -> list[tuple[Adapter, Product]]:
        """Calls of the peers that stand beside one of `weights`, whose values go to `Adapter.build`."""
        built = []
        for peer in self.table:
            if peer.family != family or peer.beside not in weights or not self._usable(peer):
                continue
            if self.device not in peer.devices:
                self.problems[peer.name, f"there is no kernel for {self.device}"] = [where]
                continue
            try:
                built.append((peer, peer.build(weights[peer.beside])))
            except Exception as error:
                self._problem(peer, _first_line(error), where)
        return built

    def timings(
        self,
        products: list[tuple[Adapter, Product]],
        given: Mapping[tuple[str, ...], tuple[Any, ...]],
        truth: Callable[[tuple[str, ...]], Tensor],
        where: str,
    ) -> list[Timing]:
        """Those that return what they should, timed.

        Args:
            products: what `products` returned.
            given: arguments of each call, by what the peer stands beside.
            truth: float32 result that a peer must reach, likewise; asked once for each.
            where: for the report.
        """
        timings: list[Timing] = []
        truths: dict[tuple[str, ...], Tensor] = {}
        for peer, product in products:
            arguments = given[peer.beside]
            try:
                found = peer.result(product(*arguments))
                if peer.beside not in truths:
                    truths.clear()
                    truths[peer.beside] = truth(peer.beside)
                wrong = disagreement(found, truths[peer.beside], peer.tolerance)
                if wrong:
                    self._problem(peer, wrong, where)
                    continue
                us = self.timer(partial(product, *arguments))
            except Exception as error:
                self._problem(peer, _first_line(error), where)
                continue
            self.compared.add(peer.name)
            note = f"{peer.note}; " if peer.note else ""
            note += f"within {peer.tolerance:.0%} of the float32 result of the same codes"
            timings.append(Timing(peer.name, peer.beside, us, note, self.packages[peer.package].version))
        return timings

    def versions(self) -> dict[str, str]:
        """Installed version of every package, by the name that pip knows."""
        return {package.distribution: package.version for package in self.packages.values()}

    def report(self) -> list[str]:
        """What was compared, and of everything else why not."""
        lines = [f"peers timed beside ours: {', '.join(sorted(self.compared)) or 'none'}"]
        for key, package in self.packages.items():
            if not package.installed:
                lines.append(f"{key} is not installed, so not compared: {package.install}")
            elif package.absent:
                lines.append(f"{key} {package.version} is not compared: {package.absent}")
            elif key not in self.chosen:
                lines.append(f"{key} {package.version} is left out by --peers")
        alike: dict[tuple[str, str, int], list[str]] = {}
        for (name, reason), places in self.problems.items():
            alike.setdefault((reason, places[0], len(places) - 1), []).append(name)
        for (reason, place, more), names in alike.items():
            lines.append(f"not compared at {place}{f' and {more} more' if more else ''}: {', '.join(names)}: {reason}")
        return lines

    def _usable(self, peer: Adapter) -> bool:
        return peer.package in self.chosen and self.packages[peer.package].installed

    def _problem(self, peer: Adapter, reason: str, where: str) -> None:
        places = self.problems.setdefault((peer.name, reason), [])
        places.append(where)
        if len(places) == 1:
            print(f"{peer.name}, {where}: {reason}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def disagreement(found: Any, truth: Tensor, tolerance: float) -> str:
    """How `found` is wrong, "" if it is not: as a whole, in a single row, in a single column. NaN is wrong."""
    if not isinstance(found, Tensor) or found.shape != truth.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return f"wrong: returns {shape} where {tuple(truth.shape)} is right"
    error, whole = found.float() - truth, truth.norm()
    off = float(error.norm() / whole)
    worst = max(
        float((error.norm(dim=d) / truth.norm(dim=d).clamp(min=whole / math.sqrt(truth.shape[1 - d]))).max())
        for d in (0, 1)
    )
    if off <= tolerance and worst <= 4 * tolerance:
        return ""
    return f"wrong: off by {off:.1%} of the float32 result as a whole, by {worst:.1%} in a row or column"
