"""A tiny job that trains in a second, and what its run left on disk."""

import csv
from pathlib import Path
from typing import Any

import yaml

from qat.trainers.job import Job


def write(folder: Path, model: Path, **changes: Any) -> Path:
    job: dict[str, Any] = {
        "name": "tiny",
        "model": {"id": str(model)},
        "scheme": {
            "rules": [
                {"match": "lm_head", "skip": "kept in BF16"},
                {"match": "model.embed_tokens", "skip": "kept in BF16"},
                {"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"},
            ]
        },
        "data": {"source": "embedded", "seq_len": 32, "max_tokens": 8192},
        "eval": {"data": {"source": "heldout", "seq_len": 32, "max_tokens": 2048}, "tokens": 256, "every": 2},
        "optim": {"lr": 1e-3, "ema": 0.9},
        "steps": 6,
        "rows": 4,
        "micro_rows": 2,
        "checkpoint_every": 2,
        "runs": str(folder / "runs"),
    }
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump({**job, **changes}))
    return path


def metrics(job: Job) -> list[dict[str, str]]:
    with (job.folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(job: Job) -> list[tuple[str, str, str, str]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["heldout_kl"]) for row in metrics(job)]


def saved_steps(job: Job) -> list[Path]:
    return [p for p in (job.folder / "checkpoints").glob("step-*") if (p / "state.json").is_file()]
