"""Prompts whose attention is computed in INT8, where somebody asks: `int8_attention(model)`, or
`attn_implementation="qat_int8"` in your own code after `install()`.

Queries and keys are quantized by blocks (SageAttention's way, see `qat.serving.prompt_attention`), in a prompt alone:
steps of decoding, and prompts that the operator does not know (padding, sliding windows, soft caps), are computed as
without this file, and a warning says why.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qat.engines import attention
from qat.errors import UnsupportedError
from qat.kernels.load import load, registered
from qat.kernels.prompt_attention.choose import problem
from qat.serving.prompt_attention import by_blocks

NAME = "qat_int8"


def asked(choice: str | None) -> Callable[[Any], None] | None:
    """What `--prompt-attention` does to a model that is loaded."""
    return int8_attention if choice == "int8" else None


def install() -> None:
    """Put the function into transformers' registry, under `NAME`."""
    load(("prompt_attention",))
    attention.install()
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def int8_attention(model: Any) -> None:
    """Compute the attention of this model's prompts in INT8 from now on.

    Raises:
        UnsupportedError: attention of this model does not go through transformers' registry.
    """
    install()
    before = model.config._attn_implementation
    if before != attention.REPLACED:
        raise UnsupportedError(
            f"INT8 prompts take the place of attn_implementation {attention.REPLACED!r}, but the model has {before!r}; "
            "load it with the former"
        )
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedError(f"{type(model).__name__} lets nobody choose its attention, so INT8 cannot be chosen")
    if not registered("prompt_attention", model.device.type):
        warnings.warn(
            f"no kernel computes INT8 attention on {model.device.type}: the reference does, in float32, slower than "
            "attention in 16 bits and with all scores of a prompt in memory",
            stacklevel=2,
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' "sdpa" for queries and keys (batch, heads, tokens, width), in INT8 where this is a prompt."""
    if query.shape[2] > attention.FEW:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        why = attention.unusual(query, key, attention_mask, causal, dropout, kwargs) or _problem(query, key, value)
        if attention_mask is not None:
            why = why or "a mask (padding, a sliding window, several texts in a row, or a prompt behind cached tokens)"
        if why is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            found = by_blocks(query, key, value).attend(scale, causal=causal, dtype=query.dtype)
            return found.transpose(1, 2).contiguous(), None
        warnings.warn(f"this prompt's attention is not computed in INT8: {why}", stacklevel=2)
    before = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return attention.attend(module, query, key, value, attention_mask, **before)


def _problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    return problem(query.shape[-1], value.shape[-1], query.shape[1], key.shape[1])
