"""The packed linear kernel without a GPU: interpreted in a process of its own (FP16 and FP32; the interpreter's BF16 is
wrong) against float64, and compiled for every architecture, looking at what the compiler made of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG, lookup
from qat.serving import panels
from qat.serving.packed import problem
from tests.kernels.processes import in_a_process

triton = pytest.importorskip("triton")
PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- assembly, which the interpreter does not know ----------------------------------------------------------------


def lanes(operation: Callable[..., float], *pairs: int) -> int:
    """An operation on both BF16 numbers of each pair, whose results BF16 has."""
    numbers = torch.tensor(pairs).view(-1, 1) >> torch.tensor([0, 16]) & 0xFFFF
    values = (numbers << 16).to(torch.int32).view(torch.float32).double()
    results = torch.tensor([operation(*column.tolist()) for column in values.T]).float()
    assert torch.equal(results.bfloat16().float(), results)
    low, high = ((results.view(torch.int32) >> 16) & 0xFFFF).tolist()
    return low | high << 16


def run_assembly(text: str, word: int, factor: int) -> list[int]:
    """The four results of the few instructions that the kernels' assembly is made of."""
    held = {"$4": word} | {f"${index}": factor for index in range(5, 9)}
    for line in filter(lambda line: line.strip("{} \n") and ".reg" not in line, text.split(";")):
        name, _, rest = line.strip("{} \n").partition(" ")
        target, *given = (operand.strip() for operand in rest.split(","))
        a, *b = (held[operand] if operand in held else int(operand, 0) for operand in given)
        held[target] = {
            "mov.b32": lambda a: a,
            "shl.b32": lambda a, by: a << by & 0xFFFFFFFF,
            "shr.u32": lambda a, by: a >> by,
            "and.b32": lambda a, b: a & b,
            "lop3.b32": lambda a, b, c, table: (a & b) | c,
            "fma.rn.bf16x2": lambda a, b, c: lanes(lambda x, y, z: x * y + z, a, b, c),
        }[name](a, *b)
    return [held[f"${index}"] for index in range(4)]


@pytest.mark.parametrize("name", ["int4_g128", "mxfp4", "nvfp4"])
def test_assembly_decodes_every_pair_of_codes(name: str) -> None:
    from qat.kernels.packed_linear.panels import triton as kernel

    fmt = lookup(name)
    text = (kernel.INTEGERS if fmt.element.is_integer else kernel.MINIFLOATS).value
    assert all("0xEA" in line for line in text.split(";") if "lop3" in line)
    codes = torch.randint(0, 16, (64, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = (panels.to_panels(codes, fmt).view(-1, 2).to(torch.int64) & 0xFFFF)[:400]  # each code some 200 times
    whole = 2.0**kernel.UNDO.value if name == "mxfp4" else 1.75 * 2.0**kernel.BEFORE
    factor = int(torch.tensor([whole]).bfloat16().view(torch.int16)) * 0x10001
    undone, given = (2.0**kernel.AFTER, 1.75) if name == "nvfp4" else (1.0, 1.0)
    for low, high in words.tolist():
        found = torch.tensor(run_assembly(text, low | high << 16, factor))
        for lane, word in ((0, low), (16, high)):
            values = ((found >> lane & 0xFFFF) << 16).to(torch.int32).view(torch.float32) * undone
            row = torch.full((1, 1, 64, panels.part(fmt)), word).to(torch.int16)
            expected = fmt.element.decode(panels.from_panels(row, fmt)[0, :: panels.part(fmt)])
            assert torch.equal(values, expected * given), f"{word:04x}"


# --- the kernel itself --------------------------------------------------------------------------------------------


def test_the_interpreted_kernel_is_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_packed_linear.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_packed_linear.py")
