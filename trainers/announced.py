"""What a run says of its text and its formats before anything is trained."""

from rich.console import Console

from qat.surgery import Coverage
from qat.trainers.data import Blocks
from qat.trainers.overlap import overlap
from qat.trainers.report import CONTAMINATED


def print_texts(train_rows: Blocks, heldout: Blocks, choosing: Blocks, console: Console) -> None:
    """What was read of each, and whether the held-out text is in the training text."""
    texts = {"training": train_rows, "held-out": heldout} | ({"choosing": choosing} if choosing is not heldout else {})
    for name, blocks in texts.items():
        console.print(f"{name} text: {blocks.summary}", highlight=False, soft_wrap=True)
    shared = overlap(train_rows, heldout)
    if shared > CONTAMINATED:
        console.print(f"[yellow]warning: {shared:.1%} of the held-out 13-grams also occur in the training text")


def print_coverage(coverage: Coverage, console: Console) -> None:
    """Which weights and caches get which format."""
    console.print(
        f"{coverage.quantized_share:.1%} of the weights are quantized, {coverage.bits_per_weight:.2f} bits per weight:",
        highlight=False,
        soft_wrap=True,
    )
    rows = coverage.by_format()
    widest, widest_input = max(len(row[0].partition(": ")[0]) for row in rows), max(len(row[1]) for row in rows)
    for treatment, input, modules, parameters, bits in rows:
        weight, _, reason = treatment.partition(": ")
        console.print(
            f"  {weight:<{widest}}  inputs {input:<{widest_input}} {modules:>5} modules"
            f" {parameters / 1e6:>9.2f} M weights {bits:>6.2f} bits  {reason}".rstrip(),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    for key, value, modules, size, dense_size in coverage.by_cache():
        console.print(
            f"  cached keys {key}, values {value}: {modules} modules, {size:,.0f} bytes per token "
            f"(BF16: {dense_size:,.0f})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
