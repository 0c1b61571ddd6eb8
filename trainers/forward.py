"""Splitting a causal language model into body and head, so that losses see hidden states instead of all logits.

Some architectures do more after the last matrix than `lm_head` shows (soft-capping, logit scaling); `Head` repeats
that, and `split` proves on a few tokens that body plus head equals the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.trainers.packing import Batch, arrange, model_inputs


class Head(nn.Module):
    """Hidden states (tokens, hidden) -> logits (tokens, vocabulary), as the model itself computes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        self.linear: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # a transformers method
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        self.divisor = float(getattr(config, "logits_scaling", None) or 1.0)

    def as_linear(self) -> nn.Module | None:
        """The layer, where the logits are its output and nothing more; see `qat.losses.as_linear`."""
        return self.linear if self.softcap is None and self.multiplier == self.divisor == 1.0 else None

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.linear(hidden)
        if self.multiplier != 1.0 or self.divisor != 1.0:
            logits = logits * (self.multiplier / self.divisor)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states (rows, sequence, hidden) of a batch from `Blocks.rows`; documents do not see each other."""
    output = model.base_model(**model_inputs(arrange(batch, model)))
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(*batch["input_ids"].shape, -1)


@torch.no_grad()
def split(model: Any) -> Head:
    """The head of `model`, checked.

    Raises:
        UnsupportedError: body plus head is not the model (an architecture that post-processes logits in its own way).
    """
    head = Head(model)
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device).view(1, -1) % model.config.vocab_size
    batch = {"input_ids": tokens, "position_ids": torch.arange(8, device=device).view(1, -1)}
    training = model.training
    model.eval()
    whole = model(**model_inputs(batch)).logits
    parts = head(hidden_states(model, batch))
    model.train(training)
    if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-4 * float(whole.abs().max())):
        raise UnsupportedError(
            f"{type(model).__name__} changes its logits after the head in a way that is not known here "
            f"(largest difference {float((whole - parts).abs().max()):.3g}); report the architecture"
        )
    return head
