"""Which heads are products, and that what they claim to be is what they compute."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat.adapters.linear import QatLinear
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import WeightQuantizer
from qat.trainers.forward import Head
from qat.training.heads import AnyHead, ProductHead, WholeHead, as_product

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
