"""Every shipped recipe parses, and runs for two steps on a tiny random model."""

from pathlib import Path

import pytest

from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(p for p in ROOT.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_runs_two_steps(path: Path, tmp_path: Path) -> None:
    load_job(path)  # as shipped
    tiny = tiny_model("llama", tmp_path / "model")
    small = [
        f"model.id={tiny}",
        "steps=2",
        "rows=2",
        "micro_rows=1",
        "calibration=null",
        "calibration_rows=2",
        "checkpoint_every=0",
        "data.source=embedded",
        "data.generate=null",
        "data.config_name=null",
        "data.seq_len=32",
        "data.max_tokens=4096",
        "eval.data.seq_len=32",
        "eval.tokens=128",
        "eval.every=0",
        "strategy=auto",
        "devices=1",
        f"runs={tmp_path / 'runs'}",
    ]
    report = train(load_job(path, small), table=False)
    assert [row["name"] for row in report["rows"]] == ["bf16", "ptq", "best_ptq", "student"]
    assert report["tokens"] == 2 * 2 * 32
