"""The weight made again in the backward pass: gradients of ordinary autograd, and nothing but the input kept."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.training.recomputed import recomputed_linear


def test_gradients_are_autograds() -> None:
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(8, 4))
    bias, x = nn.Parameter(torch.randn(8)), torch.randn(2, 3, 16, requires_grad=True)
    frozen = torch.randn(8, 16)
    out = torch.randn(2, 3, 8)

    def weight() -> Tensor:
        return (frozen + B @ A).tanh()

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * out).sum(), (A, B, bias, x)))

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed_linear(x, weight, bias, (A, B))
    assert [t.shape for t in kept] == [x.shape]
    expected = functional.linear(x, weight(), bias)
    assert torch.equal(y, expected)
    for one, other in zip(gradients(y), gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_learns_nothing_still_passes_the_gradient_on() -> None:
    x, frozen = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16)
    recomputed_linear(x, lambda: frozen, None, ()).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, frozen.sum(0).expand(3, 16), atol=1e-5)


def test_autocast_computes_in_its_own_type() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), nn.Parameter(torch.randn(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        y = recomputed_linear(x, lambda: weight * 1.0, None, (weight,))
        assert y.dtype == torch.bfloat16 and torch.equal(y, functional.linear(x, weight))
    y.float().sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
