"""benchmarks/operators.py times peers that are right, names those that are missing, fail or are wrong, and goes on."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, quantize
from tests.tiny import tiny_model
from tests.trainers.jobs import write

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def _script(name: str) -> ModuleType:
    """A file of benchmarks/ as a module, under its own name: its imports are those of a script there."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    names = ("layers", "peer_calls", "peers", "measurements", "operators")
    for name in names[:4]:
        _script(name)
    yield sys.modules["peers"]
    for name in names:
        sys.modules.pop(name, None)


def right(weight: QTensor) -> Callable[..., Tensor]:
    return lambda x, *_: functional.linear(x.float(), weight.dequantize()).bfloat16()


def shifted(weight: QTensor) -> Callable[..., Tensor]:
    """What a peer does that takes the scales of the next group."""
    values = weight.dequantize() / weight.scales.effective().repeat_interleave(32, -1)
    dense = values * weight.scales.effective().roll(1, -1).repeat_interleave(32, -1)
    return lambda x, *_: functional.linear(x.float(), dense)


def one_row_off(weight: QTensor) -> Callable[..., Tensor]:
    dense = weight.dequantize()
    dense[3] *= 1.1
    return lambda x, *_: functional.linear(x.float(), dense)


def refuses(_: QTensor) -> Callable[..., Tensor]:
    raise ValueError("columns must be a multiple of 1024\nand more that nobody reads")


def fails_later(_: QTensor) -> Callable[..., Tensor]:
    def call(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    return call


def _run(peers: ModuleType, builders: dict[str, Callable[[QTensor], Any]], **options: Any) -> tuple[list[str], str]:
    """Names that were timed, and the report, of made-up peers of an int4_g32 weight."""
    here = peers.Package("torch", "torch", "pip install torch")
    table = tuple(
        peers.Adapter(name, "here", "packed", ("int4_g32",), build, devices=("cpu",))
        for name, build in builders.items()
    )
    run = peers.Peers("cpu", lambda call: (call(), 5.0)[1], frozenset({"here"}), table, {"here": here}, **options)
    weight = quantize(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)), lookup("int4_g32"))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    built = run.products("packed", {("int4_g32",): weight}, "a layer")
    truth = functional.linear(x.float(), weight.dequantize())
    timings = run.timings(built, {("int4_g32",): (x,)}, lambda _: truth, "a layer, 5 tokens")
    assert all(t.us == 5.0 and t.version == here.version for t in timings)
    return [t.name for t in timings], "\n".join(run.report())


def test_table(peers: ModuleType) -> None:
    names = [(peer.name, peer.beside) for peer in peers.PEERS]
    assert len(set(names)) == len(names)
    operators = _script("operators")
    for peer in peers.PEERS:
        assert peer.package in peers.PACKAGES and not peers.PACKAGES[peer.package].absent
        beside = {
            "packed": [(name,) for name in operators.WEIGHTS],
            "matmul": list(operators.PAIRS),
            "rows": [("rms_norm",), ("forward_kl",), ("jsd",), ("cross_entropy",)],
        }
        assert peer.beside in beside[peer.family], "nothing of ours is measured there"
        assert peer.family == "rows" or all(name in CATALOG for name in peer.beside)
    used = {peer.package for peer in peers.PEERS}
    assert all(key in used or package.absent for key, package in peers.PACKAGES.items())


def test_only_right_ones_are_timed_and_the_others_named(peers: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    builders = {"Refuses": refuses, "Fails": fails_later, "Shifted": shifted, "Off": one_row_off, "Right": right}
    timed, report = _run(peers, builders)
    assert timed == ["Right"]
    assert "timed beside ours: Right" in report
    assert "Refuses: ValueError: columns must be a multiple of 1024" in report and "nobody reads" not in report
    assert "Fails: RuntimeError: no kernel image" in report
    assert "Shifted: wrong: off by" in report
    assert re.search(r"Off: wrong: off by [01]\.\d% ", report), "2% of the whole are allowed, one column is not"
    assert "Fails, a layer, 5 tokens: RuntimeError" in capsys.readouterr().err


def test_wrong_shapes_and_nan_are_wrong(peers: ModuleType) -> None:
    truth = torch.randn(4, 6)
    assert peers.disagreement(truth.bfloat16(), truth, 0.02) == ""
    assert "(4, 3)" in peers.disagreement(truth[:, :3], truth, 0.02)
    assert "tuple" in peers.disagreement((truth,), truth, 0.02)
    assert "wrong" in peers.disagreement(truth.masked_fill(truth == truth.max(), torch.nan), truth, 0.02)
    assert "wrong" in peers.disagreement(torch.zeros_like(truth), truth, 0.02)


def test_absent_and_left_out(peers: ModuleType) -> None:
    packages = {
        "gone": peers.Package("no-such-thing", "no_such_thing_at_all", "pip install no-such-thing"),
        "idle": peers.Package("torch", "torch", "pip install torch", absent="nothing like it here"),
        "unwanted": peers.Package("torch", "torch", "pip install torch"),
    }
    table = tuple(peers.Adapter(key, key, "packed", ("mxfp4",), right, devices=("cpu",)) for key in packages)
    run = peers.Peers("cpu", lambda call: 1.0, frozenset({"gone", "idle"}), table[::2], packages)
    assert run.products("packed", {("mxfp4",): None}, "a layer") == []
    report = "\n".join(run.report())
    assert "gone is not installed, so not compared: pip install no-such-thing" in report
    assert "is not compared: nothing like it here" in report
    assert "left out by --peers" in report
    assert run.versions()["no-such-thing"] == "not installed"


def test_device_without_kernel(peers: ModuleType) -> None:
    here = {"here": peers.Package("torch", "torch", "pip install torch")}
    table = tuple(peers.Adapter(name, "here", "packed", ("mxfp4",), refuses) for name in ("One", "Two"))
    run = peers.Peers("cpu", lambda call: 1.0, frozenset(here), table, here)
    assert run.products("packed", {("mxfp4",): None}, "a layer") == []
    assert "not compared at a layer: One, Two: there is no kernel for cpu" in run.report()


def test_choice(peers: ModuleType) -> None:
    assert peers.choose("all") == peers.PACKAGES.keys() and peers.choose("none") == frozenset()
    assert peers.choose("gemlite,vllm") == {"gemlite", "vllm"}
    with pytest.raises(Exception, match="say all, none or some of"):
        peers.choose("gemlite,machete")


def test_packed_weights_of_peers(peers: ModuleType) -> None:
    """Words and offset codes mean the same weight: decoded independently."""
    calls = sys.modules["peer_calls"]
    for name in ("int4_g128", "int8_channel", "mxfp4"):
        weight = quantize(torch.randn(16, 128), lookup(name))
        bits = weight.format.element.bits
        words, per_word = calls._words(weight), 32 // bits
        assert words.shape == (16, 128 // per_word) and words.dtype == torch.int32
        codes = torch.stack([words >> (bits * i) & ((1 << bits) - 1) for i in range(per_word)], -1).flatten(-2)
        if name.startswith("int"):
            scaled = (codes.float() - (1 << (bits - 1))) * weight.scales.effective().repeat_interleave(
                128 // weight.scales.stored.shape[1], -1
            )
            assert torch.equal(scaled, weight.dequantize())
        else:
            assert torch.equal(codes.to(torch.uint8), weight.codes)


def test_a_kernel_that_fails_loses_its_own_times_only(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One contender raises on one layer, and another layer cannot be set up at all."""
    operators = _script("operators")
    monkeypatch.setitem(operators.LAYERS, "small", {"broken": (60, 128), "tiny": (64, 128)})
    monkeypatch.setitem(operators.TOKENS, "cpu", (1, 2))
    monkeypatch.setattr(operators, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(operators, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(operators, "plot", lambda *_: None)
    product, torch_int4 = operators.packed_linear, operators._torch_int4

    def no_mxfp4(x: Tensor, weight: Any) -> Tensor:
        if weight.format == "mxfp4" and len(x) == 1:
            raise AttributeError("'int' object has no attribute 'to'")
        return product(x, weight)

    def not_broken(rows: int, *rest: Any) -> Any:
        if rows == 60:
            raise RuntimeError("out of memory")
        return torch_int4(rows, *rest)

    monkeypatch.setattr(operators, "packed_linear", no_mxfp4)
    monkeypatch.setattr(operators, "_torch_int4", not_broken)
    flags = ["--device", "cpu", "--only", "packed", "--layers", "small", "--repeats", "1", "--peers", "none"]
    monkeypatch.setattr(sys, "argv", ["operators.py", *flags, "--out", str(tmp_path)])
    operators.main()
    rows = json.loads((tmp_path / "operators.json").read_text())["rows"]
    assert {row["what"] for row in rows} == {"tiny"}
    assert {(row["contender"], row["tokens"]) for row in rows} >= {("BF16", 1), ("nvfp4", 1), ("mxfp4", 2)}
    assert not any(row["contender"] == "mxfp4" and row["tokens"] == 1 for row in rows)
    told = capsys.readouterr()
    assert "mxfp4 fails: AttributeError" in told.err and "out of memory" in told.err and "| tiny 64x128" in told.out


def test_benchmark_on_a_cpu(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command on one tiny layer, with one peer that is right and one that raises."""
    operators = _script("operators")
    monkeypatch.setitem(operators.LAYERS, "small", {"tiny": (64, 128)})
    monkeypatch.setitem(operators.TOKENS, "cpu", (1, 2))
    monkeypatch.setattr(operators, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(operators, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(operators, "plot", lambda *_: None)
    mine = tuple(
        peers.Adapter(build.__name__, "here", "packed", ("mxfp4",), build, "a note", devices=("cpu",))
        for build in (right, fails_later)
    )
    here = {"here": peers.Package("torch", "torch", "pip install torch")}
    monkeypatch.setattr(
        operators, "Peers", lambda device, timer, _: peers.Peers(device, timer, frozenset(here), mine, here)
    )
    flags = ["--device", "cpu", "--only", "packed", "--layers", "small", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["operators.py", *flags])
    operators.main()
    printed = capsys.readouterr().out
    assert "| right |" in printed and "tiny 64x128 | 2 |" in printed
    assert "fails_later: RuntimeError: no kernel image" in printed
    report = json.loads((tmp_path / "operators.json").read_text())
    row = next(row for row in report["rows"] if row["contender"] == "right")
    # Wheels of the index call themselves 2.13.0, and their module 2.13.0+cu130.
    assert row["version"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert row["note"].startswith("a note; within 2%") and row["us"] > 0
    assert {"BF16", "int4_g128", "mxfp4", "right"} <= {row["contender"] for row in report["rows"]}
    assert any("fails_later" in line for line in report["peers"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the script reads /proc")
def test_kills_lose_nothing() -> None:
    """Fewer of them than the script's default; each must be reported, and all must pass."""
    command = [sys.executable, str(FOLDER / "kills.py"), "--training", "4", "--exports", "4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok\n") == 8 and "all of 8 kills passed" in done.stdout


def test_a_recovery_table_runs_at_once_goes_on_and_names_what_failed(tmp_path: Path) -> None:
    recipe, table = write(tmp_path, tiny_model("llama", tmp_path / "model")), tmp_path / "table.yaml"
    table.write_text(
        json.dumps({"a seed 0": [str(recipe)], "a seed 1": [str(recipe), "seed=1"], "bad": [str(recipe), "steps=0"]})
    )
    command = [sys.executable, str(FOLDER / "recovery.py"), "--table", str(table), "--runs", str(tmp_path / "runs")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--jobs", "2", *more], capture_output=True, text=True, check=False, cwd=FOLDER.parent
        )

    done = run()
    assert done.returncode == 1 and "| bad | failed" in done.stdout
    assert re.search(r"^a: .*% \+- .*, 2 seeds$", done.stdout, re.M)
    reports = [tmp_path / "runs" / f"a-seed-{seed}" / "report.json" for seed in (0, 1)]
    before = [path.stat().st_mtime_ns for path in reports]
    again = run("--only", "seed")  # what is finished is not repeated
    assert again.returncode == 0 and [path.stat().st_mtime_ns for path in reports] == before
    assert f"| {json.loads(reports[0].read_text())['gap_closed']['kl']:.1%} |" in again.stdout
