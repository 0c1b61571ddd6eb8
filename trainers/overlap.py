"""How much of the held-out text a training set already contains.

A recovery measured on text the student was trained on proves nothing, so a run compares the two by token
n-grams and warns.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qat.trainers.data import Blocks


def overlap(train: Blocks, heldout: Blocks, n: int = 13) -> float:
    """Share of the held-out token n-grams that occur in the training rows; both must come from one
    tokenizer.

    N-grams lie within one document and one row. 0.0 when the held-out rows hold none. N-grams are compared
    by a 64-bit hash.
    """
    grams_heldout = np.concatenate([np.empty(0, np.uint64), *_ngrams(heldout, n)])
    distinct, counts = np.unique(grams_heldout, return_counts=True)
    trained = np.zeros(len(distinct), np.bool_)
    for grams in _ngrams(train, n):
        trained |= np.isin(distinct, grams)
    return float(counts[trained].sum() / max(1, len(grams_heldout)))


def _ngrams(blocks: Blocks, n: int, rows_at_once: int = 1024) -> Iterator[npt.NDArray[np.uint64]]:
    """Hashes of all n-grams, a chunk of rows at a time."""
    stored, width = blocks.array(), blocks.seq_len - n + 1
    if width < 1:
        return
    for begin in range(0, blocks.num_rows, rows_at_once):
        rows = np.asarray(stored[begin : begin + rows_at_once])
        scattered = _scatter(rows[:, 0].astype(np.uint64))
        grams = np.zeros((len(rows), width), np.uint64)
        for offset in range(n):
            grams = grams * np.uint64(0x9E3779B97F4A7C15) + scattered[:, offset : offset + width]
        document = rows[:, 2]
        whole = (document[:, :width] == document[:, n - 1 :]) & (document[:, :width] >= 0)
        yield grams[whole]


def _scatter(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: nearby ids become unrelated 64-bit numbers; arithmetic wraps around."""
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ids ^ (ids >> np.uint64(31))
