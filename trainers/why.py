"""Why a student is as good as it is: which codes training changed, how far scales moved, which half of the gap is left.

The codes and scales that training began from are kept in a file of the run, one byte per weight and four per scale, so
that a resumed run can compare with them too, and nothing stays in memory. What the numbers say about a recipe stands in
docs/train.md.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.checkpoints.folders import atomic_folder
from qat.checkpoints.progress import counted
from qat.modes import dense
from qat.sharded import opened
from qat.sites import Site, sites, weights
from qat.trainers.evaluate import Evaluator

START, CODES = "start", "codes.safetensors"
SCALES_COMPARED = 1 << 24  # of a model with more, every n-th
FEW = 1e-3  # share of flipped codes below which adapters are said to have changed nothing
RISING = 0.02  # of the best KL, by which the last one is higher where a text is said to behave differently

Measured = dict[str, Any]


# --- codes and scales -----------------------------------------------------------------------------


@torch.no_grad()
def keep_start(run: Path, model: nn.Module, write: bool = True) -> None:
    """Write the codes and scales of every quantized weight as training begins.

    Args:
        write: False only helps the process that writes with a divided model.
    """
    tensors: dict[str, Tensor] = {}
    found = list(weights(model).values())
    for site in counted(opened(model, found), "keeping the first codes", len(found), "layers"):
        if write:
            tensors[f"{site.path} codes"], tensors[f"{site.path} scale"] = _stored(site)
    if not write:
        return
    folder = run / "checkpoints" / START
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(folder, overwrite=True, expected_bytes=size) as partial:
        save_file(tensors, partial / CODES)


def _stored(site: Site) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and effective scales (float32), on the CPU."""
    quantized = site.quantize()
    return quantized.codes.cpu().contiguous(), quantized.scales.effective().float().cpu().contiguous()


@torch.no_grad()
def moved(run: Path, model: nn.Module) -> Measured | None:
    """How the codes and scales of `model` differ from the start of the run; None where no start was kept.

    Returns:
        `codes` compared, the share `flipped` of them and by site (`sites`), and `drift`: median and 95th percentile of
        |log2(scale at the end / at the start)|.
    """
    kept = run / "checkpoints" / START / CODES
    if not kept.is_file():
        return None
    found = list(weights(model).values())
    flipped, drifts, codes = {}, [], 0
    with safe_open(kept, "pt") as file:
        names = set(file.keys())
        sizes = [file.get_slice(name).get_shape() for name in names if name.endswith(" scale")]
        stride = -(-sum(map(math.prod, sizes)) // SCALES_COMPARED) or 1
        for site in counted(opened(model, found), "comparing codes with the first", len(found), "layers"):
            path = site.path
            if f"{path} codes" not in names:
                continue
            now, scale = _stored(site)
            before = file.get_tensor(f"{path} codes")
            flipped[path] = int((now != before).sum()), now.numel()
            codes += now.numel()
            drifts.append(_octaves(file.get_tensor(f"{path} scale"), scale)[::stride])
    together = np.concatenate(drifts or [np.zeros(1, np.float32)])
    return {
        "codes": codes,
        "flipped": sum(count for count, _ in flipped.values()) / max(1, codes),
        "sites": {path: count / max(1, of) for path, (count, of) in flipped.items()},
        "drift": {"median": float(np.quantile(together, 0.5)), "p95": float(np.quantile(together, 0.95))},
    }


def _octaves(before: Tensor, after: Tensor) -> npt.NDArray[np.float32]:
    """|log2(after / before)| where both are positive numbers."""
    change = (after / before).log2().abs().flatten()
    array: npt.NDArray[np.float32] = change[torch.isfinite(change)].numpy()
    return array


# --- which half of the gap ------------------------------------------------------------------------


def gap(evaluator: Evaluator, model: nn.Module, both: float) -> dict[str, float]:
    """KL with weights and inputs quantized (`both`, known already), with only one of the two, and with neither.

    Cached keys and values count as inputs. What cannot differ, because a model has only quantized weights, is not
    measured again.
    """
    if not sites(model, "input", "key", "value"):
        with dense(model):
            neither = evaluator.score(model, "reading without quantized weights").kl
        return {"both": both, "weights": both, "inputs": neither, "neither": neither}
    with dense(model, inputs=True, weights=False):
        only_weights = evaluator.score(model, "reading with only weights quantized").kl
    with dense(model):
        only_inputs = evaluator.score(model, "reading with only inputs quantized").kl
    with dense(model, inputs=True):
        neither = evaluator.score(model, "reading with nothing quantized").kl
    return {"both": both, "weights": only_weights, "inputs": only_inputs, "neither": neither}


# --- whether the texts agree ----------------------------------------------------------------------


def disagreement(history: dict[str, npt.NDArray[np.float64]], start_kl: float) -> Measured | None:
    """Whether training loss fell while the choosing text's KL rose, from the best step to the end; None where not.

    Args:
        history: columns of metrics.csv, NaN where nothing was measured.
        start_kl: of the initialisation, before step 1.

    Returns:
        `best_step` and `last_step`, and of both the KL and the mean training loss around them. Losses differ by more
        than their noise (the standard error of the difference).
    """
    if not history:
        return None
    step, loss, kl = history["step"], history["loss"], history["heldout_kl"]
    seen = np.isfinite(kl)
    steps, values = np.append(0.0, step[seen]), np.append(start_kl, kl[seen])
    if len(steps) < 2 or not np.isfinite(values).all():
        return None
    best = int(values.argmin())
    window = max(4, len(step) // 10)
    middle = int(np.searchsorted(step, steps[best]))
    around = loss[max(0, min(middle - window // 2, len(step) - window)) :][:window]
    late = loss[-window:]
    noise = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (around, late)))
    rising = values[-1] > (1 + RISING) * values[best]
    if not (rising and around.mean() - late.mean() > noise):
        return None
    return {
        "best_step": int(steps[best]),
        "last_step": int(steps[-1]),
        "kl": [float(values[best]), float(values[-1])],
        "loss": [float(around.mean()), float(late.mean())],
    }


# --- in words -------------------------------------------------------------------------------------


def warnings_of(measured: Measured) -> list[str]:
    """What a reader must know before quoting the run."""
    return [*_unmoved(measured), *_disagreeing(measured)]


def _unmoved(measured: Measured) -> list[str]:
    moved = measured.get("moved")
    if not (measured.get("lora") and moved and moved["flipped"] < FEW):
        return []
    return [
        f"Only {moved['flipped']:.3%} of the codes differ from the initialisation's: the adapters were too small to "
        "move weights past the edges of their cells. Raise optim.lora_lr or lora.alpha, or train longer."
    ]


def _disagreeing(measured: Measured) -> list[str]:
    seen = measured.get("disagreement")
    if not seen:
        return []
    loss, kl = (" → ".join(f"{value:.4f}" for value in seen[key]) for key in ("loss", "kl"))
    return [
        f"From step {seen['best_step']:,} to {seen['last_step']:,} the training loss fell ({loss}) while the KL on the "
        f"text that decides rose ({kl}): the training text is unlike it. More steps on this text will not help; "
        "another text may (docs/train.md)."
    ]


def lines(measured: Measured) -> list[str]:
    """The section of report.md."""
    if not measured:
        return []
    text = ["## What training did, and what is left", ""]
    if moved := measured["moved"]:
        sites, drift = moved["sites"], moved["drift"]
        least, most = (choose(sites, key=sites.__getitem__) for choose in (min, max))
        text.append(
            f"- {moved['flipped']:.2%} of {moved['codes']:,} codes differ from those training began with: "
            f"{sites[least]:.2%} in `{least}`, {sites[most]:.2%} in `{most}`."
        )
        factors = [2 ** drift[name] for name in ("median", "p95")]
        text.append(f"- Scales moved by a factor of {factors[0]:.4f} (median) and {factors[1]:.4f} (95th percentile).")
    else:
        text.append("- How codes and scales moved is not known: the run began without a record of the first ones.")
    if _measured(gap := measured["gap"]):
        text.append(_gap_line(gap))
    return text


def _measured(gap: Measured) -> bool:
    return all(isinstance(value, float) and math.isfinite(value) for value in gap.values())


def _gap_line(gap: dict[str, float]) -> str:
    both, only_weights, only_inputs, neither = (gap[name] for name in ("both", "weights", "inputs", "neither"))
    return (
        f"- KL of the student as served {both:.4f}; with only its weights quantized {only_weights:.4f}, with only its "
        f"inputs {only_inputs:.4f}, with neither {neither:.4f}. So the inputs' rounding costs "
        f"{both - only_weights:+.4f}, the weights' {both - only_inputs:+.4f}, and the trained values before rounding "
        f"are {neither:.4f} away from the teacher."
    )
