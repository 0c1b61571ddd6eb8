"""`qat analyze` on a tiny model: its numbers against the reference, its order, its refusals, and its pictures."""

import json
import math
from pathlib import Path

import pytest
import torch

from qat.analysis import candidates
from qat.checkpoints.shards import ShardReader, ShardWriter
from qat.cli import main
from qat.errors import CheckpointError, ConfigError, FormatError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize, qsnr
from qat.trainers.analyze import analyze, lines
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("analyze") / "model")


def write(folder: Path, **tensors: torch.Tensor) -> str:
    with ShardWriter(folder) as writer:
        (writer.folder / "config.json").write_text('{"model_type": "made up"}')
        for name, tensor in tensors.items():
            writer.add(name.replace("__", "."), tensor)
    return str(folder)


def test_every_weight_in_every_format_as_the_reference_rounds_it(model: Path) -> None:
    found = analyze(str(model))
    with ShardReader(model) as reader:
        expected = {n for n in reader.names() if n.endswith(".weight") and len(reader.info(n).shape) == 2}
        assert {w.name for w in found.weights} == expected and len(expected) == 16
        for w in found.weights:
            tensor = reader.get(w.name)
            assert w.shape == tuple(tensor.shape) and w.formats.keys() == found.formats.keys()
            for name, loss in w.formats.items():
                assert loss.qsnr == pytest.approx(qsnr(tensor, fake_quantize(tensor, lookup(name))), abs=1e-6)
                assert loss.expected is not None and abs(loss.expected - loss.qsnr) < 1.5
    assert sum(w.share for w in found.weights) == pytest.approx(1.0)
    assert [w.share for w in found.weights] == sorted((w.share for w in found.weights), reverse=True)
    assert not found.notes


def test_a_damaged_layer_comes_first(tmp_path: Path) -> None:
    """Equal energy, one with an outlier per row: more lost by integers, and a larger share of the error."""
    even, spiky = torch.randn(64, 256), torch.randn(64, 256)
    spiky[:, 7] = 40.0
    spiky *= even.norm() / spiky.norm()
    found = analyze(write(tmp_path / "model", a__weight=even, b__weight=spiky), ["int4_g128", "int8_channel"])
    assert [w.name for w in found.weights] == ["b.weight", "a.weight"]
    assert found.weights[0].crest > 10 > found.weights[1].crest and found.weights[0].share > 0.6


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "model",
        a__weight=torch.randn(8, 96),
        b__weight=torch.zeros(8, 128),
        norm__weight=torch.ones(8),
        experts__w1=torch.randn(2, 8, 128),
    )
    found = analyze(folder, ["int4_g32", "int4_g128"])
    text = "\n".join(lines(found, 20))
    assert "1 of 2 weights cannot be stored: int4_g128: groups of 128 do not divide a width of 96" in text
    assert "1 tensors are no matrices called *.weight and were left out: experts.w1" in text
    zeros = next(w for w in found.weights if w.name == "b.weight")
    assert zeros.share == 0.0 and math.isnan(zeros.formats["int4_g32"].qsnr)
    json.dumps(found.to_dict(), allow_nan=False)


def test_refusals(tmp_path: Path, model: Path) -> None:
    with pytest.raises(FormatError, match="nearest"):
        analyze(str(model), ["int4g32"])
    with pytest.raises(ConfigError, match="named twice"):
        analyze(str(model), ["int4_g32", "int4_g32"])
    with pytest.raises(CheckpointError, match="there is no folder"):
        analyze(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN"):
        analyze(write(tmp_path / "nan", a__weight=torch.full((2, 32), torch.nan)))
    with pytest.raises(CheckpointError, match="nothing to analyse"):
        analyze(write(tmp_path / "empty", a__weight=torch.ones(3)))
    with pytest.raises(UnsupportedError, match="hold codes"):
        analyze(write(tmp_path / "codes", a__weight=torch.ones(3, 32, dtype=torch.int8)))
    quantized = write(tmp_path / "quantized", a__weight=torch.ones(3, 32))
    Path(quantized, "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(UnsupportedError, match="quantized already"):
        analyze(quantized)


def test_the_command(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["analyze", str(model), "--most", "3", "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert "and 13 more (--most, --json)" in text and "all weights" in text and "theory.png" in text
    assert all(fmt.name in text for fmt in candidates())
    for picture in ("qsnr.png", "theory.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["analyze", str(model), "--json", "--formats", "nf4_g64,nvfp4"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in report["formats"]] == ["nf4_g64", "nvfp4"] and len(report["weights"]) == 16
    assert report["weights"][0]["formats"]["nf4_g64"]["expected"] is None  # a table has no theory here
    written = json.loads((out / "analysis.json").read_text())
    assert written["weights"][0].keys() == report["weights"][0].keys()
    assert main(["analyze", str(model), "--most", "0"]) == 2
    assert "--most 0 must be positive" in capfd.readouterr().err


def test_pictures_without_theory_and_without_numbered_layers(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", a__weight=torch.randn(8, 64), b__weight=torch.randn(8, 64))
    assert main(["analyze", folder, "--formats", "nf4_g64", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"analysis.json", "qsnr.png"}
