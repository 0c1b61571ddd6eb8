"""Engines on Ascend NPUs: what rows of the support tables say of them, and what follows from that before training.

No NPU was at hand. "Loads" means that the engine's own code, read or run on a CPU in the versions named here, takes the
files and asks for operators of that device; docs/ascend.md says which of the two.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from qat.families import expert_list
from qat.numbers.format import Format
from qat.numbers.scale import E8M0

Engine = Literal["vllm-ascend", "sglang-ascend", "mindie"]
Device = Literal["a2", "a3", "950", "310p"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
DEVICES: tuple[Device, ...] = get_args(Device)
VERSIONS: Mapping[Engine, str] = {
    "vllm-ascend": "0.23.0.post1 to 0.30.0rc2",
    "sglang-ascend": "main of 2026-08 (modelslim loader)",
    "mindie": "1.0.0 to 2.3.0",
}
HALF: Device = "310p"
"""The device without BF16: models are FP16 there, and what is written for it is for no other."""


@dataclass(frozen=True)
class Npu:
    """One engine that loads a scheme: on which devices, from which version on, for what it should be known, and whether
    it runs experts in it, where the layout has any."""

    engine: Engine
    devices: tuple[Device, ...]
    since: str = ""
    remark: str = ""
    experts: bool = True


A2_A3, A5, A310P = DEVICES[:2], DEVICES[2:3], DEVICES[3:]
NPU_MX = "0.30.0rc2"
"""The first vllm-ascend known to load MX formats from compressed-tensors and modelopt files, and FP8 blocks."""


def on_npus(*devices: Device, since: str = "", remark: str = "") -> tuple[Npu, ...]:
    """Rows of layouts that vLLM loads, too: vllm-ascend alone is known to."""
    return (Npu(ENGINES[0], devices, since, remark),)


def unpaired(path: str, weight: Format, columns: int) -> str:
    """Why vllm-ascend runs no experts with such a matrix at `path`, "" where it does: scales of MX weights lie in
    pairs, which it does not complete for experts, and its gate takes the second matrix's columns by 64."""
    group = weight.group
    if expert_list(path) is None or weight.scale is not E8M0 or not group or columns // group % 2 == 0:
        return ""
    return (
        f"{path} has {columns} columns, an odd number of groups of {group}, and vllm-ascend takes scales of "
        f"experts in pairs: columns by {2 * group}; leave these experts dense, or give them int8_channel weights"
    )


class HasNpu(Protocol):
    """A row of a support table, as far as it concerns NPUs."""

    @property
    def scheme(self) -> str:
        """What it is called."""

    @property
    def npu(self) -> tuple[Npu, ...]:
        """Who loads it."""


def loads(row: HasNpu | None, engine: str, device: str, path: str = "") -> Npu | None:
    """What is known of an engine on a device that loads the row, for the layer at `path`; None where it does not."""
    own = [one for one in (row.npu if row is not None else ()) if one.experts or expert_list(path) is None]
    return next((one for one in own if one.engine == engine and device in one.devices), None)


def refusal(
    tables: Mapping[str, Sequence[HasNpu]],
    pairs: Iterable[tuple[str, HasNpu | None]],
    engine: str,
    device: str,
    path: str = "",
) -> str:
    """Why an engine on a device loads none of these (target, row) for the layer at `path`, and what it does load; "" if
    it loads one."""
    if any(loads(row, engine, device, path) for _, row in pairs):
        return ""
    every = ((name, row) for name, rows in tables.items() for row in rows)
    able = dict.fromkeys(f"{row.scheme} ({name})" for name, row in every if loads(row, engine, device, path))
    what = " of experts" if expert_list(path) is not None else ""
    return f"{engine} on {device} loads{what} " + (", ".join(able) if able else "nothing that is written here")
