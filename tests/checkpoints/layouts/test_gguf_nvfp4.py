"""NVFP4 in GGUF files: the codes and block scales of a matrix, and the tensor of what is above them."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import nn

from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.types import row_bytes
from qat.checkpoints.verify_file import verify_file
from qat.errors import UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, Scales
from qat.sites import weights
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.tiny import tiny_model

KIND = GGMLQuantizationType.NVFP4
REST = {"match": "*", "skip": "the rest"}


def written(kind: str, folder: Path, input: str | None = None) -> tuple[nn.Module, Path]:
    """A tiny model whose weights are NVFP4, moved so that matrices have other scales above, and its file."""
    source = tiny_model(kind, folder / "source")
    rules = [{"match": "re:.*(_proj|experts.*)", "weight": "nvfp4", "input": input}, REST]
    how = {"activation_rule": "llama_cpp"} if input else {}
    model = quantized(source, rules, round_bf16=False, **how)
    return model, quiet_export(model, source, folder / "out.gguf", "gguf")


def test_every_code_and_scale_has_its_place() -> None:
    fmt, generator = lookup("nvfp4"), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 192), generator=generator, dtype=torch.uint8)
    stored = torch.randint(1, 0x7F, (32, 12), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    q = QTensor(fmt, codes, Scales(stored, torch.tensor(1.0)))
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(row_bytes(q).numpy(), KIND)), q.dequantize())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_what_was_trained_is_in_the_file(kind: str, tmp_path: Path) -> None:
    model, out = written(kind, tmp_path)
    file = GgufFile(out)
    assert file.facts["general.file_type"] == gguf.LlamaFileType.MOSTLY_NVFP4 and file.record is not None
    stacked = kind == "qwen3_moe"
    name = "blk.1.ffn_down_exps" if stacked else "blk.1.ffn_down"
    assert file.stored(f"{name}.weight").tensor_type is KIND
    above = file.stored(f"{name}.scale")
    assert above.tensor_type is GGMLQuantizationType.F32 and list(above.shape) == [4 if stacked else 1]
    raw = file.stored("blk.0.attn_k.weight").data
    plain = torch.from_numpy(gguf.quants.dequantize(raw, KIND)).abs()
    assert float(plain.max()) > 1.0  # E4M3 scales use the range that they have: the weight itself is far smaller
    report = verify_file(out)
    assert report.ok, report
    with torch.no_grad():
        trained = {path: site.value().float() for path, site in weights(model).items()}
        assert torch.equal(file.value("blk.0.attn_v.weight"), trained["model.layers.0.self_attn.v_proj"])
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)


def test_inputs_are_trained_rounded_per_32(tmp_path: Path) -> None:
    model, out = written("llama", tmp_path, "q8_0")
    file = load_file(out, inputs=True)
    file.get_submodule("lm_head")._forward_pre_hooks.clear()
    with torch.no_grad(), served(model):
        assert torch.equal(file(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(("name", "byte"), [("weight", 0x00), ("weight", 0x7F), ("scale", 0x00)])
def test_broken_scales_are_found(name: str, byte: int, tmp_path: Path) -> None:
    _, out = written("llama", tmp_path)
    reader = GGUFReader(out, "r+")
    data = next(tensor.data for tensor in reader.tensors if tensor.name == f"blk.0.ffn_up.{name}")
    if name == "weight":
        data[3, 2] = byte
    else:
        data[:] = 0
    reader.data.flush()
    found = {check.name: check.detail for check in verify_file(out, logits=False).checks if not check.ok}
    assert found.keys() == {"weights", "scales"} and "blk.0.ffn_up.weight: 1 are zero or not" in found["scales"]


def test_a_file_without_its_scales_is_not_whole(tmp_path: Path) -> None:
    _, out = written("llama", tmp_path)
    file = GgufFile(out)
    file.tensors.pop("blk.0.ffn_up.scale")
    raw = out.read_bytes().replace(b"blk.0.ffn_up.scale", b"blk.0.ffn_xx.scale")
    out.write_bytes(raw)
    failed = {check.name: check.detail for check in verify_file(out, logits=False).checks if not check.ok}
    assert failed["tensors"] == "tensors do not fit: blk.0.ffn_up.scale is missing; blk.0.ffn_xx.scale is unknown"


def test_what_llama_cpp_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    narrow = tiny_model("llama", tmp_path / "narrow", hidden_size=96, head_dim=32, num_hidden_layers=1)
    model = quantized(narrow, [{"match": "re:.*(q|k|v)_proj", "weight": "nvfp4"}, REST], round_bf16=False)
    with pytest.raises(UnsupportedError, match=r"NVFP4 has blocks of 64 in llama\.cpp, which .* width of 96; use"):
        quiet_export(model, narrow, tmp_path / "a.gguf", "gguf")
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    table = [{"match": "re:lm_head|.*embed_tokens", "weight": "nvfp4"}, REST]
    model = quantized(source, table, round_bf16=False, tied="share")
    with pytest.raises(UnsupportedError, match=r"looks rows of a table up without the scale above nvfp4; use q8_0"):
        quiet_export(model, source, tmp_path / "a.gguf", "gguf")
    both = quantized(source, [{"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"}, REST])
    with pytest.raises(UnsupportedError, match=r"gguf cannot hold nvfp4 weights with nvfp4 inputs .*: q8_0, none"):
        quiet_export(both, source, tmp_path / "a.gguf", "gguf")
