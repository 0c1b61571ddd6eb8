"""A weight held packed: what comes back is what went in, in as many bytes as a file needs."""

import pytest
import torch

from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.held import HeldWeight

HELD = ("nvfp4", "mxfp4", "int4_g32", "int4_g128_asym", "int2_g64", "int8_channel", "fp8_channel", "mxfp8")


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_dequantized_exactly(name: str) -> None:
    torch.manual_seed(0)
    fmt, weight = lookup(name), torch.randn(48, 256)
    q = quantize(weight, fmt)
    held = HeldWeight(fmt, (48, 256), "cpu")
    held.hold(q)
    assert torch.equal(held.dequantize(), q.dequantize())
    other = HeldWeight(fmt, (48, 256), "cpu")
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.half().dequantize(), q.dequantize())  # numbers are moved, never converted
    assert not list(held.parameters())
    stored = sum(buffer.nbytes for buffer in held.buffers())
    assert stored <= 1.01 * weight.numel() * fmt.bits_per_weight(48, 256) / 8 + 48 * 2 + 4


@pytest.mark.parametrize("name", HELD)
def test_each_matrix_of_a_stack_is_made_alone(name: str) -> None:
    """With a global scale of its own; the whole is one below the other."""
    torch.manual_seed(0)
    fmt, stack = lookup(name), torch.randn(3, 48, 256) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    held = HeldWeight(fmt, (3, 48, 256), "cpu")
    each = [quantize(weight, fmt) for weight in stack]
    for expert, q in reversed(list(enumerate(each))):
        held.hold(q, expert)
    for expert, q in enumerate(each):
        assert torch.equal(held.dequantize(expert), q.dequantize())
    assert torch.equal(held.dequantize(), torch.stack([q.dequantize() for q in each]))
    stored = sum(buffer.nbytes for buffer in held.buffers())
    assert stored <= 1.01 * stack.numel() * fmt.bits_per_weight(48, 256) / 8 + 3 * 48 * 2 + 12
    assert held.extra_repr() == f"3 x 48 x 256, {name}"


@pytest.mark.parametrize(("name", "words"), [("int3_g64", "3 bits"), ("nf4_g64", "table"), ("fp8_b128", "groups")])
def test_other_formats_are_refused(name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} weights cannot be held packed: .*{words}"):
        HeldWeight(lookup(name), (128, 256), "cpu")


def test_shapes_need_no_numbers() -> None:
    assert HeldWeight(lookup("nvfp4"), (8, 64), "meta").dequantize().shape == (8, 64)
    assert HeldWeight(lookup("nvfp4"), (2, 8, 64), "meta").dequantize().shape == (2, 8, 64)
