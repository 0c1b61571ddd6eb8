"""Rows of several texts as one: how many each gives by its share, and in which order they stand.

The order depends on nothing but the counts, and every beginning of it holds the shares as well as whole rows can, so a
run that reads only part of the rows reads the same mixture.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qat.trainers import rows
from qat.training.rows import IGNORE

if TYPE_CHECKING:
    from qat.trainers.data import Blocks, DataConfig

MIX = "mix"  # the source of a text that is several
_OWN = {"source", "mix", "seq_len", "pack", "max_tokens", "share"}  # keys that mean something beside `mix`
_SUMMED = ("documents", "skipped_documents", "dropped_tokens", "empty_rows", "leading_turns")


def problem(config: "DataConfig") -> str | None:
    """Why a configuration means nothing as a mix, or as none; None where it does."""
    if not config.mix and config.source != MIX:
        return None
    if not config.mix or config.source != MIX:
        return (
            f"a mix needs source: {MIX} and parts in mix: [{{share: 0.5, source: ...}}, ...], but source is "
            f"{config.source!r} and mix has {len(config.mix)} parts"
        )
    fields = type(config).model_fields
    idle = [name for name, field in fields.items() if name not in _OWN and getattr(config, name) != field.get_default()]
    if idle:
        return f"{', '.join(idle)} beside mix has no effect; give it in the parts that it is for"
    for part in config.mix:
        if part.mix:
            return "a part of a mix is a mix itself; list its texts with their shares"
        if (part.seq_len, part.pack) != (config.seq_len, config.pack):
            return (
                f"{part.source!r} has seq_len {part.seq_len} and pack {part.pack}, but its mix {config.seq_len} and "
                f"{config.pack}; give both beside mix only"
            )
    return None


def counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole rows for each share of `total`; what is left over goes where most is missing, and nobody goes without."""
    exact = [share / math.fsum(shares) * total for share in shares]
    given = [max(1, int(rows)) for rows in exact]
    while sum(given) < total:
        given[int(np.argmax(np.subtract(exact, given)))] += 1
    return given


def order(given: Sequence[int]) -> npt.NDArray[np.int64]:
    """Which text each row comes from: text i gives `given[i]` rows, evenly spread."""
    places = [(np.arange(count) + 0.5) / count for count in given]
    texts = np.repeat(np.arange(len(given)), given)
    return texts[np.argsort(np.concatenate(places), kind="stable")]


def write(folder: Path, parts: Sequence["Blocks"], wanted: Sequence[int | None]) -> dict[str, Any]:
    """Write the first rows of each text, interleaved, into `folder`; returns what `Blocks` says about them, without
    path and source.

    Args:
        parts: the texts.
        wanted: how many rows of each; None takes all.
    """
    given = [len(part) if count is None else min(count, len(part)) for part, count in zip(parts, wanted, strict=True)]
    for part, count, found in zip(parts, wanted, given, strict=True):
        if count is not None and found < count:
            warnings.warn(
                f"{part.source.split(' ')[0]} has {found:,} of the {count:,} rows that its share of the mix asks for: "
                "its share is smaller. Give more of it, or a smaller share",
                stacklevel=4,
            )
    arrays, taken = [part.array() for part in parts], [0] * len(parts)
    digest = hashlib.sha256()
    learnt = tokens = 0
    with (folder / rows.ROWS).open("wb") as file:
        for text in order(given).tolist():
            row = arrays[text][taken[text]]
            taken[text] += 1
            data = row.astype(rows.STORED).tobytes()
            file.write(data)
            digest.update(data)
            learnt += int((row[1] != IGNORE).sum())
            tokens += int((row[2] >= 0).sum())
    shapes: Counter[str] = Counter()
    for part in parts:
        shapes.update(part.shapes)
    return {
        "num_rows": sum(given),
        "seq_len": parts[0].seq_len,
        "tokens": tokens,
        "loss_tokens": learnt,
        "digest": digest.hexdigest(),
        "largest_id": max(part.largest_id for part in parts),
        "shapes": dict(shapes),
        **{name: sum(getattr(part, name) for part in parts) for name in _SUMMED},
    }
