"""Layers that fall back are decided once, recorded as rules, and trained and exported so."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from qat.checkpoints.export import export
from qat.checkpoints.verify import verify
from qat.errors import ConfigError
from qat.trainers.fallback import decided, settled_before
from qat.trainers.job import Job, load_job
from qat.trainers.run import train
from qat.trainers.sensitivity import measure
from tests.tiny import tiny_model
from tests.trainers.jobs import write

RULES = [
    {"match": "lm_head", "skip": "x"},
    {"match": "model.embed_tokens", "skip": "x"},
    {"match": "*.down_proj", "weight": "int4_g32", "learn": "none"},
    {"match": "*_proj", "weight": "int4_g32"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def config(folder: Path, model: Path, **fallback: object) -> Path:
    return write(folder, model, steps=2, scheme={"rules": RULES, "init": [], "fallback": {"tokens": 64, **fallback}})


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("by", ["kl", "mse"])
def test_the_layers_that_suffer_most_get_rules_of_their_own(tmp_path: Path, model: Path, by: str) -> None:
    job = load_job(config(tmp_path, model, level="L3", weight="int8_channel", by=by))
    fixed = decided(job, model, quiet())
    plain = job.model_copy(update={"scheme": job.scheme.model_copy(update={"fallback": None})})
    expected = [path for one in measure(plain, model, 64, kl=by == "kl")[:3] for path in one.paths]
    added = fixed.scheme.rules[: len(expected)]
    assert fixed.scheme.fallback is None and [rule.match for rule in added] == expected
    assert all(rule.weight == "int8_channel" for rule in added)
    assert [rule.learn for rule in added] == ["none" if "down_proj" in path else None for path in expected]
    assert decided(fixed, model, quiet()) is fixed


def test_a_run_records_the_decision_and_resumes_with_it(tmp_path: Path, model: Path) -> None:
    path = config(tmp_path, model, layers=2, by="kurtosis")
    job = load_job(path)
    report = train(job, table=False)
    assert "fallback: " in str(report["scheme"])
    recorded = yaml.safe_load((job.folder / "job.yaml").read_text())["scheme"]
    assert recorded["fallback"] is None and all("fallback" in rule["skip"] for rule in recorded["rules"][:2])
    more = load_job(path, ["steps=3"])
    assert settled_before(more, Job.model_validate({**yaml.safe_load((job.folder / "job.yaml").read_text())})) != more
    train(more, resume_run=True, table=False)
    again = yaml.safe_load((job.folder / "job.yaml").read_text())
    assert again["scheme"] == recorded and again["steps"] == 3
    with pytest.raises(ConfigError, match="another job"):
        train(load_job(path, ["steps=4", "scheme.fallback.weight=int8_channel"]), resume_run=True, table=False)


def test_a_mixture_is_exported_as_several_groups_and_verified(tmp_path: Path, model: Path) -> None:
    job = load_job(config(tmp_path, model, level="L2", weight="int8_channel", by="mse"))
    train(job, table=False)
    out = export(job.folder, tmp_path / "out", "compressed-tensors")
    groups = yaml.safe_load((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    assert verify(out).ok


def test_too_many_layers_and_formats_that_do_not_fit_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="8 of 8 layers"):
        decided(load_job(config(tmp_path, model, level="L8", by="mse")), model, quiet())
    everything = [{"match": "*", "weight": "int4_g32"}]
    job = load_job(write(tmp_path, model, scheme={"rules": everything, "tied": "untie", "fallback": {"level": "L9"}}))
    assert job.scheme.fallback is not None  # tables never fall back: 8 sets and the head
    with pytest.raises(ConfigError, match="9 of 9 layers"):
        decided(job, model, quiet())
