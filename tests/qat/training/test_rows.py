"""Losses between rows of logits: the reference of `qat::distill_rows` against float64 definitions."""

import pytest
import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.training import rows
from qat.training.rows import IGNORE, KINDS, distill_rows

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", "other"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of CPUs, and that of devices where no row may be looked at."""
    if request.param == "other":
        monkeypatch.setattr(rows, "_may_look", lambda tensor: False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(kind: str, teacher: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, targets) if kind == "cross_entropy" else (teacher, None)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_the_definition(kind: str, dtype: torch.dtype) -> None:
    """Values and gradients by automatic differentiation in float64, for temperature, beta and scale."""
    student, teacher, targets = normal(6, 40).to(dtype), normal(6, 40, seed=1).to(dtype), torch.arange(6) * 7
    targets[2] = IGNORE
    t, beta, scale = 1.7, 0.3, 8.0
    x = student.double().requires_grad_()
    q, p = (x / t).softmax(-1), (teacher.double() / t).softmax(-1)
    m = beta * p + (1 - beta) * q
    losses = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1),
        "cross_entropy": torch.where(targets == IGNORE, 0.0, -q[torch.arange(6), targets.clamp_min(0)].log()),
    }[kind] * t**2
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    work = student.clone()
    found = distill_rows(work, *given(kind, teacher, targets), kind, temperature=t, beta=beta, scale=scale)
    assert work.dtype == dtype and found.dtype == torch.promote_types(dtype, torch.float32)
    tight = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(found.double(), losses.detach(), rtol=tight, atol=tight)
    torch.testing.assert_close(work.double(), scale * gradient, rtol=max(tight, torch.finfo(dtype).eps), atol=tight)


@every_kind
def test_masked_columns_do_not_exist(kind: str) -> None:
    student, teacher, targets = normal(3, 40), normal(3, 40, seed=1), torch.tensor([0, 29, 3])
    short, other = student[:, :30].clone(), teacher[:, :30].clone()
    expected = distill_rows(short, *given(kind, other, targets), kind)
    student[:, 30:], teacher[:, 30:] = -torch.inf, -torch.inf
    one_sided = student.clone(), teacher.clone()
    found = distill_rows(student, *given(kind, teacher, targets), kind)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(student[:, :30], short)
    assert not student[:, 30:].any()
    one_sided[0][0, 5] = one_sided[1][1, 6] = -torch.inf
    loss = distill_rows(one_sided[0], *given(kind, one_sided[1], targets), kind)
    infinite = {"forward_kl": 0, "reverse_kl": 1}.get(kind, -1)  # who gives weight to what the other rules out
    assert loss.isinf().tolist() == [row == infinite for row in range(3)] and not loss.isnan().any()
    assert one_sided[0][2].equal(student[2])


@every_kind
def test_spoiled_rows_stay_alone(kind: str) -> None:
    student, teacher, targets = normal(3, 40), normal(3, 40, seed=1), torch.tensor([0, 29, 3])
    clean = student.clone()
    expected = distill_rows(clean, *given(kind, teacher, targets), kind)
    student[1, 4] = torch.nan
    loss = distill_rows(student, *given(kind, teacher, targets), kind)
    assert loss.isnan().tolist() == [False, True, False] and student[1].isnan().all()
    assert loss[[0, 2]].equal(expected[[0, 2]]) and student[[0, 2]].equal(clean[[0, 2]])


@every_kind
@pytest.mark.parametrize("few", [0, 1])
def test_few_rows(kind: str, few: int) -> None:
    logits = normal(few, 9)
    loss = distill_rows(logits, *given(kind, normal(few, 9), torch.zeros(few, dtype=torch.long)), kind)
    assert loss.shape == (few,)


@every_kind
def test_opcheck(kind: str) -> None:
    arguments = (normal(3, 9), *given(kind, normal(3, 9, seed=1), torch.tensor([0, 8, IGNORE])), kind, 2.0, 0.25, 1.0)
    torch.library.opcheck(torch.ops.qat.distill_rows.default, arguments)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"student logits \(3, 9\) with \(3, 8\): both models need .* vocabulary"
    ):
        distill_rows(normal(3, 9), normal(3, 8), None, "forward_kl")
    with pytest.raises(UnsupportedError, match="no loss 'kl' over rows of logits; there are forward_kl"):
        distill_rows(normal(3, 9), normal(3, 9), None, "kl")
    with pytest.raises(UnsupportedError, match="jsd needs teacher logits"):
        distill_rows(normal(3, 9), None, None, "jsd")
