"""What `qat verify` says of GGUF files: good ones, damaged ones, cut ones, and those of other tools."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from qat.checkpoints.hf import load_model
from qat.checkpoints.verify_file import verify_file
from qat.cli import main
from tests.checkpoints.exports import quantized, quiet_export
from tests.tiny import tiny_model

RULES = [{"match": "*_proj", "weight": "q4_0"}, {"match": "*", "skip": "the rest"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("file")
    source = tiny_model("llama", root / "source", num_hidden_layers=1)
    return quiet_export(quantized(source, RULES, round_bf16=False), source, root / "out.gguf", "gguf")


def failed(path: Path, logits: bool = False) -> dict[str, str]:
    return {check.name: check.detail for check in verify_file(path, logits).checks if not check.ok}


def test_a_good_file_passes_in_three_readings(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file)]) == 0
    said = capsys.readouterr().out
    assert "7 dequantized weights and 5 other tensors equal the trained model" in said
    assert "largest logit difference 0.0 over 64 tokens, in float32" in said and "all checks passed" in said


def test_gemma_passes_without_a_reader_that_scales_otherwise(tmp_path: Path) -> None:
    """Norms are stored as 1 + w, and compared as w."""
    source = tiny_model("gemma2", tmp_path / "source", num_hidden_layers=1)
    out = quiet_export(quantized(source, RULES, round_bf16=False), source, tmp_path / "out.gguf", "gguf")
    report = verify_file(out)
    assert report.ok and "takes query_pre_attn_scalar of every gemma2 file for 256" in report.checks[-1].detail
    norm = next(tensor.data for tensor in GGUFReader(out).tensors if tensor.name == "output_norm.weight")
    weight = load_model(source).get_submodule("model.norm").weight
    assert np.abs(norm - 1 - weight.detach().float().numpy()).max() < 0.1 < np.abs(norm).min()


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("blk.0.attn_q.weight", lambda data: np.bitwise_xor(data[0, 5:6], 0x10, out=data[0, 5:6]), {"weights"}),
        ("blk.0.ffn_down.weight", lambda data: data[3, :2].fill(0x7C), {"weights", "scales"}),  # a NaN
        ("blk.0.attn_v.weight", lambda data: data[0, :2].fill(0), {"weights", "scales"}),
        ("output_norm.weight", lambda data: data.__setitem__(7, 3.0), {"weights"}),
    ],
)
def test_damage_is_found(
    name: str, change: Callable[[np.ndarray], None], check: set[str], file: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    shutil.copy(file, damaged)
    reader = GGUFReader(damaged, "r+")
    change(next(tensor.data for tensor in reader.tensors if tensor.name == name))
    reader.data.flush()
    found = failed(damaged)
    assert found.keys() == check and (name in found.get("scales", name))
    assert "is not the trained tensor" in found["weights"]


def test_what_is_cut_short_is_named(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in (len(whole) - 40, len(whole) // 2, 2000, 30, 3):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        assert "cut.gguf is" in failed(cut)["complete"]
    assert main(["verify", str(tmp_path / "cut.gguf")]) == 1
    assert "there is no file" in failed(tmp_path / "absent.gguf")["complete"]
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04 and so on")
    assert "is not a GGUF file" in failed(tmp_path / "other.gguf")["complete"]


def test_other_tools_files_are_read_without_a_word_of_training(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = verify_file(tmp_path / "theirs.gguf")
    assert report.ok and sum("skipped" in check.detail for check in report.checks) == 3
