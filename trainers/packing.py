"""Token rows and what a model needs to keep the documents in a row apart.

A row is int32 of shape (3, seq_len): input ids, targets, and the number of the document each token belongs
to, counted from 0 in every row, -1 on padding. Logits at position t predict the target at position t.

Documents are separated by `position_ids` that restart at 0, with no attention mask and no cache:
transformers (5.17 and later) then builds a block-diagonal mask per layer kind, sliding windows included,
for batches of any size, and builds none at all when every row holds one document, which is the fast causal
path. The alternatives leak without a word: a 2-D mask or `use_cache=True` switches the detection off, and a
4-D mask replaces the sliding windows. Some architectures ignore position ids in their masks (gpt-oss in
5.23), so `leakage` measures a model.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from qat.trainers.tokens import Tokens
from qat.training.rows import IGNORE

if TYPE_CHECKING:
    from torch import nn

CHANNELS = 3
Row = npt.NDArray[np.int32]
Batch = dict[str, torch.Tensor]

PROBE_TOKENS = 16
FINDS_DOCUMENTS = "find_packed_sequence_indices"  # of transformers
LEAKS = 0.1  # of `leakage`, above which documents are not packed


def targets(document: Tokens) -> Row:
    """What each position predicts: the next token, or IGNORE at the end and where nothing is learnt."""
    labels = np.full(len(document.ids), IGNORE, np.int32)
    labels[:-1] = np.where(document.learn[1:], document.ids[1:], IGNORE)
    return labels


def pack(documents: Iterator[Tokens], seq_len: int) -> Iterator[Row]:
    """Documents end to end, cut into full rows; what does not fill the last row is dropped.

    A document that goes on in the next row goes on there as a new one, without its context, but the
    position before
    the cut still predicts the token after it: every token but a document's first is predicted exactly once.
    """
    row, filled, number = np.empty((CHANNELS, seq_len), np.int32), 0, 0
    for document in documents:
        source = np.stack([document.ids, targets(document)])
        begin, length = 0, len(document.ids)
        while begin < length:
            count = min(seq_len - filled, length - begin)
            row[:2, filled : filled + count] = source[:, begin : begin + count]
            row[2, filled : filled + count] = number
            begin, filled, number = begin + count, filled + count, number + 1
            if filled == seq_len:
                yield row
                row, filled, number = np.empty((CHANNELS, seq_len), np.int32), 0, 0


def pad(documents: Iterator[Tokens], seq_len: int, pad_id: int) -> Iterator[Row]:
    """One document per row, cut at seq_len, padded on the right."""
    for document in documents:
        row = np.empty((CHANNELS, seq_len), np.int32)
        row[0], row[1], row[2] = pad_id, IGNORE, -1
        count = min(seq_len, len(document.ids))
        row[0, :count], row[1, :count], row[2, :count] = document.ids[:count], targets(document)[:count], 0
        yield row


def position_ids(document_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions that restart at 0 with every document; padding counts on, so a padded row stays one
    document.

    Args:
        document_ids: int64 of shape (rows, seq_len), -1 on padding.
    """
    index = np.arange(document_ids.shape[1])
    first = np.zeros(document_ids.shape, np.bool_)
    first[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    return index - np.maximum.accumulate(np.where(first, index, 0), axis=1)


def collate(rows: npt.NDArray[np.int32]) -> Batch:
    """Rows of shape (n, 3, seq_len) as int64 tensors of shape (n, seq_len), as `Blocks.rows` describes
    them."""
    wide = np.ascontiguousarray(rows.transpose(1, 0, 2), np.int64)
    arrays = {"input_ids": wide[0], "targets": wide[1], "document_ids": wide[2]}
    arrays["position_ids"] = position_ids(wide[2])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def known(batch: Batch) -> Batch:
    """What the host knows of a batch before it goes to a GPU, which would have to be waited for to find out again.

    Returns:
        kept: places in the flattened targets of those that carry a loss.
        packed: one empty number if a row holds several documents, else none: only its size is looked at.
    """
    positions = batch["position_ids"]
    packed = bool((positions.diff(dim=-1) != 1).any())
    kept = (batch["targets"].flatten() != IGNORE).nonzero().squeeze(1)
    return {"kept": kept, "packed": positions.new_empty(int(packed))}


@contextlib.contextmanager
def told(batch: Batch) -> Iterator[None]:
    """Inside this context transformers does not ask the position ids, so the GPU, whether rows hold several documents:
    it is told what `known` found."""
    from transformers import masking_utils

    packed: torch.Tensor | None = batch.get("packed")
    if packed is None or not hasattr(masking_utils, FINDS_DOCUMENTS):
        yield
        return

    def found(position_ids: torch.Tensor) -> torch.Tensor | None:
        """As transformers computes it."""
        steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
        return (steps != 1).cumsum(-1) if packed.numel() else None

    own = getattr(masking_utils, FINDS_DOCUMENTS)
    try:
        setattr(masking_utils, FINDS_DOCUMENTS, found)
        yield
    finally:
        setattr(masking_utils, FINDS_DOCUMENTS, own)


def arrange(batch: Batch, model: "nn.Module") -> Batch:
    """The batch in the shape in which this model's attention keeps documents apart.

    Flash attention finds documents by position ids only in a batch of one row, so there all rows become
    one, shape (1, rows * seq_len), which costs it nothing; every other attention takes the batch as it is.
    """
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")
    if "flash" not in attention:
        return batch
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments a Hugging Face causal LM must be called with, `model(**model_inputs(batch))`."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


@contextlib.contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Evaluation mode, and afterwards the mode every single module was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def leakage(model: "nn.Module") -> float:
    """How much a packed document sees of the one before it: 0 for none, about 1 for everything.

    Two rows hold two documents each. The first document's tokens are changed, and the change in the second
    one's logits is divided by the change when both are one document. The measure needs no tolerance for the
    model's precision. Above LEAKS the model must be trained with `pack: false`.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    half = PROBE_TOKENS // 2
    vocabulary = config.get_text_config().vocab_size
    before = torch.randint(vocabulary, (2, PROBE_TOKENS), generator=generator)
    after = torch.where(torch.arange(PROBE_TOKENS) < half, (before + vocabulary // 2) % vocabulary, before)
    joint = torch.arange(PROBE_TOKENS).expand(2, -1)

    def change(positions: torch.Tensor) -> float:
        logits = []
        for ids in (before, after):
            batch = arrange({"input_ids": ids.to(device), "position_ids": positions.to(device)}, model)
            logits.append(model(**model_inputs(batch)).logits.float().reshape(2, PROBE_TOKENS, -1)[:, half:])
        return (logits[0] - logits[1]).abs().max().item()

    with evaluating(model):
        apart, together = change(joint % half), change(joint)
    return apart / together if together else float(apart > 0)
