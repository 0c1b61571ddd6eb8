"""Which heads are products, and that what they claim to be is what they compute."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.adapters.linear import QatLinear
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import WeightQuantizer
from qat.trainers.forward import Head
from qat.training.heads import AnyHead, ProductHead, WholeHead, as_product
from qat.training.losses import chunked
from qat.training.objectives import CrossEntropy, DistillLoss
from tests.qat.training.test_losses import LOSSES, problem, whole

HIDDEN, VOCABULARY = 8, 33
STEPS = (("multiply", 0.5), ("softcap", 2.0), ("divide", 1.5))


def quantized(layer: nn.Linear) -> QatLinear:
    fmt = lookup("int4_channel")
    return QatLinear.wrap(layer, WeightQuantizer(fmt, find_scales(layer.weight, fmt), "none"), None)


def test_what_is_a_product_says_so_and_what_may_be_anything_is_called() -> None:
    layer = nn.Linear(4, 9)
    product = as_product(layer)
    assert product is not None and product.weight is layer.weight and product.bias is layer.bias
    assert as_product(quantized(layer)) is not None
    rows = as_product(Head(layer, STEPS, 5))
    assert rows is not None and rows.weight.shape == (5, 4) and rows.steps == STEPS

    class Subclass(nn.Linear):
        pass

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

    hooked, replaced = nn.Linear(4, 9), nn.Linear(4, 9)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]  # what patching a model does
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 9))
    for other in (Around(), Subclass(4, 9), hooked, replaced, normed, Head(hooked)):
        assert as_product(other) is None


def run(head: AnyHead, hidden: Tensor, wide: bool) -> list[Tensor]:
    """Loss and gradients of sum(logits^3) / 3, whose gradient is logits^2, over two chunks."""

    def replaced(logits: Tensor) -> Tensor:
        value = (logits.double() ** 3).sum(-1) / 3
        logits.copy_(logits**2)
        return value

    sums: list[Tensor | None] = [None] * len(head.parameters)
    needs = (True,) * (1 + len(sums))
    parts = [head.chunk(part.clone(), replaced, needs, sums, wide) for part in hidden.split(4)]
    of_hidden = [gradient for _, gradient in parts if gradient is not None]
    return [torch.stack([value for value, _ in parts]).sum(), torch.cat(of_hidden), *(s for s in sums if s is not None)]


@pytest.mark.parametrize("steps", [(), STEPS, (("softcap", 1.0),)], ids=str)
@pytest.mark.parametrize("make", [lambda layer: layer, quantized], ids=["plain", "quantized"])
def test_a_product_does_what_the_module_does(
    steps: tuple[tuple[str, float], ...], make: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY)
    head = Head(make(layer), steps)
    product = as_product(head)
    assert product is not None
    hidden = torch.randn(7, HIDDEN)
    assert torch.equal(ProductHead(product, "cpu").logits(hidden), head(hidden))
    found = run(ProductHead(product, "cpu"), hidden, wide=True)
    for a, b in zip(found, run(WholeHead(head), hidden, wide=True), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_soft_cap_keeps_one_more_copy_of_the_logits() -> None:
    product = as_product(Head(nn.Linear(4, 9), STEPS))
    assert product is not None and ProductHead(product, "cpu").copies == 2
    plain = as_product(nn.Linear(4, 9))
    assert plain is not None and ProductHead(plain, "cpu").copies == 1


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [(), (("softcap", 2.0),), (("multiply", 0.5), ("softcap", 3.0), ("divide", 1.5))])
def test_gradients_are_those_of_the_whole_loss(loss: CrossEntropy | DistillLoss, bias: bool, steps: Any) -> None:
    """Every head that is a product, the first rows of one among them, to 1e-5 of the largest in float32."""
    generator = torch.Generator().manual_seed(3)
    weight, teacher_weight = (torch.randn(VOCABULARY + 7, HIDDEN, generator=generator) for _ in range(2))
    layer, other = (nn.Linear(HIDDEN, VOCABULARY + 7, bias=bias) for _ in range(2))
    layer.weight.data, other.weight.data = weight, teacher_weight
    hidden, _, teacher, _, targets = problem(masked=True)
    heads = Head(layer, steps, VOCABULARY), Head(other, steps, VOCABULARY)
    assert as_product(heads[0]) is not None
    found = []
    for total, dtype in ((partial(chunked, chunk=5), torch.float32), (whole, torch.float64)):
        leaf = hidden.to(dtype).requires_grad_()
        both = heads[0].to(dtype), heads[1].to(dtype)
        value = total(loss, leaf, both[0], teacher.to(dtype), both[1], targets)
        found.append([value.detach(), *torch.autograd.grad(value, [leaf, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
