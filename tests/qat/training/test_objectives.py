"""What single losses promise beside the arithmetic of `test_losses.py`: bounds, limits, hidden states, refusals."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.training.losses import IGNORE, chunked
from qat.training.objectives import ConfidenceAwareKL, CrossEntropy, ForwardKL, Mixture, ReverseKL, TopKL


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_bucket_bounds_the_full_divergence_from_below_and_grows_into_it() -> None:
    student, teacher, targets = 3 * normal(9, 33).double(), 3 * normal(9, 33, seed=1).double(), torch.arange(9)
    full = ForwardKL().tokens(student, teacher, targets)
    bounds = torch.stack([TopKL(k=k).tokens(student, teacher, targets) for k in (1, 4, 16, 32, 500)])
    assert (bounds[1:] >= bounds[:-1] - 1e-12).all() and (bounds[-1] <= full + 1e-12).all()
    torch.testing.assert_close(bounds[-1], full)


def test_a_column_that_the_teacher_rules_out_leaves_finite_gradients() -> None:
    student, teacher = normal(4, 12).requires_grad_(), normal(4, 12, seed=1)
    teacher[:, 6:] = -torch.inf
    value = TopKL(k=8).tokens(student, teacher, torch.arange(4))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(("gamma", "limit"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
def test_confidence_reaches_from_forward_to_reverse(gamma: float, limit: ForwardKL | ReverseKL) -> None:
    given = 3 * normal(9, 33), 3 * normal(9, 33, seed=1), torch.arange(9)
    torch.testing.assert_close(ConfidenceAwareKL(gamma=gamma).tokens(*given), limit.tokens(*given))


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_hidden_states_add_their_distance_over_the_tokens_that_count(measure: str) -> None:
    """Value and gradient against the definition; and nothing where both models agree."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 33), nn.Linear(8, 33)
    hidden, teacher = normal(2, 6, 8).requires_grad_(), normal(2, 6, 8, seed=1)
    targets = torch.randint(0, 33, (2, 6))
    targets[0, :2] = IGNORE
    plain = chunked(ForwardKL(), hidden, head, teacher, teacher_head, targets, 5)
    loss = ForwardKL.model_validate({"hidden": 0.3, "hidden_measure": measure})
    found = chunked(loss, hidden, head, teacher, teacher_head, targets, 5)
    x, y = hidden[targets != IGNORE], teacher[targets != IGNORE]
    if measure == "cosine":
        apart = 1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    else:
        apart = (x - y).norm(dim=-1) ** 2 / y.norm(dim=-1) ** 2
    expected = plain + 0.3 * apart.sum()
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v, [hidden, head.weight]) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same = loss.hidden_loss(teacher.flatten(0, 1), teacher.flatten(0, 1))
    assert same is not None and abs(float(same)) < 1e-5
    with pytest.raises(UnsupportedError, match=r"hidden states of 8 and 9 columns"):
        loss.hidden_loss(normal(3, 8), normal(3, 9))


def test_a_mixture_of_one_loss_with_itself_is_that_loss() -> None:
    given = 3 * normal(9, 33).double(), 3 * normal(9, 33, seed=1).double(), torch.arange(9)
    twice = Mixture(losses=(ReverseKL(), ReverseKL()), weights=(0.25, 0.75))
    torch.testing.assert_close(twice.tokens(*given), ReverseKL().tokens(*given))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": (1.0,)}, "2 losses need 2 weights"),
        ({"losses": (CrossEntropy(), CrossEntropy())}, "needs a loss against the teacher"),
        ({"losses": (ForwardKL(hidden=0.1), CrossEntropy())}, "beside `losses`"),
        ({"losses": (ForwardKL(),)}, "at least 2"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Mixture.model_validate({"losses": (ForwardKL(), CrossEntropy()), "weights": (0.5, 0.5), **changes})
