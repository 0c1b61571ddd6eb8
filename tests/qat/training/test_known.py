"""A teacher of whom some columns are known, against autograd of the definition over whole rows in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.training.known import Known, drawn, known_in, known_rows, likeliest, thinned
from qat.training.losses import IGNORE, chunked
from qat.training.objectives import (
    ConfidenceAwareKL,
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    TopKL,
)

TOKENS, VOCABULARY, HIDDEN = 24, 33, 8
Draw = Callable[[Tensor, int, torch.Generator], Known]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Tensor, Tensor]:
    return 3 * normal(TOKENS, VOCABULARY).double(), 3 * normal(TOKENS, VOCABULARY, seed=1).double()


def bucket(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """By the definition: k + 1 probabilities of each model, whose KL autograd differentiates."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    ids = p.argsort(dim=-1, descending=True)[:, :k]
    inside = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, ids, True)
    total = torch.where(inside, p * (p.log() - q.log()), 0.0).sum(-1)
    rest_p, rest_q = ((x * ~inside).sum(-1) for x in (p, q))
    return total + rest_p * (rest_p.log() - rest_q.log())


def sampled(student: Tensor, known: Known) -> Tensor:
    """By the definition: each drawn column on its own."""
    terms = known.log_p - student.log_softmax(-1).gather(-1, known.ids)
    return terms.mean(-1) if known.step is None else (known.log_p.exp().maximum(known.step[:, None]) * terms).sum(-1)


def found(student: Tensor, known: Known) -> tuple[Tensor, Tensor]:
    logits = student.clone()
    return known_rows(logits, known), logits


@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_value_and_gradient_of_the_bucket_are_those_of_the_definition(k: int) -> None:
    student, teacher = pair()
    leaf = student.clone().requires_grad_()
    expected = bucket(leaf, teacher, k)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    value, written = found(student, likeliest(teacher, k))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(written, gradient, rtol=1e-9, atol=1e-12)


def test_with_all_columns_it_is_the_whole_divergence() -> None:
    student, teacher = pair()
    known = likeliest(teacher, 1000)
    assert known.tail is not None and not known.tail.any() and known.ids.shape == student.shape
    value, written = found(student, known)
    logits = student.clone()
    torch.testing.assert_close(value, ForwardKL().replace(logits, teacher, torch.zeros(TOKENS)))
    torch.testing.assert_close(written, logits)


def test_no_loss_and_no_gradient_where_the_student_is_the_teacher() -> None:
    _, teacher = pair()
    generator = torch.Generator().manual_seed(0)
    for known in (likeliest(teacher, 5), drawn(teacher, 5, generator), thinned(teacher, 5, generator)):
        value, written = found(teacher + 3.0, known)
        assert value.abs().max() < 1e-12
        if known.tail is not None:
            assert written.abs().max() < 1e-12


@pytest.mark.parametrize("draw", [drawn, thinned])
def test_one_drawing_is_a_cross_entropy_with_its_weights(draw: Draw) -> None:
    student, teacher = pair()
    known = draw(teacher, 20, torch.Generator().manual_seed(3))
    if draw is drawn:
        assert (known.ids.sort(-1).values.diff(dim=-1) == 0).any()  # some are drawn more than once
    leaf = student.clone().requires_grad_()
    expected = sampled(leaf, known)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    value, written = found(student, known)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(written, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draw", [drawn, thinned])
def test_drawings_are_right_on_average(draw: Draw) -> None:
    """Value and gradient over many drawings, in standard errors of their mean; renormalised top-k fails this."""
    student, teacher = (given[:4] for given in pair())
    logits = student.clone()
    exact, n, repeats = ForwardKL().replace(logits, teacher, torch.zeros(4)), 4, 4000
    generator = torch.Generator().manual_seed(0)
    wide = [tensor.repeat(repeats, 1) for tensor in (student, teacher)]
    value, gradient = found(wide[0], draw(wide[1], n, generator))
    for draws, truth in ((value.view(repeats, 4), exact), (gradient.view(repeats, 4, -1), logits)):
        error = (draws.mean(0) - truth).abs()
        deviation = draws.std(0) / repeats**0.5
        assert (error <= 5 * deviation + 5 / (n * repeats)).all()  # columns that are hardly ever drawn
    top = likeliest(teacher, n)
    biased = Known(top.ids, top.log_p, torch.zeros(4))  # `widened` gives the tail's mass to the top
    assert (found(student, biased)[1] - logits).abs().max() > 0.02


def certain_by_search(p: list[float], k: int) -> int:
    """By the definition: the fewest of the likeliest, so that no other is more than its share of the rest."""
    ranked = sorted(p, reverse=True)
    return next(e for e in range(k) if ranked[e] <= sum(ranked[e:]) / (k - e))


@pytest.mark.parametrize("k", [2, 7, 20])
def test_the_likeliest_are_certain_and_every_drawn_one_stands_for_a_step(k: int) -> None:
    _, teacher = pair()
    p, known = teacher.softmax(-1), thinned(teacher, k, torch.Generator().manual_seed(5))
    assert known.step is not None and known.ids.shape == (TOKENS, k)
    assert (known.ids.sort(-1).values.diff(dim=-1) > 0).all()  # none twice
    assert torch.equal(known.log_p, teacher.log_softmax(-1).gather(-1, known.ids))
    counts = set()
    for row in range(TOKENS):
        count = certain_by_search(p[row].tolist(), k)
        assert set(known.ids[row, :count].tolist()) == set(p[row].topk(count).indices.tolist())
        rest = 1 - p[row].topk(count).values.sum()
        assert known.step[row] == pytest.approx(float(rest) / (k - count), rel=1e-6)
        counts.add(count)
    assert len(counts) > 1 or k == 2


def test_how_often_a_column_is_drawn_is_its_probability_over_the_step() -> None:
    logits = (2 * normal(1, 12, seed=4)).double()
    p, repeats, k = logits.softmax(-1)[0], 20000, 5
    known = thinned(logits.repeat(repeats, 1), k, torch.Generator().manual_seed(1))
    often = torch.bincount(known.ids.flatten(), minlength=12) / repeats
    expected = (p / p.new_tensor(known.step[0].item())).clamp(max=1.0)
    assert 0 < int((expected == 1).sum()) < k
    assert ((often - expected).abs() <= 5 * (expected * (1 - expected) / repeats).sqrt() + 1e-7).all()


def test_with_all_columns_nothing_is_left_to_chance() -> None:
    student, teacher = pair()
    exact = student.clone()
    value = ForwardKL().replace(exact, teacher, torch.zeros(TOKENS))
    found_value, gradient = found(student, thinned(teacher, 1000, torch.Generator()))
    torch.testing.assert_close(found_value, value)
    torch.testing.assert_close(gradient, exact)


def test_of_a_row_with_fewer_columns_than_are_kept_nothing_is_drawn() -> None:
    student, teacher = (given[:4] for given in pair())
    teacher[:, 4:] = -torch.inf
    known = thinned(teacher, 9, torch.Generator().manual_seed(0))
    assert known.step is not None and not known.step.any()
    exact = student.clone()
    value = ForwardKL().replace(exact, teacher, torch.zeros(4))
    for kept in (known, Known(known.ids.int(), known.log_p.half(), None, known.step.float())):
        found_value, gradient = found(student, kept)
        torch.testing.assert_close(found_value, value, rtol=1e-3, atol=0)
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-3)
    assert len(thinned(teacher[:0], 9, torch.Generator()).ids) == 0  # no token is learned


def test_drawing_the_rest_alone_is_nearer_than_drawing_all() -> None:
    """At one number of columns: the variance of the gradient."""
    student, teacher = pair()
    exact, repeats = student.clone(), 200
    ForwardKL().replace(exact, teacher, torch.zeros(TOKENS))
    errors = []
    for draw in (drawn, thinned):
        many = [given.repeat(repeats, 1) for given in (student, teacher)]
        gradient = found(many[0], draw(many[1], 8, torch.Generator().manual_seed(2)))[1].view(repeats, TOKENS, -1)
        errors.append((gradient - exact).square().sum((1, 2)).mean())
    assert errors[1] < errors[0] / 4


def test_rounding_keeps_the_masses_of_what_was_drawn() -> None:
    student, teacher = pair()
    known = thinned(teacher, 9, torch.Generator().manual_seed(0))
    stored = Known(known.ids.int(), known.log_p.half(), None, known.step)
    (value, gradient), (exact, truth) = found(student, stored), found(student, known)
    assert (value - exact).abs().max() < 4e-3 and (gradient - truth).abs().max() < 1e-3
    assert (gradient.sum(-1).abs() < 1e-6).all()


def test_rounding_keeps_the_masses() -> None:
    """As stored in 16 bits: the top has the mass 1 - tail, and the gradient is off by little."""
    student, teacher = pair()
    known = likeliest(teacher, 9)
    assert known.tail is not None
    stored = Known(known.ids.int(), known.log_p.half(), known.tail.float())
    wide = stored.widened(torch.float64)
    assert wide.tail is not None
    torch.testing.assert_close(wide.log_p.exp().sum(-1) + wide.tail, torch.ones(TOKENS).double())
    (value, gradient), (exact, truth) = found(student, stored), found(student, known)
    assert (value - exact).abs().max() < 2e-3 and (gradient - truth).abs().max() < 1e-3
    assert torch.equal(gradient.sum(-1).abs() < 1e-6, torch.ones(TOKENS, dtype=torch.bool))


def test_columns_that_a_model_rules_out_leave_finite_gradients() -> None:
    student, teacher = normal(4, 12), normal(4, 12, seed=1)
    teacher[:, 6:] = -torch.inf
    value, gradient = found(student, likeliest(teacher, 8))
    exact = student.clone()
    torch.testing.assert_close(value, ForwardKL().replace(exact, teacher, torch.zeros(4)))
    torch.testing.assert_close(gradient, exact)
    far = normal(4, 12)
    far[:, 3:] = -300.0  # the rest's mass is no float32
    value, gradient = found(far, likeliest(normal(4, 12, seed=1), 2))
    assert value.isfinite().all() and gradient.isfinite().all()


def test_fewer_columns_than_there_are_give_the_same_as_top_kl() -> None:
    student, teacher = pair()
    logits, own = student.clone(), student.clone()
    known, targets = likeliest(teacher, 20), torch.zeros(TOKENS, dtype=torch.long)
    value = TopKL(k=6).replace(logits, known, targets)
    torch.testing.assert_close(value, TopKL(k=6).replace(own, teacher, targets), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("kind", ["topk", "sample", "hybrid"])
@pytest.mark.parametrize("mixed", [False, True])
def test_chunks_equal_whole_rows(chunk: int, kind: str, mixed: bool) -> None:
    """Hidden states and head get the gradients of the definition over the tokens that count; a mixture's, too."""
    torch.manual_seed(0)
    head, teacher = nn.Linear(HIDDEN, VOCABULARY).double(), 3 * normal(TOKENS, VOCABULARY, seed=1).double()
    targets = torch.randint(0, VOCABULARY, (2, TOKENS // 2))
    targets[0, :5], targets[1, 3] = IGNORE, IGNORE
    keep = targets.flatten() != IGNORE
    draw: dict[str, Draw] = {"topk": lambda logits, k, _: likeliest(logits, k), "sample": drawn, "hybrid": thinned}
    known = draw[kind](teacher[keep], 6, torch.Generator().manual_seed(1))
    loss = Mixture(losses=(ForwardKL(), CrossEntropy()), weights=(0.75, 0.5)) if mixed else ForwardKL()
    results = []
    for whole in (False, True):
        hidden = normal(2, TOKENS // 2, HIDDEN).double().requires_grad_()
        if whole:
            logits = head(hidden).flatten(0, 1)[keep]
            total = (bucket(logits, teacher[keep], 6) if kind == "topk" else sampled(logits, known)).sum()
            if mixed:
                entropy = -logits.log_softmax(-1).gather(-1, targets.flatten()[keep][:, None]).sum()
                total = 0.75 * total + 0.5 * entropy
        else:
            total = chunked(loss, hidden, head, None, None, targets, chunk, known)
        results.append([total.detach(), *torch.autograd.grad(0.3 * total, [hidden, head.weight, head.bias])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert torch.isclose(chunked(loss, hidden, head, None, None, targets, chunk, known).double(), results[1][0])


def test_logits_stay_small_and_keep_their_dtype() -> None:
    head = nn.Linear(HIDDEN, VOCABULARY).bfloat16()
    sizes: list[int] = []
    head.register_forward_hook(lambda _m, _i, output: sizes.append(len(output)))
    hidden = normal(2, TOKENS // 2, HIDDEN).bfloat16().requires_grad_()
    known = likeliest(normal(TOKENS, VOCABULARY, seed=1), 4)
    value = chunked(ForwardKL(), hidden, head, None, None, torch.zeros(2, TOKENS // 2, dtype=torch.long), 5, known)
    value.backward()
    assert max(sizes) == 5 and value.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16


def test_a_batch_carries_them() -> None:
    teacher = normal(4, 12)
    for known in (likeliest(teacher, 3), *(draw(teacher, 3, torch.Generator()) for draw in (drawn, thinned))):
        back = known_in(known.named())
        assert back is not None and all(a is b for a, b in zip(back, known, strict=True))
    assert known_in({"targets": teacher}) is None


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (ReverseKL(), "loss reverse_kl needs the teacher's probability of every token"),
        (JensenShannon(), "loss jsd needs"),
        (ConfidenceAwareKL(), "loss cakld needs"),
        (ForwardKL(temperature=2.0), "temperature 2 weighs all"),
        (ForwardKL(hidden=0.1), "loss.hidden compares"),
        (Mixture(losses=(ForwardKL(), JensenShannon()), weights=(1, 1)), "loss jsd needs"),
        (Mixture(losses=(ForwardKL(), CrossEntropy()), weights=(1, 1), hidden=0.5), "loss.hidden compares"),
    ],
)
def test_losses_that_need_whole_rows_are_refused(loss: ForwardKL, said: str) -> None:
    known = likeliest(normal(TOKENS, VOCABULARY), 4)
    targets = torch.zeros(2, TOKENS // 2, dtype=torch.long)
    with pytest.raises(UnsupportedError, match=said):
        chunked(loss, normal(2, TOKENS // 2, HIDDEN), nn.Linear(HIDDEN, VOCABULARY), None, None, targets, 5, known)


def test_top_kl_takes_what_the_cache_has() -> None:
    assert TopKL(k=64).beyond(False, 64) is None and TopKL().beyond(True) is not None
    assert "loss.k=32 or less" in str(TopKL(k=64).beyond(False, 32))
