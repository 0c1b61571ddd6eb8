"""Rows of packed tables are rows of the dequantized ones, in every order of words, and a head may share the table."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import quantize
from qat.serving.packed import PackedLinear, ordered, pack, problem, unpack
from qat.serving.panels import in_panels
from qat.serving.panels import problem as panel_problem
from qat.serving.table import PackedEmbedding, take_rows

PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
IN_PANELS = [name for name in PACKED if panel_problem(lookup(name), 192, 512) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PACKED)
def test_looking_up_is_that_of_the_dequantized_table(name: str) -> None:
    weight = quantize(normal(40, 384), lookup(name))
    ids = torch.tensor([[3, 39, 0], [3, 17, 38]])
    table = PackedEmbedding(PackedLinear(pack(weight)), torch.float32)
    expected = nn.functional.embedding(ids, weight.dequantize(torch.bfloat16))
    assert torch.equal(table(ids), expected.float()) and table(ids).dtype == torch.float32
    assert torch.equal(table(ids.to(torch.int32)), table(ids))
    assert table(ids[:0]).shape == (0, 3, 384)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(table.to(dtype)(ids), expected.to(dtype))


@pytest.mark.parametrize("name", IN_PANELS)
def test_rows_of_panels(name: str) -> None:
    """The order of GPUs, in which a row lies apart in tiles."""
    weight = quantize(normal(192, 512), lookup(name))
    gpu = ordered(pack(weight), "cuda")
    numbers = torch.tensor([0, 63, 64, 191, 100, 100])
    assert in_panels(gpu.words)
    taken = take_rows(gpu, numbers)
    assert taken.nbytes == gpu.nbytes // 32
    assert torch.equal(unpack(taken).codes, weight.codes[numbers])
    assert torch.equal(unpack(taken).dequantize(), weight.dequantize()[numbers])


def test_ids_outside_of_the_table_are_refused() -> None:
    table = PackedEmbedding(PackedLinear(pack(quantize(normal(8, 64), lookup("int8_channel")))), torch.float32)
    for outside in (8, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            table(torch.tensor([outside]))


def test_a_head_shares_the_table_wherever_they_go() -> None:
    weight = quantize(normal(48, 64), lookup("int4_g32"))
    model = nn.ModuleDict({"table": PackedEmbedding(PackedLinear(pack(weight)), torch.float32)})
    model["head"] = model["table"].matrix
    for moved in (model, model.to(torch.bfloat16), copy.deepcopy(model)):
        assert moved["head"] is moved["table"].matrix
        assert len({buffer.data_ptr() for buffer in moved.buffers() if buffer.numel()}) == 2  # words and scales
    hidden = normal(2, 64, seed=1)
    torch.testing.assert_close(model["head"](hidden), hidden @ weight.dequantize().t())
