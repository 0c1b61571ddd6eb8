"""Rows of a data set as they are written: which documents and rows count, where writing stops, what is refused.

A row without a target is left out and counted: a prompt that is longer than a row teaches nothing, and a step made
of such rows alone would have no loss.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.errors import DataError
from qat.trainers.packing import Row, pack, pad
from qat.trainers.tokens import Tokens
from qat.training.rows import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat.trainers.data import DataConfig

STORED = np.dtype("<i4")
ROWS = "rows.bin"


@dataclass(frozen=True)
class Plan:
    """Where to stop: at so many rows, or when so many tokens have been read; None for no limit."""

    rows: int | None
    tokens: int | None


def write(
    folder: Path,
    documents: Iterator[Tokens],
    config: "DataConfig",
    plan: Plan,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    """Write the rows into `folder` and return what `Blocks` says about them, without path and source."""
    tally, digest = Tally(), hashlib.sha256()
    count = tokens = learnt = 0
    with (folder / ROWS).open("wb") as file:
        for row in build(documents, config, plan, tokenizer, tally):
            data = row.astype(STORED).tobytes()
            file.write(data)
            digest.update(data)
            count += 1
            learnt += int((row[1] != IGNORE).sum())
            tokens += int((row[2] >= 0).sum())
    refuse_nothing(config, tally, count)
    # Where packing stopped by plan, the rest of the document it was in was not needed: that is not dropping.
    dropped = tally.read - tokens if tally.exhausted or not config.pack else tally.left_out
    return {
        "num_rows": count,
        "seq_len": config.seq_len,
        "tokens": tokens,
        "loss_tokens": learnt,
        "dropped_tokens": dropped,
        "documents": tally.documents,
        "skipped_documents": tally.skipped,
        "digest": digest.hexdigest(),
        "empty_rows": tally.empty_rows,
        "leading_turns": tally.leading,
        "largest_id": tally.largest,
        "shapes": dict(tally.shapes),
    }


def build(
    documents: Iterator[Tokens],
    config: "DataConfig",
    plan: Plan,
    tokenizer: "PreTrainedTokenizerBase",
    tally: "Tally",
) -> Iterator[Row]:
    """The rows that teach something, as far as the plan asks for them, counted in `tally`."""
    counted = _counted(documents, tally, plan.tokens)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    rows = pack(counted, config.seq_len) if config.pack else pad(counted, config.seq_len, pad_id)
    yield from islice(_teaching(rows, tally), plan.rows)


@dataclass
class Tally:
    """What became of the documents and rows so far.

    Attributes:
        read, documents: tokens and documents that were read, the `skipped` ones without anything to learn not counted.
        exhausted: whether the source ended.
        shapes: documents of each kind of record.
        empty_rows, left_out: rows without a target, and the tokens in them.
        leading: assistant turns that were left out because chats began with them.
        largest: token id.
    """

    read: int = 0
    documents: int = 0
    skipped: int = 0
    exhausted: bool = False
    shapes: Counter[str] = field(default_factory=Counter)
    empty_rows: int = 0
    left_out: int = 0
    leading: int = 0
    largest: int = -1


def _counted(documents: Iterator[Tokens], tally: Tally, limit: int | None) -> Iterator[Tokens]:
    """The documents with something to learn, up to `limit` tokens; the last one is cut there."""
    for document in documents:
        tally.leading += document.leading
        if not document.learn.any():
            tally.skipped += 1
            continue
        left = len(document.ids) if limit is None else limit - tally.read
        part = Tokens(document.ids[:left], document.learn[:left])
        tally.read += len(part.ids)
        tally.documents += 1
        tally.shapes[document.shape] += 1
        yield part
        if limit is not None and tally.read >= limit:
            return
    tally.exhausted = True


def _teaching(rows: Iterator[Row], tally: Tally) -> Iterator[Row]:
    """The rows with a target; a step made of others alone would have no loss."""
    for row in rows:
        if (row[1] != IGNORE).any():
            tally.largest = max(tally.largest, int(row[0].max()))
            yield row
        else:
            tally.empty_rows += 1
            tally.left_out += int((row[2] >= 0).sum())


def refuse_nothing(config: "DataConfig", tally: Tally, rows: int) -> None:
    """Refuse a source that gave no row, and say why it did not."""
    source = f"source {config.source!r}"
    if not tally.documents:
        skipped = f"only {tally.skipped} documents without an assistant turn to learn"
        what = skipped if tally.skipped else "no text"
        raise DataError(f"{source} holds {what}; give another source, text_field or messages_field")
    if not rows and tally.empty_rows:
        raise DataError(
            f"{source}: none of {tally.empty_rows} rows has a token to learn, since prompts are longer than a row; "
            f"raise seq_len (now {config.seq_len}) or give longer texts"
        )
    if not rows:
        raise DataError(
            f"{source} gives {tally.read} tokens, but one packed row needs seq_len = {config.seq_len}; "
            "give more text, lower seq_len, or set pack: false"
        )
