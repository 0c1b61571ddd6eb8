"""Run by test_distill_rows.py under TRITON_INTERPRET=1: the kernel's source, executed on the CPU, against float64."""

import itertools
import sys

import torch
from torch import Tensor

from qat.kernels.distill_rows import triton as kernel
from qat.training.rows import IGNORE, KINDS
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)
TILE = 128  # small, for the interpreter; the narrowest that `constants` gives


def run(student: Tensor, teacher: Tensor, targets: Tensor, kind: str, t: float = 1.0, beta: float = 0.5,
        scale: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Losses, gradient); the student's logits are kept."""
    kernel.TILE = TILE
    work = student.clone()
    plain = kind == "cross_entropy"
    loss = kernel.distill_rows(work, None if plain else teacher, targets if plain else None, kind, t, beta, scale)
    return loss.double(), work.double()


def exact(student: Tensor, teacher: Tensor, targets: Tensor, kind: str, t: float = 1.0, beta: float = 0.5,
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Losses, gradient) in float64 by automatic differentiation of the definitions, 0 log 0 = 0."""
    x = student.double().requires_grad_()
    log_q, log_p = (x / t).log_softmax(-1), (teacher.double() / t).log_softmax(-1)
    if kind == "cross_entropy":
        losses = torch.nn.functional.cross_entropy(x / t, targets, reduction="none", ignore_index=IGNORE)
    else:
        log_q, log_p = log_q.clamp_min(-1e30), log_p.clamp_min(-1e30)  # finite, so that 0 log 0 is 0
        p, q = log_p.exp(), log_q.exp()
        m = beta * p + (1 - beta) * q
        log_m = torch.where(m > 0, m, 1.0).log()
        losses = {
            "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
            "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
            "jsd": lambda: (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1),
        }[kind]()
    losses = losses * t**2
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


def compare(what: str, student: Tensor, teacher: Tensor, targets: Tensor, kind: str, t: float = 1.0,
            beta: float = 0.5) -> None:  # fmt: skip
    """Float32 steps of a log probability, times t^2 for losses and t for gradients; one rounding to the dtype."""
    loss, gradient = run(student, teacher, targets, kind, t, beta)
    true_loss, true_gradient = exact(student, teacher, targets, kind, t, beta)
    both = (student.double(), teacher.double())
    size = 1 + torch.stack([x.masked_fill(x.isinf(), 0.0).abs().amax(-1) for x in both]).amax(0) / t
    unit = 4 * 2.0**-23 * size  # of a log probability in this row
    rounding = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}[student.dtype]
    smallest = 2.0**-24 if student.dtype == torch.float16 else 0.0  # FP16's subnormals
    q = (both[0] / t).softmax(-1)
    p = 0 if kind == "cross_entropy" else (both[1] / t).softmax(-1)
    spread = size if kind in ("reverse_kl", "jsd") else 1.0  # what q is multiplied with
    worst_loss = ((loss - true_loss).abs() / (t**2 * unit + unit * true_loss.abs())).max()
    allowed = (t * unit * spread)[:, None] * (q + p) + rounding * true_gradient.abs() + smallest
    worst_gradient = ((gradient - true_gradient).abs() / (allowed + 1e-38)).max()
    assert worst_loss <= 1 and worst_gradient <= 1, f"{what}: {worst_loss} and {worst_gradient} of the bounds"
    sums = gradient.sum(-1).abs() / (allowed.sum(-1) + 1e-38)
    assert (sums <= 1).all(), f"{what}: gradients of a row sum to {gradient.sum(-1)}"


def normal(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, vocabulary, generator=GENERATOR)).to(dtype)


def accuracy(kind: str) -> None:
    for vocabulary, dtype in itertools.product((1, 37, 128, 300), (torch.float32, torch.float16)):
        student, teacher = normal(5, vocabulary, dtype), normal(5, vocabulary, dtype)
        student[1, 0], teacher[2, -1] = 1e4, 1e4  # one certain answer each
        teacher[3] = student[3]
        targets = torch.arange(5) % vocabulary
        targets[4] = IGNORE
        for t, beta in ((1.0, 0.5), (2.5, 0.2)):
            rows = slice(0, 5) if kind != "reverse_kl" else [0, 1, 3, 4]  # e4 nats: float32 only knows 1e-3 of them
            what = f"{kind} V {vocabulary} {dtype} t {t} beta {beta}"
            compare(what, student[rows], teacher[rows], targets[rows], kind, t, beta)
    single, one = normal(1, 300), normal(1, 300)
    compare("M 1", single, one, torch.tensor([299]), kind)
    empty, _ = run(normal(0, 300), normal(0, 300), torch.zeros(0, dtype=torch.long), kind)
    assert empty.shape == (0,)


def invariances(kind: str) -> None:
    student, teacher, targets = normal(4, 300), normal(4, 300), torch.tensor([0, 299, 7, 128])
    loss, gradient = run(student, teacher, targets, kind)
    wide, wide_teacher = normal(8, 600), normal(4, 600)
    wide[::2, ::2], wide_teacher[:, ::2] = student, teacher
    for every in (2, 1):  # columns apart, then only rows
        work, before = wide[::2, : 300 * every : every], wide.clone()
        work.copy_(student)
        known, target = (None, targets) if kind == "cross_entropy" else (wide_teacher[:, ::2], None)
        apart = kernel.distill_rows(work, known, target, kind, 1.0, 0.5, 1.0)
        assert torch.equal(apart.double(), loss) and torch.equal(work.double(), gradient), f"{kind}: strides matter"
        work.copy_(before[::2, : 300 * every : every])
        assert torch.equal(wide, before), f"{kind}: wrote elsewhere"
    alone = run(student[2:3], teacher[2:3], targets[2:3], kind)
    assert torch.equal(alone[1], gradient[2:3]) and torch.equal(alone[0], loss[2:3]), f"{kind}: the batch changes a row"
    shifted = run(student + 64, teacher - 32, targets, kind)
    bound = 2.0**-15  # what adding 64 rounds off the logits
    assert (shifted[0] - loss).abs().max() < 8 * bound and (shifted[1] - gradient).abs().max() < bound, f"{kind}: shift"
    scaled = run(student, teacher, targets, kind, scale=4.0)
    assert torch.equal(scaled[1], 4 * gradient) and torch.equal(scaled[0], loss), f"{kind}: scale"
    hot = run(student * 4, teacher * 4, targets, kind, t=4.0)
    assert torch.equal(hot[0], 16 * loss) and torch.equal(hot[1], 4 * gradient), f"{kind}: temperature"
    if kind != "cross_entropy":
        same = run(student, student.clone(), targets, kind)
        limit = 0.0 if kind != "jsd" else 1e-7
        assert same[0].abs().max() <= limit and same[1].abs().max() <= limit, f"{kind}: equality"


def masked(kind: str) -> None:
    """Columns that both models rule out do not exist; spoiled rows stay alone; one-sided ones are as the maths says."""
    student, teacher, targets = normal(4, 300), normal(4, 300), torch.tensor([0, 199, 7, 128])
    inf = torch.inf
    known = run(student[:, :200], teacher[:, :200], targets, kind)
    student[:, 200:], teacher[:, 200:] = -inf, -inf
    found = run(student, teacher, targets, kind)
    torch.testing.assert_close(found[0], known[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][:, :200], known[1], rtol=1e-5, atol=1e-6)
    assert not found[1][:, 200:].any(), f"{kind}: masked columns have a gradient"
    compare(f"{kind} masked", student, teacher, targets, kind)
    one_sided = student.clone(), teacher.clone()
    one_sided[0][0, 5] = one_sided[1][1, 6] = -inf  # the student's in row 0, the teacher's in row 1
    loss, gradient = run(*one_sided, targets, kind)
    infinite = {"forward_kl": 0, "reverse_kl": 1}.get(kind, -1)
    assert loss.isinf().tolist() == [row == infinite for row in range(4)], f"{kind}: {loss}"
    assert not gradient[[row for row in range(4) if row != infinite or kind == "forward_kl"]].isnan().any()
    certain = student.clone()
    certain[0, 0] = -inf
    if kind == "cross_entropy":
        loss, gradient = run(certain, teacher, targets, kind)
        assert loss[0] == inf and gradient.isfinite().all() and gradient[0, 0] == -1
        loss, gradient = run(student, teacher, torch.tensor([300, -1, 7, IGNORE]), kind)
        assert loss.isnan().tolist() == [True, True, False, False] and not loss[3] and not gradient[3].any()
        assert gradient[:2].isnan().all()
    for value in (torch.nan, inf):
        for side in (0, 1) if kind != "cross_entropy" else (0,):
            spoiled = [student.clone(), teacher.clone()]
            spoiled[side][1, 3] = value
            loss, gradient = run(*spoiled, targets, kind)
            assert loss[1].isnan() and gradient[1, :200].isnan().any(), f"{kind}: {value} vanished"
            rest = [0, 2, 3]
            assert torch.equal(loss[rest], found[0][rest]) and torch.equal(gradient[rest], found[1][rest])
    void = student.clone()
    void[2] = -inf
    loss, _ = run(void, teacher, targets, kind)
    assert loss.isnan().tolist() == [False, False, True, False], f"{kind}: no column left"


def main() -> None:
    mend()
    for kind in KINDS:
        accuracy(kind)
        invariances(kind)
        masked(kind)
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
