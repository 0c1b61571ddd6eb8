"""`qat convert`: what blobs and their description say is the exported model, whatever the order."""

import json
from pathlib import Path

import pytest
import torch

from qat.checkpoints.blobs import DESCRIPTION, convert, read_blob
from qat.checkpoints.layouts import open_export
from qat.cli import main
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, Scales
from tests.checkpoints.exports import export_pair
from tests.tiny import tiny_model

CASES = [
    (("int8_channel", "int8_token"), ["nz"]),
    (("int4_g64", None), ["int32-n"]),
    (("mxfp4", "mxfp4"), ["zn-16b", "mx-pairs"]),
    (("nvfp4", "nvfp4"), ["pairs-k", "swizzled"]),
    (("fp8_channel", "fp8_token"), ["zn"]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("blobs") / "model", num_hidden_layers=1)


@pytest.mark.parametrize(("pair", "names"), CASES, ids=lambda case: "-".join(map(str, case)))
def test_blobs_are_the_model(model: Path, tmp_path: Path, pair: tuple[str, str | None], names: list[str]) -> None:
    export_pair(model, tmp_path / "export", pair)
    description = convert(tmp_path / "export", tmp_path / "out", names)
    assert json.loads((tmp_path / "out" / DESCRIPTION).read_text()) == description
    exported, fmt = open_export(tmp_path / "export"), lookup(pair[0])
    for path in exported.modules:
        assert description["layers"][path] == {"weight": pair[0], "input": pair[1], "rotation": 0}
        codes = read_blob(tmp_path / "out", f"{path}.codes")
        stored = fmt.scale.from_bytes(read_blob(tmp_path / "out", f"{path}.scales"))
        above = read_blob(tmp_path / "out", f"{path}.global_scale") if fmt.global_scale else None
        assert torch.equal(QTensor(fmt, codes, Scales(stored, above)).dequantize(torch.bfloat16), exported.dense(path))
        entry = description["tensors"][f"{path}.codes"]
        assert entry["layout"] == names[0] and entry["plain_shape"] == [*codes.shape]
        size = (tmp_path / "out" / entry["file"]).stat().st_size
        assert size >= codes.numel() * fmt.element.bits // 8
        if pair[1] == "nvfp4":
            assert torch.equal(read_blob(tmp_path / "out", f"{path}.input_static"), exported.static_input(path))
    norm = "model.norm.weight"
    assert torch.equal(read_blob(tmp_path / "out", norm), exported.reader.get(norm))
    assert description["tensors"][norm]["layout"] == "nd"


def test_first_bytes_by_hand(model: Path, tmp_path: Path) -> None:
    """INT8 in "nz": byte i of the file is row i of column 0 of the weight, for the first 32 rows."""
    export_pair(model, tmp_path / "export", ("int8_channel", "int8_token"))
    description = convert(tmp_path / "export", tmp_path / "out", ["nz"])
    path = "model.layers.0.mlp.up_proj"
    weight = open_export(tmp_path / "export").reader.get(f"{path}.weight")
    raw = (tmp_path / "out" / description["tensors"][f"{path}.codes"]["file"]).read_bytes()
    assert raw[:32] == weight[:32, 0].numpy().tobytes() and raw[32:64] == weight[:32, 1].numpy().tobytes()


def test_what_is_refused(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_pair(model, tmp_path / "export", ("int8_channel", None))
    with pytest.raises(ConfigError, match="zn and nz both order codes"):
        convert(tmp_path / "export", tmp_path / "out", ["zn", "nz"])
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0.*int32-k does not take codes.*8 bits, not 4"):
        convert(tmp_path / "export", tmp_path / "out", ["int32-k"])
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "out"), "--layout", "zn"]) == 0
    assert "put back into its plain order" in capfd.readouterr().out
    with pytest.raises(CheckpointError, match="no tensor called x"):
        read_blob(tmp_path / "out", "x")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(tmp_path / "export", tmp_path / "out", ["zn"])
    with pytest.raises(CheckpointError, match="no quantization"):
        convert(model, tmp_path / "other", ["zn"])


def test_damage_is_noticed(model: Path, tmp_path: Path) -> None:
    export_pair(model, tmp_path / "export", ("int8_channel", None))
    description = convert(tmp_path / "export", tmp_path / "out", ["nz"])
    name = "model.layers.0.mlp.up_proj.codes"
    file = tmp_path / "out" / description["tensors"][name]["file"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, not those of uint8"):
        read_blob(tmp_path / "out", name)
    description["version"] = 2
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="version 2; readable: 1"):
        read_blob(tmp_path / "out", name)
