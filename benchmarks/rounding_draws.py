"""How near an export is to its student, beside the noise of rounding itself: KL to the teacher of a run and of its
export on the shipped held-out prose, as they are and with embeddings moved by 1e-4 of their size, once for each draw.
Rounding multiplies noise (a value near the middle of two codes falls to the other side), so one number of each says
little: the means are compared, and the spread says how far.

    python benchmarks/rounding_draws.py RUN EXPORT [--draws 3] [--tokens 8192]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.checkpoints.hf import load_configured, load_tokenizer
from qat.checkpoints.origin import locate
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.evaluate import Evaluator
from qat.trainers.inspect import load

SIZE = 1e-4  # of a move, of an embedding's own size
ROW = 512


class Moved:
    """A forward hook of the embedding: the draw in force, 0 for none."""

    draw = 0

    def __call__(self, _module: nn.Module, _given: Any, y: Tensor) -> Tensor | None:
        """The same for the same position of any row, so that reading twice gives the same."""
        if not self.draw:
            return None
        noise = torch.randn(ROW, y.shape[-1], generator=torch.Generator().manual_seed(self.draw))
        return y * (1 + SIZE * noise[: y.shape[-2]])


def main() -> None:
    """Print one line for each draw, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    evaluator, found = None, {}
    for what, folder in (("student", arguments.run), ("export", arguments.export)):
        loaded = load(folder)
        if evaluator is None:
            assert loaded.made_from is not None
            teacher = load_configured(loaded.made_from, locate(loaded.made_from, hint="it moved")).eval()
            data = DataConfig(source="heldout", seq_len=ROW)
            blocks = load_blocks(data, load_tokenizer(loaded.tokenizer_folder), num_tokens=arguments.tokens)
            evaluator = Evaluator(teacher, blocks)
        moved = Moved()
        loaded.model.get_input_embeddings().register_forward_hook(moved)
        for draw in range(arguments.draws):
            moved.draw = draw
            scores = evaluator.score(loaded.model, f"{what}, draw {draw}")
            found.setdefault(what, []).append(scores.kl)
            print(f"{what}, draw {draw}: KL {scores.kl:.6f} ({scores.tokens} tokens)", flush=True)
    for what, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{what}: mean {statistics.mean(values):.6f}, standard deviation {spread:.6f}")
    print(f"export over student: {statistics.mean(found['export']) / statistics.mean(found['student']) - 1:+.2%}")


if __name__ == "__main__":
    main()
