"""What a GPU makes of a compiled kernel: a model of a few numbers, fitted to measurements, and its error.

A launch begins, then waits for the slowest of three things, a little longer where two are close:

    time = start + again * (launches - 1) + (issue^p + memory^p + tensor^p)^(1/p)

Memory takes its bytes over a copy's bandwidth, tensor cores their operations over their peak. Each of a processor's
four schedulers issues an instruction per cycle if one of its warps is ready: with w warps, in w / (w + hidden) of the
cycles.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

SCHEDULERS, LANES, REGISTERS, SHARED, BLOCKS, WARPS = 4, 32, 65536, 227 * 1024, 32, 64  # of a processor of sm_90
RESERVED = 1024  # bytes of shared memory that every block costs beside its own


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        processors, clock: how many, and GHz.
        bandwidth: of a copy, TB/s.
        peaks: of dense products by their operands, TFLOP/s.
        start, again: microseconds of a launch, and of each further one of the same call.
        hidden: warps per scheduler at which half of the cycles issue.
        sharpness: p.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    peaks: dict[str, float]
    start: float
    again: float
    hidden: float
    sharpness: float


PEAKS = {"bf16": 989.0, "int8": 1979.0, "fp8": 1979.0}
# Fitted by `python benchmarks/compiled.py --fit` under Triton 3.6.0, which compiled what was measured in
# benchmarks/results/h200-times.jsonl; bandwidth and clock are given.
H200 = Machine("H200", 132, 1.98, 4.3, PEAKS, start=2.29, again=1.02, hidden=4.65, sharpness=2.23)
H100 = replace(H200, name="H100", bandwidth=3.0)  # nothing is fitted to it


@dataclass(frozen=True)
class Compiled:
    """A kernel on a shape, in numbers that a compiler gives.

    Attributes:
        what: its name, format and shape.
        blocks, warps: of the grid, and of a block.
        instructions: that a warp issues, loops counted as often as they run.
        per, unit: instructions of a thread per weight or value, and which.
        registers, spilled, shared: of a thread, bytes of a thread, and of a block.
        under_way: bytes that a block has asked memory for at once.
        bytes: that a call cannot avoid to move, partial sums among them.
        products: instruction and types that multiply.
        operations: of the tensor cores, by the operands' kind.
        launches: of a call.
    """

    what: str
    blocks: int
    warps: int
    instructions: float
    per: float
    unit: str
    registers: int
    spilled: int
    shared: int
    under_way: int
    bytes: float
    products: str = "-"
    operations: float = 0.0
    kind: str = "bf16"
    launches: int = 1

    @property
    def resident(self) -> int:
        """Blocks that a processor holds at once, if there are as many."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * LANES * self.warps)
        return min(by_registers, SHARED // (self.shared + RESERVED), WARPS // self.warps, BLOCKS)

    def held(self, machine: Machine) -> int:
        """Blocks that a processor holds of this grid."""
        return min(self.resident, -(-self.blocks // machine.processors))


def predicted(kernel: Compiled, machine: Machine) -> float:
    """Microseconds of a call."""
    warps = kernel.held(machine) * kernel.warps / SCHEDULERS
    cycles = kernel.instructions * kernel.blocks * kernel.warps / (machine.processors * SCHEDULERS)
    issue = cycles / (1e3 * machine.clock) * (warps + machine.hidden) / warps
    memory = kernel.bytes / (1e6 * machine.bandwidth)
    tensor = kernel.operations / (1e6 * machine.peaks[kernel.kind])
    slowest = sum(part**machine.sharpness for part in (issue, memory, tensor)) ** (1 / machine.sharpness)
    return machine.start + machine.again * (kernel.launches - 1) + slowest


def floor(kernel: Compiled, machine: Machine) -> float:
    """Microseconds that its bytes and products take at least."""
    return max(kernel.bytes / machine.bandwidth, kernel.operations / machine.peaks[kernel.kind]) / 1e6


def measured(path: Path) -> dict[str, float]:
    """Microseconds by name, of a file that graphs.py wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["what"]: row["us"] for row in rows if "us" in row}


def errors(kernels: Iterable[Compiled], machine: Machine, times: dict[str, float]) -> dict[str, float]:
    """By how much each prediction misses its measurement: 0.1 is a tenth too long."""
    return {each.what: predicted(each, machine) / times[each.what] - 1 for each in kernels if each.what in times}


def spread(found: Iterable[float]) -> float:
    """Root of the mean square."""
    squares = [error**2 for error in found]
    return math.sqrt(sum(squares) / len(squares))


def fit(kernels: list[Compiled], machine: Machine, times: dict[str, float]) -> Machine:
    """The machine with start, again, hidden and sharpness that miss these times least: one after the other is moved in
    ever smaller steps, from where they stand."""
    names = ("start", "again", "hidden", "sharpness")
    at, step = machine, 0.5
    best = spread(errors(kernels, at, times).values())
    while step > 0.004:
        moved = False
        for name in names:
            for factor in (1 + step, 1 / (1 + step)):
                trial = replace(at, **{name: getattr(at, name) * factor})
                error = spread(errors(kernels, trial, times).values())
                if error < best - 1e-9:
                    at, best, moved = trial, error, True
        step = step if moved else step / 2
    return at
