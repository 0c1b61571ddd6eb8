"""KL of one set at a time on a tiny model, against one that has nothing else quantized; the table, JSON and plot."""

import json
from pathlib import Path

import pytest

from qat.cli import main
from qat.errors import ConfigError
from qat.modes import only
from qat.scheme import Scheme
from qat.trainers.job import Job, load_job
from qat.trainers.sensitivity import Bench, Measured, agreement, analyze_job, measure, merged, ranked
from tests.tiny import tiny_model
from tests.trainers.jobs import write

SKIP = [{"match": "lm_head", "skip": "x"}, {"match": "model.embed_tokens", "skip": "x"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    rules = [*SKIP, {"match": "*_proj", "weight": "int3_g32", "input": "int8_token"}]
    return load_job(write(tmp_path, model, scheme={"rules": rules, "init": ["smooth", "gptq"]}))


def test_one_set_is_what_a_scheme_with_only_that_set_is(job: Job, model: Path) -> None:
    plain = job.scheme.model_copy(update={"init": ()})
    bench = Bench(job, model, 64)
    everything = bench.quantized(plain)
    found = bench.by_set(everything)
    assert len(found) == 8
    part = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    rules = [{"match": "re:" + r".*layers\.1\.self_attn\.[qkv]_proj", "weight": "int3_g32", "input": "int8_token"}]
    alone = Scheme.model_validate({"rules": [*rules, {"match": "*", "skip": "x"}], "init": []})
    assert found[part] == pytest.approx(bench.kl(bench.quantized(alone)), rel=1e-4) and found[part] > 0
    saved = bench.by_set(everything, others=True)
    total = bench.kl(everything)
    with only(everything, part, others=True):
        assert saved[part] == pytest.approx(total - bench.kl(everything), rel=1e-4)


def test_the_report_is_sorted_and_says_how_far_scores_agree(job: Job, tmp_path: Path) -> None:
    found = analyze_job(job, 64, kl=True, others=False)
    costs = [one.kl or 0.0 for one in found.measured]
    assert costs == sorted(costs, reverse=True) and len(costs) == 8
    assert set(found.agreements) == {"mse", "quartile", "std", "kurtosis"}
    assert all(-1 <= rank <= 1 for rank in found.agreements.values())
    lines = found.lines(3)
    assert lines[2].startswith(found.measured[0].name) and "and 5 more" in "\n".join(lines)


def test_the_command_writes_what_it_prints(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(next(tmp_path.glob("*.yaml")))
    assert main(["analyze", config, "--no-kl", "--tokens", "64", "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert [row["kl"] for row in printed["sets"]] == [None] * 8 and not printed["agreement"]
    assert (tmp_path / "out" / "sensitivity.png").stat().st_size > 1000
    for wrong in (["--formats", "nvfp4"], ["--no-kl", "--all-but"], ["--tokens", "0"]):
        assert main(["analyze", config, *wrong]) == 2
    assert main(["analyze", str(job.model.id), "--all-but"]) == 2


def test_nothing_to_measure_is_an_error(job: Job, model: Path) -> None:
    nothing = Scheme.model_validate({"rules": [{"match": "*", "skip": "x"}]})
    with pytest.raises(ConfigError, match="quantizes nothing"):
        measure(job.model_copy(update={"scheme": nothing}), model)


def one(name: str, kl: float | None, mse: float) -> Measured:
    return Measured((name,), "int4_g32", None, 1, kl, {"mse": mse, "quartile": 0.0, "std": 0.0, "kurtosis": 0.0})


def test_ranks_are_spearmans() -> None:
    found = [one("a", 1.0, 10.0), one("b", 2.0, 1000.0), one("c", 3.0, 100.0), one("d", None, 5.0)]
    assert [each.paths[0] for each in ranked(found, "kl")] == ["c", "b", "a", "d"]
    assert [each.paths[0] for each in ranked(found, "mse")] == ["b", "c", "a", "d"]
    assert agreement(found, "mse") == pytest.approx(0.5)
    assert agreement(found[:2], "mse") is None


def test_names_of_sets() -> None:
    assert merged(("a.b.q_proj", "a.b.k_proj")) == "a.b.{q_proj,k_proj}"
    assert merged(("a.embed", "lm_head")) == "a.embed and lm_head" and merged(("x",)) == "x"
