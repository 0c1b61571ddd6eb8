"""The choice against all mixtures there are, and the command on a tiny model up to an export that verifies."""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from qat.checkpoints.export import export
from qat.checkpoints.verify import verify
from qat.cli import main
from qat.errors import ConfigError, FormatError, UnsupportedError
from qat.surgery import report
from qat.trainers.assign import Option, assign, choose, parsed, spelled, usual
from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import write

SKIP = [{"match": "lm_head", "skip": "x"}, {"match": "model.embed_tokens", "skip": "x"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def options(seed: int) -> list[list[Option]]:
    """Six sets of three options, better ones larger."""
    generator = torch.Generator().manual_seed(seed)
    kl = torch.rand(6, 2, generator=generator).sort(dim=1, descending=True).values
    size = torch.randint(1, 9, (6,), generator=generator)
    return [
        [
            Option((f"f{i}", None), float(size[s] * bits), cost)
            for i, (bits, cost) in enumerate(zip((4, 8, 16), (*kl[s].tolist(), 0.0), strict=True))
        ]
        for s in range(6)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_greedy_keeps_the_budget_and_stays_near_the_best_mixture(seed: int) -> None:
    given = options(seed)
    least, most = (sum(kind(o.bits for o in each) for each in given) for kind in (min, max))
    costs = []
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = least + share * (most - least)
        found = choose(given, budget)
        mixtures = [m for m in itertools.product(*given) if sum(o.bits for o in m) <= budget]
        best = min(sum(o.kl for o in mixture) for mixture in mixtures)
        costs.append(sum(o.kl for o in found))
        assert sum(o.bits for o in found) <= budget
        assert best <= costs[-1] <= best + 0.35 * (sum(o[0].kl for o in given) - best) + 1e-9
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0.0
    with pytest.raises(ConfigError, match="smallest candidates"):
        choose(given, least - 1)


def test_names_of_candidates() -> None:
    for name in ("nvfp4/nvfp4", "int4_g64", "bf16"):
        assert spelled(parsed(name)) == name
    assert usual({("int4_g64", None)}) == [("int4_g64", None), ("int8_channel", None), (None, None)]
    assert usual({("nvfp4", "nvfp4")})[1] == ("fp8_channel", "fp8_token")
    with pytest.raises(FormatError, match="nearest"):
        parsed("int4_g65")
    with pytest.raises(ConfigError, match="no candidate"):
        parsed("a/b/c")


def test_the_command_writes_a_run_that_trains_exports_and_verifies(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [*SKIP, {"match": "*_proj", "weight": "int4_g32"}]
    config = write(tmp_path, model, steps=1, scheme={"rules": rules, "init": ["scales"]})
    out = tmp_path / "mixed.yaml"
    assert main(["assign", str(config), str(out), "--bits", "6.5", "--tokens", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 4.5 < found["bits_per_weight"] <= 6.5 and len({row["formats"] for row in found["sets"]}) > 1
    assert found["kl"]["measured"] == pytest.approx(found["kl"]["sum"], rel=0.5)
    assert found["kl"]["measured"] < found["uniform"]["int4_g32"]["measured"]
    job = load_job(out)
    coverage = report(build_like(model), job.scheme)
    by_path = {path: row["formats"] for row in found["sets"] for path in row["paths"]}
    assert {m.path: m.weight or "bf16" for m in coverage.modules if m.path in by_path} == by_path
    train(job, table=False)
    folder = export(job.folder, tmp_path / "out", "compressed-tensors")
    groups = yaml.safe_load((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(set(by_path.values()) - {"bf16"}) and verify(folder).ok


def build_like(model: Path) -> torch.nn.Module:
    from qat.checkpoints.hf import load_model

    return load_model(model)


def test_bytes_are_a_budget_of_the_whole_model(tmp_path: Path, model: Path) -> None:
    job = load_job(
        write(tmp_path, model, scheme={"rules": [*SKIP, {"match": "*_proj", "weight": "int4_g32"}], "init": []})
    )
    parameters = sum(m.parameters for m in report(build_like(model), job.scheme).modules)
    size = int(parameters * 11 / 8)
    found = assign(job, size=size, formats=["int4_g32", "int8_channel"], tokens=32, console=Console(file=io.StringIO()))
    assert found.model_bits <= 11.0 and found.model_bits > report(build_like(model), job.scheme).bits_per_weight


@pytest.mark.parametrize(
    ("formats", "budget", "error", "said"),
    [
        ([], {}, ConfigError, "one budget"),
        ([], {"bits": 5.0, "size": 10}, ConfigError, "one budget"),
        (["int4_g32"], {"bits": 5.0}, ConfigError, "two or more"),
        (["int4_g32", "nf4_g64"], {"bits": 5.0}, UnsupportedError, "one checkpoint"),
        (["int4_g32", "bf16"], {"bits": 2.0}, ConfigError, "smallest candidates"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, model: Path, formats: list[str], budget: dict[str, float], error: type[Exception], said: str
) -> None:
    job = load_job(
        write(tmp_path, model, scheme={"rules": [*SKIP, {"match": "*_proj", "weight": "int4_g32"}], "init": []})
    )
    with pytest.raises(error, match=said):
        assign(job, formats=formats, tokens=32, console=Console(file=io.StringIO()), **budget)  # type: ignore[arg-type]  # by name


def test_nothing_to_assign_is_an_error(tmp_path: Path, model: Path) -> None:
    job = load_job(write(tmp_path, model, scheme={"rules": [{"match": "*", "skip": "x"}]}))
    with pytest.raises(ConfigError, match="quantizes no layer"):
        assign(job, bits=5.0, formats=[], tokens=32, console=Console(file=io.StringIO()))
