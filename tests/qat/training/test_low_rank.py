"""The update by itself: what training leaves out, what has no direction, what autocast does not reach."""

import pytest
import torch
from torch import nn

from qat.training.low_rank import LowRank, _Recorded, updated


def test_dropout_leaves_out_input_channels_while_training() -> None:
    torch.manual_seed(0)
    lora = LowRank(torch.zeros(64, 128), 4, 8.0, dropout=0.5)
    nn.init.normal_(lora.B)
    weight, plain = torch.zeros(64, 128), (lora.B @ lora.A * 8).detach()
    dropped = lora.merged(weight).detach()
    left_out = (dropped == 0).all(dim=0)
    assert 32 < int(left_out.sum()) < 96
    assert torch.allclose(dropped[:, ~left_out], 2 * plain[:, ~left_out], rtol=1e-5)
    assert torch.equal(lora.eval().merged(weight), plain)


def test_a_row_of_zeros_has_no_direction() -> None:
    lora = LowRank(torch.zeros(4, 8), 2, 1.0, dora=True)
    assert torch.equal(lora.merged(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_autocast_does_not_reach_the_update() -> None:
    lora = LowRank(torch.randn(8, 16), 2, 1.0)
    nn.init.normal_(lora.B)
    weight = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lora.merged(weight)
    assert inside.dtype == torch.float32 and torch.equal(inside, lora.merged(weight))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_the_operator_of_recorded_graphs_is_the_update(dora: bool, experts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, A, B = torch.randn(*experts, 8, 16), torch.randn(*experts, 2, 16), torch.randn(*experts, 8, 2)
    magnitude = torch.rand(8) + 0.5 if dora else None
    torch.library.opcheck(torch.ops.qat.low_rank_update.default, (weight, A, B, 0.5, magnitude))
    learned = [t.requires_grad_() for t in (A, B, magnitude) if t is not None]
    out = torch.randn_like(weight)
    values, grads = [], []
    for update in (updated, _Recorded.apply):
        value = update(weight, A, B, 0.5, magnitude)
        values.append(value.detach())
        grads.append(torch.autograd.grad((value * out).sum(), learned))
    assert torch.equal(*values)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
