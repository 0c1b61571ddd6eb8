"""How an estimate is shown: the model, memory and time per device, and which common GPUs would hold it."""

from rich.console import Console
from rich.table import Table

from qat.text import duration, size
from qat.trainers.estimate import Estimate, Plan
from qat.trainers.footprint import GIB

COMMON_GPUS = (16, 24, 48, 80, 141, 180)  # GiB of cards in use


def print_estimate(estimate: Estimate, console: Console | None = None) -> None:
    """The model, a table of memory and time with one column per device, and what would fit where."""
    console = console or Console()
    for line in _summary(estimate):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    per = "per device" if estimate.devices > 1 else "in all"
    table = Table(title=f"memory {per}, GiB; {estimate.devices} device(s)", title_justify="left")
    table.add_column("")
    for plan in estimate.plans:
        table.add_column(f"{plan.device}\n{plan.precision}", justify="right")
    for name in estimate.plans[0].memory:
        if any(plan.memory[name] for plan in estimate.plans):
            table.add_row(name, *(f"{plan.memory[name] / GIB:,.2f}" for plan in estimate.plans))
    table.add_row("peak", *(f"{plan.peak / GIB:,.2f}" for plan in estimate.plans), style="bold", end_section=True)
    table.add_row("tokens/s", *(f"{plan.tokens_per_second:,.0f}" for plan in estimate.plans))
    table.add_row("training", *(duration(plan.training_seconds) for plan in estimate.plans))
    table.add_row("evaluation and calibration", *(duration(plan.other_seconds) for plan in estimate.plans))
    console.print(table)
    console.print(_ways(estimate))
    for plan in estimate.plans:
        console.print(_fits(plan), highlight=False, markup=False, soft_wrap=True)
    for note in estimate.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _ways(estimate: Estimate) -> Table:
    table = Table(title=f"strategies on {estimate.plans[-1].device}", title_justify="left")
    for name in ("", "devices", "GiB per device", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for way in estimate.ways:
        table.add_row(way.strategy, str(way.devices), f"{way.peak / GIB:,.2f}", f"{way.tokens_per_second:,.0f}")
    return table


def _summary(estimate: Estimate) -> list[str]:
    share, bits = f"{estimate.quantized_share:.1%} of weights", f"{estimate.bits_per_weight:.2f} bits per weight"
    scheme = ", ".join(f"{count / 1e6:,.1f} M {weight}" for weight, _, _, count, _ in estimate.scheme)
    return [
        f"{estimate.name}: {estimate.parameters:,} parameters, {share} quantized, {bits}, "
        f"{size(estimate.model_bytes)} stored instead of {size(estimate.dense_bytes)}",
        f"weights: {scheme}",
        f"architecture: {estimate.origin}",
        f"work: {estimate.tokens:,} tokens in {estimate.steps:,} steps, "
        f"{scaled(estimate.flops_per_token)}FLOP per token",
    ]


def _fits(plan: Plan) -> str:
    """One yes or no for the device, and for GPUs one for each common size."""
    answers = []
    if plan.capacity is not None:
        answers.append(f"fits in {plan.capacity / GIB:,.0f} GiB: {'yes' if plan.fits(plan.capacity) else 'NO'}")
    if plan.kind == "cuda":
        others = [f"{gib} {'yes' if plan.fits(gib * GIB) else 'no'}" for gib in COMMON_GPUS]
        answers.append("GPUs of " + ", ".join(others))
    return f"{plan.device}: " + ("; ".join(answers) or "its memory is unknown")


def scaled(count: float) -> str:
    """A count of operations with the prefix of its unit, for example "1.21 G"."""
    prefixes = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    unit, prefix = next((row for row in prefixes if count >= 0.1 * row[0]), prefixes[-1])
    return f"{count / unit:,.2f} {prefix}"
