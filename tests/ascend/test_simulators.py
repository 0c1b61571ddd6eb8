"""Two readings of the same documents: the operators that `qat` simulates NPUs with, and those that vllm-ascend's own
code is run over here, on every type and on every operator that the types need. They share no code."""

import pytest
import torch
from torch import Tensor

from qat.checkpoints.layouts.ascend.simulate import SimulatedLinear
from qat.checkpoints.layouts.ascend.types import Type, find_type
from qat.checkpoints.layouts.ascend.write import fold_bias, tensors_of
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.training.activations import static_part
from qat.training.phases import answering
from tests.ascend import operators as other
from tests.checkpoints.exports import Pair
from tests.checkpoints.layouts.test_ascend import ALL

ROWS, COLUMNS, TOKENS = 40, 96, 13  # 96: an odd number of MX groups
GROUPED = [pair for name, pair in ALL if name == "W4A16"]
BF16 = torch.bfloat16


def stored(pair: Pair, columns: int = COLUMNS) -> tuple[Type, dict[str, Tensor], Tensor, Tensor]:
    """A type, its tensors, a bias, and BF16 inputs, some of them beyond a static range."""
    weight, input = lookup(pair[0]), lookup(pair[1]) if pair[1] else None
    generator = torch.Generator().manual_seed(11)
    q = quantize(torch.randn(ROWS, columns, generator=generator) * 0.05, weight)
    amax = torch.tensor([-1.0, 3.0]) if input is not None and input.zero_point else torch.tensor(3.0)
    bias = torch.randn(ROWS, generator=generator)
    kind = find_type(weight, input)
    assert kind is not None
    tensors = tensors_of(kind, q, static_part(input, amax) if input is not None else None)
    x = torch.randn(TOKENS, columns, generator=generator) * 2
    x[3] = 0
    return kind, fold_bias(tensors, bias), bias, x.to(BF16)


def static_of(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    each = tensors["input_scale"].to(BF16).repeat(COLUMNS)
    codes = other.npu_quantize(
        x, 1 / each, tensors["input_offset"].to(torch.int8).to(BF16).repeat(COLUMNS), torch.qint8, -1, False
    )
    return other.npu_quant_matmul(
        codes, tensors["weight"].t(), tensors["deq_scale"], bias=tensors["quant_bias"], output_dtype=BF16
    )


def dynamic_of(tensors: dict[str, Tensor], x: Tensor, bias: Tensor) -> Tensor:
    codes, scales = other.npu_dynamic_quant(x)
    scale = tensors["weight_scale"].flatten().to(BF16)
    return other.npu_quant_matmul(
        codes, tensors["weight"].t(), scale, pertoken_scale=scales, bias=bias.to(BF16), output_dtype=BF16
    )


def by_other(kind: Type, tensors: dict[str, Tensor], x: Tensor, bias: Tensor) -> Tensor:
    """The product as vllm-ascend calls for it."""
    if kind.input == "tensor":
        return static_of(tensors, x)
    if kind.name in ("W8A8_DYNAMIC", "W8A8_MIX"):
        return dynamic_of(tensors, x, bias)
    if kind.name == "W8A16":
        scale, offset = (tensors[name].flatten().to(BF16) for name in ("weight_scale", "weight_offset"))
        return other.npu_weight_quant_batchmatmul(x, tensors["weight"].t(), scale, offset, bias.to(BF16))
    if kind.name == "W4A4_DYNAMIC":
        codes, scales = other.npu_dynamic_quant(x, dst_type=torch.quint4x2)
        packed = other.npu_convert_weight_to_int4pack(tensors["weight"].int()).t()
        scale = tensors["weight_scale"].flatten().to(BF16).float()
        wide = other.npu_quant_matmul(codes, packed, scale, pertoken_scale=scales, output_dtype=torch.float16)
        return wide.to(BF16) + bias.to(BF16)
    four, to = kind.input_element.bits == 4, other.FP4 if kind.input_element.bits == 4 else torch.float8_e4m3fn
    codes, scales = other.npu_dynamic_mx_quant(x, to, round_mode="round" if four else "rint")
    pairs = torch.nn.functional.pad(tensors["weight_scale"], (0, 1)).unflatten(-1, (-1, 2)).transpose(0, 1)
    types = {"x1_dtype": to, "x2_dtype": other.FP4 if kind.packed else None}
    types |= {"scale_dtype": other.E8M0, "pertoken_scale_dtype": other.E8M0}
    return other.npu_quant_matmul(
        codes, tensors["weight"].t(), pairs, pertoken_scale=scales, bias=bias, output_dtype=BF16,
        group_sizes=[1, 1, 32], **types,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name, pair in ALL if pair not in GROUPED])
def test_every_type(name: str, pair: Pair) -> None:
    """Sums of integers are equal to the last bit; sums of floats may be added in another order, so that a BF16 result
    is a neighbour. Of W8A16 the readings differ: one rounds the dequantized weight to BF16, as matrix units multiply
    such numbers, the other does not, since no document says it."""
    kind, tensors, bias, x = stored(pair)
    simulated = SimulatedLinear(kind, tensors, None if kind.input == "tensor" else bias.to(BF16).float())
    found, wanted = simulated(x).float(), by_other(kind, tensors, x, bias.to(BF16).float()).float()
    assert name == kind.name and found.isfinite().all()
    if kind.element.is_integer and kind.input:
        assert torch.equal(found, wanted)
    elif kind.element.is_integer:
        assert (found - wanted).norm() < 2.0**-8 * wanted.norm()
    else:
        assert torch.allclose(found, wanted, rtol=2.0**-7, atol=1e-6) and (found == wanted).float().mean() > 0.98


@pytest.mark.parametrize("pair", GROUPED)
def test_groups(pair: Pair) -> None:
    """W4A16 as MindIE calls for it: bytes are transposed to (k, n / 2), so that a word holds eight outputs, and offsets
    change their sign, because the operator adds them."""
    kind, tensors, bias, x = stored(pair, 3 * 64)
    words = tensors["weight"].t().contiguous().view(torch.int32)
    scale, offset = (tensors[name].to(BF16).t() for name in ("weight_scale", "weight_offset"))
    found = SimulatedLinear(kind, tensors, bias)(x).float()
    wanted = other.npu_weight_quant_batchmatmul(x, words, scale, -offset, bias, antiquant_group_size=64).float()
    assert (found - wanted).norm() < 2.0**-8 * wanted.norm()
    assert torch.equal(offset.any(), torch.tensor(pair[0].endswith("asym")))
    if offset.any():
        wrong = other.npu_weight_quant_batchmatmul(x, words, scale, offset, bias, antiquant_group_size=64).float()
        assert (found - wrong).norm() > 0.1 * wanted.norm()


def test_answers_of_the_mixed_type() -> None:
    kind, tensors, bias, x = stored(("int8_channel", "int8_mix"))
    simulated = SimulatedLinear(kind, tensors, bias)
    with answering("answer"):
        assert torch.equal(simulated(x), static_of(tensors, x))
    assert not torch.equal(simulated(x), static_of(tensors, x))
