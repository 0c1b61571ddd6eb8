"""`qat::cached_attention`: the Triton kernel without a GPU, interpreted in a process of its own (FP16 and FP32; the
interpreter's BF16 is wrong) and compiled for every architecture; its assembly, which the interpreter does not know,
emulated for every word."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.kernels.cached_attention.choose import SHORTEST, choose
from qat.numbers.catalog import lookup
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


def test_the_interpreted_kernel_is_the_definition() -> None:
    assert "all equal" in in_a_process("interpret_cached_attention.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_cached_attention.py")


def test_pieces_follow_the_sequence_not_the_batch() -> None:
    for tokens, heads, programs in ((32768, 8, 512), (131072, 8, 512), (131072, 1, 512), (2048, 8, 64), (1, 8, 8)):
        tiles = choose(tokens, heads, 4, 132, exact=False)
        assert tiles.piece % tiles.block_t == 0 and tiles.piece >= SHORTEST
        assert programs * 0.9 <= -(-tokens // tiles.piece) * heads <= programs * 1.1
    assert [choose(100, 1, rows, 132, exact=False).block_r for rows in (1, 16, 17, 32)] == [16, 16, 32, 32]


def halves(pair: Tensor) -> Tensor:
    """Both FP16 numbers of registers, as float64 (registers, 2)."""
    numbers = pair[:, None] >> torch.tensor([0, 16]) & 0xFFFF
    return numbers.to(torch.int32).to(torch.int16).view(torch.float16).double()


def registers(numbers: Tensor) -> Tensor:
    """Undo `halves`; FP16 has every number."""
    assert torch.equal(numbers.half().double().nan_to_num(7.5), numbers.nan_to_num(7.5))
    low, high = (numbers.half().view(torch.int16).long() & 0xFFFF).unbind(-1)
    return low | high << 16


def lanes(operation: Callable[..., Tensor], *pairs: Tensor) -> Tensor:
    return registers(operation(*map(halves, pairs)))


def permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    result = torch.zeros_like(a)
    for place in range(4):
        which = int(selector[0]) >> 4 * place & 7
        result |= ((a if which < 4 else b) >> 8 * (which & 3) & 0xFF) << 8 * place
    return result


def floats(pair: Tensor) -> Tensor:
    """FP16 numbers of two E4M3 bytes."""
    return registers(lookup("fp8_tensor").element.decode(pair[:, None] >> torch.tensor([0, 8]) & 0xFF).double())


RUN: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, by: a << by & 0xFFFFFFFF,
    "shr.u32": lambda a, by: a >> by,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if int(table[0]) == 0xEA else (a & b) ^ c,
    "add.rn.f16x2": lambda a, b: lanes(lambda x, y: x + y, a, b),
    "fma.rn.f16x2": lambda a, b, c: lanes(lambda x, y, z: x * y + z, a, b, c),
    "prmt.b32": permuted,
    "cvt.rn.f16x2.e4m3x2": floats,
}


def run_assembly(text: str, word: Tensor, results: int) -> list[Tensor]:
    """The results of the few instructions that the kernel's assembly is made of, for registers of two words."""
    held = {f"${results}": word}
    for line in filter(lambda line: line.strip("{} \n") and ".reg" not in line, text.split(";")):
        name, _, rest = line.strip(" \n").removeprefix("{").strip("} \n").partition(" ")
        if rest.startswith("{"):
            first, second, given = (operand.strip("{} ") for operand in rest.split(","))
            held[first], held[second] = held[given] & 0xFFFF, held[given] >> 16
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        held[target] = RUN[name](*(held[o] if o in held else torch.full_like(word, int(o, 0)) for o in operands))
    return [held[f"${index}"] for index in range(results)]


@pytest.mark.parametrize("name", ["fp8_tensor", "int8_tensor", "int4_tensor", "nvfp4"])
def test_assembly_decodes_every_pair_of_words(name: str) -> None:
    from qat.kernels.cached_attention.decode import triton as kernel
    from qat.kernels.cached_attention.triton import side

    element = lookup(name).element
    text = {"fp8_tensor": kernel.FLOAT8, "int8_tensor": kernel.INTEGER8, "int4_tensor": kernel.INTEGER4,
            "nvfp4": kernel.FLOAT4}[name].value  # fmt: skip
    assert all("0xEA" in line or "0x6A" in line for line in text.split(";") if "lop3" in line)
    low = torch.arange(1 << 16)
    high = low[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    parts = 16 // element.bits
    undo = side("K", lookup(name), 64, assembly=True)["K_UNDO"]
    for part, found in enumerate(run_assembly(text, low | high << 16, parts)):
        words = torch.stack((low, high), dim=-1)
        codes = words >> part * element.bits & (1 << element.bits) - 1
        expected = element.decode(codes.to(torch.uint8)).double()
        torch.testing.assert_close(halves(found) * undo, expected, rtol=0, atol=0, equal_nan=True)
