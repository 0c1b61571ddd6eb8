"""Which tokens belong to a prompt and which to an answer, for inputs that are quantized otherwise in one than in the
other (`Format.prompt`): a server with nodes of their own for prompts computes the answers elsewhere.

Who knows says so: training and evaluation by a mask of the batch, a comparison for all tokens alike. Where nobody says
it, it is as in generation with a cache: one token a row is a part of an answer, several are a prompt.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from qat.errors import TrainingError
from qat.numbers.format import Format

Phase = Literal["prompt", "answer"]
Tokens = Callable[[], Tensor] | Phase
_ANSWERS: ContextVar[Tokens | None] = ContextVar("answers", default=None)


@contextlib.contextmanager
def answering(tokens: Tokens) -> Iterator[None]:
    """Inside this context those tokens are answers: all ("answer") or none of them ("prompt"), or what a function
    gives, bool (rows, sequence), which is asked once, if at all. The outermost that says it of all tokens is right."""
    before = _ANSWERS.get()
    token = _ANSWERS.set(before if isinstance(before, str) else tokens if isinstance(tokens, str) else cache(tokens))
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def mixes(model: nn.Module) -> bool:
    """Whether a part of the model asks: a quantizer of such a format, or what says so of itself."""
    every = list(model.modules())
    formats = [fmt for module in every if isinstance(fmt := getattr(module, "format", None), Format)]
    return any(fmt.prompt for fmt in formats) or any(getattr(module, "mixes", False) is True for module in every)


def either(x: Tensor, answers: Tensor, prompts: Callable[[], Tensor]) -> Tensor:
    """For each token of x (..., columns) what it is as a part of an answer, or what `prompts` makes of x.

    Raises:
        TrainingError: x has other tokens than the batch (those of one expert, say).
    """
    said = _ANSWERS.get()
    if said is None:
        said = "answer" if x.dim() > 1 and x.shape[-2] == 1 else "prompt"
    if isinstance(said, str):
        return answers if said == "answer" else prompts()
    tokens = said()
    if tokens.numel() * x.shape[-1] != x.numel():
        raise TrainingError(
            f"inputs of shape {[*x.shape]} do not have the {tokens.numel()} tokens of the batch, so it is not known "
            "which belong to a prompt; use int8_token or int8_tensor_asym inputs for this layer"
        )
    return torch.where(tokens.view(*x.shape[:-1], 1), answers, prompts())


def split_documents(positions: Tensor, learnt: Tensor) -> Tensor:
    """Which tokens of a batch are answers, bool (rows, sequence): those that are learnt; of documents that are learnt
    from the second token on, which have no prompt, the second half.

    Args:
        positions: int64 (rows, sequence), restarting at 0 with each document.
        learnt: bool, the same shape, where the token after is learnt.
    """
    begins = positions == 0
    number = begins.long().cumsum(dim=-1)
    sizes = number.new_zeros(number.shape[0], number.shape[1] + 1)
    sizes.scatter_reduce_(1, number, positions + 1, "amax")
    own = torch.zeros_like(learnt)
    own[:, 1:] = learnt[:, :-1]
    own &= ~begins
    whole = torch.zeros_like(sizes, dtype=torch.bool)
    whole.scatter_(1, number.masked_fill(positions != 1, 0), own & (positions == 1))
    later = positions * 2 >= sizes.gather(1, number)
    return own & (later | ~whole.gather(1, number))
