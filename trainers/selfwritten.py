"""Text written by the teacher itself, for distillation without any data set.

The recipe is LLM-QAT's (Liu et al., 2023, section 3.1): a random first token, the next few tokens greedy,
so that the start settles on something the model finds likely, and the rest sampled from the teacher's own
distribution.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qat.trainers.packing import evaluating
from qat.trainers.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat.trainers.data import Generate


def write(
    teacher: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    settings: "Generate",
    *,
    seq_len: int,
    seed: int,
    advance: Callable[[int], None],
) -> Iterator[Tokens]:
    """Endless documents of at most seq_len tokens; one ends earlier where the teacher writes an end-of-text
    token.

    The stream depends only on the weights, the settings, `seed` and the device. End-of-text is not allowed
    among the greedy tokens, so that no document is nearly empty.

    Args:
        teacher: a Hugging Face causal LM; it is put in evaluation mode while it writes.
        tokenizer: says which ids are text, which end it, and whether a BOS token comes first.
        settings: temperature, number of greedy tokens, documents per batch.
        seq_len: length at which a document is cut.
        seed: of the random numbers.
        advance: called with the number of tokens of each step that belong to documents.
    """
    generator = torch.Generator(next(teacher.parameters()).device).manual_seed(seed)
    ends = _end_ids(teacher, tokenizer)
    while True:
        start = _start(teacher, tokenizer, settings.batch, generator)
        ids = _complete(teacher, start, settings, seq_len, ends, generator, advance)
        for row in ids.cpu().numpy().astype(np.int32):
            stops = np.flatnonzero(np.isin(row[start.shape[1] :], ends)) + start.shape[1]
            document = row[: stops[0] + 1] if len(stops) else row
            learn = np.arange(len(document)) >= start.shape[1]  # nobody can predict a random token
            yield Tokens(document, learn)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _end_ids(teacher: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every id that ends a text: the tokenizer's, and the one or several of the generation config."""
    configured = getattr(getattr(teacher, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *several] if i is not None})


def _start(
    teacher: nn.Module, tokenizer: "PreTrainedTokenizerBase", count: int, generator: torch.Generator
) -> torch.Tensor:
    """BOS if the tokenizer puts one before texts, and a random token that is not special: (count, 1 or 2)."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(_vocabulary(teacher, len(tokenizer))) if i not in special]
    texts = torch.tensor(ids, device=generator.device)
    pick = torch.randint(len(texts), (count, 1), generator=generator, device=generator.device)
    begin = tokenizer("a", verbose=False)["input_ids"][:1]
    if begin != [tokenizer.bos_token_id]:
        return texts[pick]
    return torch.cat([torch.full_like(pick, begin[0]), texts[pick]], 1)


def _vocabulary(teacher: nn.Module, known: int) -> int:
    """Ids that both the model and its tokenizer know; models often pad their vocabulary."""
    config: Any = teacher.config
    return min(known, int(config.get_text_config().vocab_size))


@torch.no_grad()
def _complete(
    teacher: nn.Module,
    ids: torch.Tensor,
    settings: "Generate",
    seq_len: int,
    ends: list[int],
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Continue all rows until each has ended or reached seq_len; what follows a row's end means nothing."""
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    forbidden = torch.tensor(ends, dtype=torch.long, device=ids.device)
    step, cache, greedy = ids, None, settings.greedy_tokens
    with evaluating(teacher):
        while ids.shape[1] < seq_len and alive.any():
            output = teacher(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            if greedy > 0:
                step = logits.index_fill(1, forbidden, -torch.inf).argmax(1, keepdim=True)
                greedy -= 1
            else:
                chances = (logits / settings.temperature).softmax(1)
                step = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, step], 1)
            advance(int(alive.sum()))
            alive &= ~torch.isin(step[:, 0], forbidden)
    return ids
