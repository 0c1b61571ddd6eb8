"""Losses against torch.distributions, and the chunked form against the whole one, for every member of the union."""

import typing
from collections.abc import Callable

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from qat.adapters.linear import QatLinear
from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.training.heads import Product, as_product
from qat.training.losses import IGNORE, chunk_tokens, chunked
from qat.training.objectives import (
    ConfidenceAwareKL,
    CrossEntropy,
    DistillLoss,
    ForwardKL,
    JensenShannon,
    Loss,
    Mixture,
    ReverseKL,
    TopKL,
    _Loss,
)

MEMBERS = typing.get_args(typing.get_args(Loss)[0])
WITHOUT_DEFAULTS = {Mixture: {"losses": ({"kind": "forward_kl"}, {"kind": "top_kl", "k": 5}), "weights": (0.75, 0.5)}}
LOSSES = [
    *(member(**WITHOUT_DEFAULTS.get(member, {})) for member in MEMBERS),
    TopKL(k=4, temperature=2.0),
    ConfidenceAwareKL(gamma=0.25),
    ForwardKL(temperature=2.5),
    ReverseKL(temperature=0.5),
    JensenShannon(beta=0.2),
]
DISTILL = [loss for loss in LOSSES if loss.needs_teacher]
TOKENS, HIDDEN, VOCABULARY = 24, 8, 33

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_distillation = pytest.mark.parametrize("loss", DISTILL, ids=repr)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bucketed(of: Categorical, by: Categorical, k: int) -> Categorical:
    """The k columns where `by` is largest, and all others as one."""
    order = by.probs.argsort(dim=-1, descending=True)
    probs = of.probs.gather(-1, order)
    return Categorical(probs=torch.cat((probs[:, :k], probs[:, k:].sum(-1, keepdim=True)), dim=-1), validate_args=False)


def reference(loss: CrossEntropy | DistillLoss, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Per token, written with torch.distributions."""
    if isinstance(loss, CrossEntropy):
        return -Categorical(logits=student).log_prob(targets)
    t = getattr(loss, "temperature", 1.0)
    p, q = Categorical(logits=teacher / t), Categorical(logits=student / t)
    if isinstance(loss, ForwardKL):
        return kl_divergence(p, q) * t**2
    if isinstance(loss, ReverseKL):
        return kl_divergence(q, p) * t**2
    if isinstance(loss, ConfidenceAwareKL):
        gamma = p.log_prob(targets).exp().detach() if loss.gamma is None else loss.gamma
        return gamma * kl_divergence(q, p) + (1 - gamma) * kl_divergence(p, q)
    if isinstance(loss, TopKL):
        return kl_divergence(*(bucketed(each, p, loss.k) for each in (p, q))) * t**2
    if isinstance(loss, Mixture):
        parts = [reference(part, student, teacher, targets) for part in loss.losses]
        return sum((w * part for w, part in zip(loss.weights, parts, strict=True)), torch.zeros(()))
    assert isinstance(loss, JensenShannon)
    mixture = Categorical(probs=loss.beta * p.probs + (1 - loss.beta) * q.probs)
    return loss.beta * kl_divergence(p, mixture) + (1 - loss.beta) * kl_divergence(q, mixture)


@every_loss
def test_values_equal_torch_distributions(loss: CrossEntropy | DistillLoss) -> None:
    student, teacher = 3 * normal(TOKENS, VOCABULARY).double(), 3 * normal(TOKENS, VOCABULARY, seed=1).double()
    targets = torch.arange(TOKENS) % VOCABULARY
    found = loss.tokens(student, teacher, targets)
    assert found.shape == (TOKENS,)
    torch.testing.assert_close(found, reference(loss, student, teacher, targets), rtol=1e-9, atol=1e-9)
    assert (found > 0).all()


@every_loss
def test_gradcheck(loss: CrossEntropy | DistillLoss) -> None:
    student = normal(4, 7).double().requires_grad_()
    teacher, targets = normal(4, 7, seed=1).double(), torch.arange(4)
    assert torch.autograd.gradcheck(lambda s: loss.tokens(s, teacher, targets), student)


@every_distillation
def test_zero_value_and_gradient_where_student_equals_teacher(loss: DistillLoss) -> None:
    logits = 5 * normal(TOKENS, VOCABULARY).double()
    student = logits.clone().requires_grad_()
    value = loss.tokens(student, logits, torch.zeros(TOKENS, dtype=torch.long))
    assert value.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert grad.abs().max() < 1e-12
    shifted = loss.tokens(logits + 7.0, logits, torch.zeros(TOKENS, dtype=torch.long))
    assert shifted.abs().max() < 1e-9  # logits mean the same up to a constant


def problem(masked: bool) -> tuple[Tensor, nn.Linear, Tensor, nn.Linear, Tensor]:
    """(student hidden, student head, teacher hidden, teacher head, targets) for two sequences of twelve tokens."""
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(HIDDEN, VOCABULARY), nn.Linear(HIDDEN, VOCABULARY)
    teacher_head.requires_grad_(False)
    targets = torch.randint(0, VOCABULARY, (2, 12))
    if masked:
        targets[0, :5], targets[1, 3] = IGNORE, IGNORE
    return normal(2, 12, HIDDEN), student_head, normal(2, 12, HIDDEN, seed=1), teacher_head, targets


def whole(loss: CrossEntropy | DistillLoss, student: Tensor, head: nn.Module, teacher: Tensor, teacher_head: nn.Module,
          targets: Tensor) -> Tensor:  # fmt: skip
    keep = targets.flatten() != IGNORE
    values = reference(
        loss, head(student).flatten(0, 1), teacher_head(teacher).flatten(0, 1), targets.flatten().clamp_min(0)
    )
    return values[keep].sum()


@every_loss
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_equals_whole(loss: CrossEntropy | DistillLoss, chunk: int, masked: bool) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked)
    found, expected = [], []
    for results, total in ((found, chunked_total(chunk)), (expected, whole)):
        leaf = hidden.clone().requires_grad_()
        value = total(loss, leaf, head, teacher, teacher_head, targets)
        results += [value.detach(), *torch.autograd.grad(value * 0.3, [leaf, head.weight, head.bias])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    if masked:
        assert not found[1].flatten(0, 1)[targets.flatten() == IGNORE].any()


def chunked_total(chunk: int) -> Callable[..., Tensor]:
    return lambda *args: chunked(*args, chunk=chunk)


@every_loss
def test_masked_positions_have_no_influence(loss: CrossEntropy | DistillLoss) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    value = chunked(loss, hidden, head, teacher, teacher_head, targets, 5)
    masked = targets == IGNORE
    spoiled = [torch.where(masked.unsqueeze(-1), torch.nan, t) for t in (hidden, teacher)]
    assert torch.equal(chunked(loss, spoiled[0], head, spoiled[1], teacher_head, targets, 5), value)


@every_loss
def test_without_any_target_the_loss_is_zero_with_zero_gradients(loss: CrossEntropy | DistillLoss) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    leaf = hidden.clone().requires_grad_()
    value = chunked(loss, leaf, head, teacher, teacher_head, torch.full_like(targets, IGNORE), 5)
    value.backward()
    assert value == 0 and not leaf.grad.any() and not head.weight.grad.any()


@every_loss
def test_a_tied_head_collects_both_gradients(loss: CrossEntropy | DistillLoss) -> None:
    """One tensor is embedding and head: its gradient is the sum of the two uses."""
    _, _, teacher, teacher_head, targets = problem(masked=True)
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight = embedding.weight
    ids = torch.arange(24).view(2, 12)
    grads = []
    for total in (chunked_total(5), whole):
        value = total(loss, torch.tanh(embedding(ids)), head, teacher, teacher_head, targets)
        grads.append(torch.autograd.grad(value, embedding.weight)[0])
    torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-6)


def quantized(layer: nn.Linear, inputs: bool) -> QatLinear:
    fmt = lookup("int4_channel")
    input = InputQuantizer(lookup("fp8_token"), "compressed_tensors", "ste", "minmax") if inputs else None
    return QatLinear.wrap(layer, WeightQuantizer(fmt, find_scales(layer.weight, fmt), "dual_lsq"), input)


@every_loss
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_a_quantized_head_learns_its_scales_through_chunks(
    loss: CrossEntropy | DistillLoss, inputs: bool, cap: float | None
) -> None:
    """Its fake quantization stays in the graph, as does its input's and a soft cap behind it; it runs once."""
    hidden, plain, teacher, teacher_head, targets = problem(masked=True)
    layer = quantized(plain, inputs)
    head = Honest(layer, cap)
    calls: list[int] = []
    layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    grads = []
    for total in (chunked_total(5), whole):
        leaf = hidden.clone().requires_grad_()
        value = total(loss, leaf, head, teacher, teacher_head, targets)
        learned = [layer.weight_quantizer.log_scale, layer.weight_quantizer.log_divisor]
        grads.append([value.detach(), *torch.autograd.grad(value, [leaf, head.layer.weight, plain.bias, *learned])])
        assert len(calls) == 1
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.any()


@every_loss
def test_gradient_accumulation_over_parts_equals_one_batch(loss: CrossEntropy | DistillLoss) -> None:
    """Sums divided by the tokens of the whole step: unequal parts weigh by their tokens, not by their number."""
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    tokens = int((targets != IGNORE).sum())
    value = chunked(loss, hidden, head, teacher, teacher_head, targets, 5) / tokens
    (expected,) = torch.autograd.grad(value, head.weight)
    for row in range(2):
        part = slice(row, row + 1)
        (chunked(loss, hidden[part], head, teacher[part], teacher_head, targets[part], 5) / tokens).backward()
    torch.testing.assert_close(head.weight.grad, expected, rtol=2e-5, atol=2e-6)


@every_loss
def test_evaluation_and_partly_frozen_students(loss: CrossEntropy | DistillLoss) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    expected = whole(loss, hidden, head, teacher, teacher_head, targets)
    with torch.no_grad():
        assert torch.isclose(chunked(loss, hidden, head, teacher, teacher_head, targets, 5), expected)
    head.weight.requires_grad_(False)
    value = chunked(loss, hidden, head, teacher, teacher_head, targets, 5)
    (grad,) = torch.autograd.grad(value, head.bias)
    assert grad.any() and head.weight.grad is None
    head.bias.requires_grad_(False)  # nothing to train: still a value
    assert torch.isclose(chunked(loss, hidden, head, teacher, teacher_head, targets, 5), expected)


@every_distillation
def test_the_teacher_gets_no_gradient_and_the_logits_stay_small(loss: DistillLoss) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=False)
    teacher.requires_grad_()
    teacher_head.requires_grad_(True)
    sizes: list[int] = []
    for module in (head, teacher_head):
        module.register_forward_hook(lambda _m, _i, output: sizes.append(len(output)))
    chunked(loss, hidden, head, teacher, teacher_head, targets, 5).backward()
    assert teacher.grad is None and teacher_head.weight.grad is None
    assert sizes and max(sizes) == 5 and sum(sizes) == 2 * TOKENS


class Around(nn.Module):
    """A head that is more than its layer, as far as `as_product` can see."""

    def __init__(self, layer: nn.Module, softcap: float | None = None) -> None:
        super().__init__()
        self.layer, self.softcap = layer, softcap

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Honest(Around):
    """... and one that says what it is."""

    def as_product(self) -> Product | None:
        product = as_product(self.layer)
        steps = () if self.softcap is None else (("softcap", self.softcap),)
        return product and product.followed_by(steps)


@every_loss
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_a_plain_head_equals_any_head(loss: CrossEntropy | DistillLoss, autocast: bool, chunk: int) -> None:
    """The hand-written products against autograd; under autocast both multiply in BF16 and sum in float32."""
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    grads = []
    for wrap in (lambda layer: layer, Around, Honest):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = chunked(loss, leaf, wrap(head), teacher, wrap(teacher_head), targets, chunk)
        grads.append([value.detach(), *torch.autograd.grad(value, [leaf, head.weight, head.bias])])
        assert all(g.dtype == torch.float32 for g in grads[-1])
    assert all(a.equal(b) for a, b in zip(grads[0], grads[2], strict=True))
    tight = {"rtol": 1e-2, "atol": 1e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(grads[0], grads[1], strict=True):
        torch.testing.assert_close(a, b, **tight)


@every_loss
@pytest.mark.parametrize("wrap", [Around, Honest])
def test_soft_capped_heads_keep_their_objective(loss: CrossEntropy | DistillLoss, wrap: type[Around]) -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    heads = wrap(head, 0.5), wrap(teacher_head, 0.7)
    assert (as_product(heads[0]) is None) == (wrap is Around)
    found, expected = [], []
    for results, total in ((found, chunked_total(5)), (expected, whole)):
        leaf = hidden.clone().requires_grad_()
        value = total(loss, leaf, heads[0], teacher, heads[1], targets)
        results += [value.detach(), *torch.autograd.grad(value, [leaf, head.weight])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_head_whose_backward_needs_its_output_keeps_it() -> None:
    """The gradient is written where logits stood, but not where autograd saved them."""
    hidden, head, teacher, teacher_head, targets = problem(masked=False)
    heads = nn.Sequential(head, nn.Tanh()), nn.Sequential(teacher_head, nn.Tanh())
    grads = []
    for total in (chunked_total(5), whole):
        value = total(ForwardKL(), hidden, heads[0], teacher, heads[1], targets)
        grads.append(torch.autograd.grad(value, head.weight)[0])
    torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-6)


def test_several_chunks_of_bf16_weights_are_summed_in_float32() -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=False)
    models = (head.bfloat16(), teacher.bfloat16(), teacher_head.bfloat16())
    value = chunked(ForwardKL(), hidden.bfloat16(), *models, targets, 1)
    found = torch.autograd.grad(value, head.weight)[0]
    value = chunked(ForwardKL(), hidden.bfloat16().float(), *(m.float() for m in models), targets)
    exact = torch.autograd.grad(value, head.weight)[0]
    error = (found.float() - exact).norm() / exact.norm()
    assert found.dtype == torch.bfloat16 and error < 2.0**-8


def test_the_chunk_is_what_memory_allows() -> None:
    assert chunk_tokens(49152, 4, None) == 256
    assert chunk_tokens(128256, 2, 80 * 10**9) == 2048
    for vocabulary in (32000, 128256, 151936, 262144):
        tokens = chunk_tokens(vocabulary, 2, 80 * 10**9)
        assert tokens >= 1024 and 2 * 2 * tokens * vocabulary <= 1.5e9
        assert chunk_tokens(vocabulary, 2, 16 * 10**9) <= tokens
    assert chunk_tokens(128256, 2, 80 * 10**9, copies=3) == 1280


def test_models_of_other_vocabularies_are_refused() -> None:
    hidden, head, teacher, _, targets = problem(masked=False)
    with pytest.raises(UnsupportedError, match="the same vocabulary"):
        chunked(ForwardKL(), hidden, head, teacher, nn.Linear(HIDDEN, VOCABULARY + 1), targets)


class Squared(_Loss):
    """A loss written as one class, in torch, that `qat.training.rows` has never heard of."""

    kind: typing.Literal["squared"] = "squared"

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        return (student - teacher).square().sum(dim=-1)


def test_a_loss_of_ones_own_needs_only_its_definition() -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=False)
    value = chunked(Squared(), hidden, head, teacher, teacher_head, targets, 5)  # type: ignore[arg-type]  # not in the union
    expected = (head(hidden) - teacher_head(teacher)).square().sum()
    torch.testing.assert_close(value, expected)
    for a, b in zip(*(torch.autograd.grad(v, [head.weight, head.bias]) for v in (value, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_models_get_a_float32_loss_and_bf16_gradients() -> None:
    hidden, head, teacher, teacher_head, targets = problem(masked=True)
    leaf = hidden.bfloat16().requires_grad_()
    models = (head.bfloat16(), teacher.bfloat16(), teacher_head.bfloat16())
    value = chunked(ForwardKL(), leaf, *models, targets, 5)
    value.backward()
    assert value.dtype == torch.float32
    assert leaf.grad.dtype == head.weight.grad.dtype == torch.bfloat16


def test_losses_are_chosen_by_kind_and_are_strict() -> None:
    adapter: TypeAdapter[CrossEntropy | DistillLoss] = TypeAdapter(Loss)
    kinds = [member.model_fields["kind"].default for member in MEMBERS]
    more = [WITHOUT_DEFAULTS.get(member, {}) for member in MEMBERS]
    found = [type(adapter.validate_python({"kind": k, **m})) for k, m in zip(kinds, more, strict=True)]
    assert found == list(MEMBERS)
    assert all(kind == loss.model_dump()["kind"] for kind, loss in zip(kinds, LOSSES, strict=False))
    assert "needs_teacher" not in ForwardKL().model_dump()
    for bad in (
        {"kind": "forward_kl", "temperature": 0},
        {"kind": "jsd", "beta": 1.0},
        {"kind": "forward_kl", "beta": 1},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)
