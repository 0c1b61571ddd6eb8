"""The operator that makes the scales in force: against the same formulas in autograd, and as PyTorch sees it."""

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import find_scales
from qat.training.scales import effective_scales, parts_of

FORMATS = [name for name, fmt in CATALOG.items() if not fmt.zero_point]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(name: str, parts: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(start, log_scale, log_divisor, global scale); two corrections lead far out of what the type can store."""
    fmt = lookup(name)
    scales = find_scales(normal(6, 256), fmt)
    start = scales.effective()
    log_scale, log_divisor = (
        0.2 * normal(*start.shape, seed=1),
        0.2 * normal(len(start), start.shape[1] * parts, seed=2),
    )
    log_scale.flatten()[:2] = torch.tensor([-30.0, 30.0])[: log_scale.numel()]
    return start, log_scale.requires_grad_(), log_divisor.requires_grad_(), scales.global_scale


def in_autograd(
    name: str, start: Tensor, log_scale: Tensor | None, log_divisor: Tensor | None, above: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The definition, one operation after the other."""
    latent = start if log_scale is None else start * log_scale.exp()
    kind = lookup(name).scale
    stored = kind.decode(kind.store(latent.detach(), above))
    multiplier = (stored if above is None else stored * above) + (latent - latent.detach())
    if log_divisor is None:
        return multiplier, None
    return multiplier, start.repeat_interleave(log_divisor.shape[1] // start.shape[1], dim=1) * log_divisor.exp()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True), (False, False)])
def test_values_and_gradients_are_those_of_the_formulas_to_the_bit(name: str, learned: tuple[bool, bool]) -> None:
    start, *logs, above = case(name, parts_of(lookup(name)) or 1)
    logs = [log if wanted else None for log, wanted in zip(logs, learned, strict=True)]
    leaves = [log for log in logs if log is not None]
    found = effective_scales(start, *logs, above, name)
    expected = in_autograd(name, start, *logs, above)
    again = effective_scales(start, *logs, above, name, held=found)
    assert (found[1] is None) is (logs[1] is None)
    gradients = []
    for each in (found, expected, again):
        scales = [scale for scale in each if scale is not None]
        loss = sum((scale * normal(*scale.shape, seed=5)).sum() for scale in scales)
        gradients.append((*scales, *(torch.autograd.grad(loss, leaves) if leaves else ())))
    for values in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], values, strict=True))


def test_a_scale_that_nobody_reads_gets_no_gradient() -> None:
    start, log_scale, log_divisor, above = case("nvfp4")
    multiplier, divisor = effective_scales(start, log_scale, log_divisor, above, "nvfp4")
    assert divisor is not None
    (found,) = torch.autograd.grad(divisor.sum(), log_divisor)
    assert torch.equal(found, divisor)
    log_divisor.requires_grad_(False)
    multiplier, divisor = effective_scales(start, log_scale, log_divisor, above, "nvfp4")
    (multiplier.sum() + divisor.sum()).backward()
    assert log_scale.grad is not None and log_divisor.grad is None


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g32"])
def test_opcheck(name: str) -> None:
    start, log_scale, log_divisor, above = (None if t is None else t.detach() for t in case(name, 2))
    assert start is not None
    for logs in ((log_scale, log_divisor), (None, log_divisor), (None, None)):
        torch.library.opcheck(torch.ops.qat.effective_scales.default, (start, *logs, above, name))
    given = (torch.ones_like(start), torch.ones_like(log_divisor), start, log_scale, log_divisor)
    torch.library.opcheck(torch.ops.qat.effective_scales_backward.default, given)
    torch.library.opcheck(torch.ops.qat.effective_scales_backward.default, (None, *given[1:3], None, log_divisor))
