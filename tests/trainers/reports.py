"""A report and a metrics file as a run writes them, for the tests of the page and of its pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from qat.trainers.evaluate import Scores, gap_closed
from qat.trainers.report import RunReport

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def build(ptq: float = 0.4, best: float = 0.3, student: float = 0.1, best_step: int = 40, **changes: Any) -> RunReport:
    """A report whose KL values are given; its next-token loss is 3 + KL."""
    rows = [
        Scores(3.0 + kl, kl, 1 - kl, 8176).row(name)
        for name, kl in (("bf16", 0.0), ("ptq", ptq), ("best_ptq", best), ("student", student))
    ]
    settings: dict[str, Any] = {
        "name": "a-run",
        "method": "qad",
        "rows": rows,
        "gap_closed": {key: gap_closed(rows[0][key], rows[1][key], rows[3][key]) for key in ("kl", "nll")},
        "gap_closed_over_best_ptq": {
            key: gap_closed(rows[0][key], rows[2][key], rows[3][key]) for key in ("kl", "nll")
        },
        "bits_per_weight": 6.92,
        "model_bytes": 116_400_000,
        "dense_bytes": 269_000_000,
        "tokens": 81_920,
        "seconds": 960.0,
        "tokens_per_second": 85.3,
        "peak_memory_bytes": 4_100_000_000,
        "seed": 7,
        "steps": 80,
        "best_step": best_step,
        "eval_hash": "e" * 64,
        "data_hash": "d" * 64,
        "overlap": 0.0,
        "scheme": [("nvfp4", "nvfp4", 210, 106_168_320, 4.5), ("not quantized: kept", "-", 1, 28_311_552, 16.0)],
        "machine": "a CPU, 2 threads",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "precision": "fp32",
        "finished_at": "2026-01-01T00:00:00+00:00",
    }
    return RunReport(**{**settings, **changes})


def layers(count: int) -> list[tuple[str, float, float]]:
    noise = np.random.default_rng(0).normal(size=(count, len(KINDS), 2))
    return [
        (f"model.layers.{i}.{kind}", 20 + noise[i, j, 0], 19.5 + noise[i, j, 1])
        for i in range(count)
        for j, kind in enumerate(KINDS)
    ]


def write_metrics(run: Path, steps: int, every: int = 20, kl: float = 0.1) -> None:
    lines = ["step,tokens,seconds,loss,lr,scale_lr,grad_norm,tokens_per_second,heldout_kl,heldout_nll,heldout_top1"]
    for step in range(1, steps + 1):
        evaluated = f"{kl + 0.2 * math.exp(-step / 20)},3.1,0.8" if step % every == 0 or step == steps else ",,"
        lines.append(f"{step},{step * 1024},{step * 12.0},{0.2 + 0.1 / step},1e-4,1e-3,1.0,85.0,{evaluated}")
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
