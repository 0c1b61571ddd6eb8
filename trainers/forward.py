"""Splitting a causal language model into body and head, so that losses see hidden states instead of all logits.

Some architectures do more after the last matrix than `lm_head` shows (soft-capping, logit scaling); `Head` repeats
that, and `split` proves on a few tokens that body plus head equals the model.
"""

import contextlib
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import TrainingError, UnsupportedError
from qat.trainers.packing import Batch, arrange, evaluating, model_inputs, told
from qat.training.heads import STEPS, Product, as_product
from qat.training.phases import answering, split_documents
from qat.training.rows import IGNORE

# Keys of configs that scale logits, and how, the usual way first; and keys of soft caps, which come after.
SCALES: dict[str, tuple[str, ...]] = {
    "logit_scale": ("multiply",),
    "lm_head_multiplier": ("multiply",),
    "output_multiplier": ("multiply",),
    "logits_scaling": ("divide", "multiply"),
}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE_TOKENS = 8


class Head(nn.Module):
    """Hidden states (tokens, hidden) -> logits (tokens, vocabulary), as the model itself computes them.

    Args:
        linear: the output layer.
        steps: what happens to its output, in order: ("multiply" | "divide" | "softcap", by what).
        rows: give only that many of the first logits.
    """

    def __init__(self, linear: nn.Module, steps: tuple[tuple[str, float], ...] = (), rows: int | None = None) -> None:
        super().__init__()
        self.linear, self.steps, self.rows = linear, steps, rows

    @property
    def vocabulary(self) -> int:
        """Logits per token."""
        weight: Any = self.linear.weight
        return len(weight) if self.rows is None else self.rows

    def first(self, rows: int) -> "Head":
        """The head of only the first `rows` logits, which shares this one's layer."""
        return self if rows == self.vocabulary else Head(self.linear, self.steps, rows)

    def as_product(self) -> Product | None:
        """See `qat.training.heads.as_product`."""
        product = as_product(self.linear)
        if product is not None and self.rows is not None:
            product = product.first(self.rows)
        return product and product.followed_by(self.steps)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.linear(hidden)
        if self.rows is not None:
            logits = logits[..., : self.rows]
        for step, by in self.steps:  # one operation each and in the model's order: in BF16 every one rounds
            logits = STEPS[step](logits, by)
        return logits


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states (rows, sequence, hidden) of a batch from `Blocks.rows`; documents do not see each other."""
    arranged = arrange(batch, model)

    def answers() -> Tensor:
        return split_documents(batch["position_ids"], batch["targets"] != IGNORE)

    asked = answering(answers) if "targets" in batch else contextlib.nullcontext()  # a probe has none
    with told(batch) if arranged is batch else contextlib.nullcontext(), asked:
        output = body(model)(**model_inputs(arranged))
    hidden: Tensor | None = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise UnsupportedError(f"{type(model).__name__} does not give its final hidden states; report the architecture")
    return hidden.reshape(*batch["input_ids"].shape, -1)


def body(model: Any) -> Any:
    """What computes hidden states; some classes name it otherwise than their prefix says (Llama 4's text model)."""
    base = model.base_model
    if base is not model:
        return base
    embedding = model.get_input_embeddings()
    children = [child for child in model.children() if any(module is embedding for module in child.modules())]
    return children[0] if children and children[0] is not embedding else model


def heads(student: Any, teacher: Any | None) -> tuple[Head, Head | None]:
    """The checked heads of both, over the rows that both have: embeddings may be padded to different lengths."""
    own = split(student)
    if teacher is None:
        return own, None
    other = split(teacher)
    rows = min(own.vocabulary, other.vocabulary)
    return own.first(rows), other.first(rows)


@torch.no_grad()
def split(model: Any) -> Head:
    """The head of `model`, checked.

    Raises:
        TrainingError: the model computes NaN.
        UnsupportedError: body plus head is not the model (an architecture that post-processes logits in its own way).
    """
    device = next(model.parameters()).device
    tokens = torch.arange(PROBE_TOKENS, device=device).view(1, -1)
    vocabulary = model.config.get_text_config().vocab_size
    batch = {"input_ids": tokens % vocabulary, "position_ids": tokens}
    with evaluating(model):
        whole = model(**model_inputs(batch)).logits
        if bool(whole.isnan().any()):
            raise TrainingError(
                f"{type(model).__name__} computes NaN or infinity for the tokens 0 to {PROBE_TOKENS - 1}"
            )
        hidden = hidden_states(model, batch)
        best = float("inf")
        for head in _candidates(model):
            parts = head(hidden)
            if torch.allclose(whole, parts, rtol=1e-4, atol=1e-4 * float(whole.abs().max())):
                return head
            best = min(best, float((whole - parts).abs().max()))
    raise UnsupportedError(
        f"{type(model).__name__} changes its logits after the head in a way that is not known here "
        f"(largest difference {best:.3g}); report the architecture"
    )


def _candidates(model: Any) -> list[Head]:
    """Heads that the config allows; a key may mean different things to different architectures, or nothing."""
    config = model.config.get_text_config()
    scales = [(key, float(getattr(config, key, None) or 1.0)) for key in SCALES]
    ways: list[list[list[tuple[str, float]]]] = [
        [[(how, by)] for how in SCALES[key]] for key, by in scales if by != 1.0
    ]
    ways += [[[("softcap", float(cap))]] for key in CAPS if (cap := getattr(config, key, None))]
    combinations = product(*([*way, []] for way in ways))
    return [Head(model.get_output_embeddings(), tuple(chain.from_iterable(steps))) for steps in combinations]
