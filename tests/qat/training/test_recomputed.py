"""The weight made again in the backward pass: gradients of ordinary autograd, and nothing but the input kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.training.recomputed import recomputed_experts, recomputed_linear


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


@pytest.mark.parametrize("sizes", [[2, 3, 4], [0, 9, 0], [5, 0, 2]])
def test_experts_are_linear_layers_with_rows_of_their_own(sizes: list[int]) -> None:
    """Against autograd, of what each expert has of the learned tensors; rows that no expert has give 0 and get 0."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(3, 4, 16)), nn.Parameter(torch.randn(3, 8, 4))
    gain, frozen = nn.Parameter(torch.rand(24, 1)), torch.randn(3, 8, 16)
    x, out = torch.randn(9, 16, requires_grad=True), torch.randn(9, 8)
    made: list[int] = []

    def make(index: int, parts: list[Tensor]) -> Tensor:
        made.append(index)
        a, b, g = parts
        return (frozen[index] + b[0] @ a[0]).tanh() * g

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * out).sum(), (A, B, gain, x), materialize_grads=True))

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed_experts(x, sizes, 8, make, (A, B, gain))
    reached = [index for index, size in enumerate(sizes) if size]
    assert [t.shape for t in kept] == [x.shape] and made == reached
    whole = [make(index, [A[index : index + 1], B[index : index + 1], gain.view(3, 8, 1)[index]]) for index in range(3)]
    pieces = x.split([*sizes, 9 - sum(sizes)])
    products = [functional.linear(piece, weight) for piece, weight in zip(pieces[:3], whole, strict=True)]
    expected = torch.cat([*products, torch.zeros(9 - sum(sizes), 8)])
    assert torch.equal(y, expected)
    made.clear()
    for one, other in zip(gradients(y), gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert made == reached


def test_experts_that_learn_nothing_still_pass_the_gradient_on() -> None:
    x, frozen = torch.randn(3, 16, requires_grad=True), torch.randn(2, 8, 16)
    unused = nn.Parameter(torch.ones(2, 1))
    recomputed_experts(x, [1, 2], 8, lambda index, _: frozen[index], (unused,)).sum().backward()
    expected = torch.stack([frozen[index].sum(0) for index in (0, 1, 1)])
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-5)
    assert unused.grad is None or not unused.grad.any()


def test_autocast_computes_experts_in_its_own_type() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), nn.Parameter(torch.randn(1, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        y = recomputed_experts(x, [3], 8, lambda _, parts: parts[0][0] * 1.0, (weight,))
        assert y.dtype == torch.bfloat16 and torch.equal(y, functional.linear(x, weight[0]))
    y.float().sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
