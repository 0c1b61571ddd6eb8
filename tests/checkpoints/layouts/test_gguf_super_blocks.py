"""llama.cpp's K types in files, against the `gguf` package: the place of every bit, and what was trained."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import Tensor

from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.types import FORMATS, row_bytes
from qat.checkpoints.verify_file import verify_file
from qat.errors import FormatError, UnsupportedError
from qat.modes import served
from qat.numbers.numerics import QTensor, Scales
from qat.sites import weights
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.tiny import tiny_model

KINDS = [kind for kind, fmt in FORMATS.items() if fmt.super_block]
RULES = [
    {"match": "*.o_proj", "weight": "q5_0"},  # of 4 heads of 32: 128 columns
    {"match": "re:.*(q|k|v)_proj", "weight": "q6_k"},
    {"match": "re:.*(gate|up)_proj", "weight": "q5_k"},
    {"match": "*_proj", "weight": "q4_k"},
    {"match": "*", "skip": "the rest"},
]
INIT = [{"kind": "gptq", "choose": "arrival", "refit": 1}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_code_scale_and_minimum_has_its_place(kind: GGMLQuantizationType) -> None:
    """Whatever a file may hold, not only what rounding gives: codes, scales and minima at random, all of their bits."""
    fmt, generator = FORMATS[kind], torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    shape = 64, 512
    grid = fmt.grid_shape(*shape)
    above = torch.rand(64, 2, generator=generator).half().float().repeat_interleave(grid[1] // 2, dim=1)
    choice = None if fmt.is_single else drawn(0, 2, grid)
    minimum = None if fmt.minimum is None else Scales(drawn(0, 64, grid), above.flip(0), type=fmt.minimum)
    scales = Scales(drawn(1, int(fmt.scale.largest) + 1, grid), above, None, choice, type=fmt.scale, minimum=minimum)
    q = QTensor(fmt, drawn(0, 2**fmt.element.bits, shape), scales)
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(row_bytes(q).numpy(), kind)), q.dequantize())


@pytest.mark.parametrize("learn", ["lsq", "dual_lsq", "refit"])
def test_what_was_trained_is_in_the_file(learn: str, tmp_path: Path) -> None:
    """From a GPTQ start, then moved weights and scales; narrower rows in Q5_0, as llama.cpp does."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    source = tiny_model("llama", tmp_path / "source", head_dim=32, **sizes)
    model = quantized(source, RULES, round_bf16=False, learn=learn, init=INIT)
    generator = torch.Generator().manual_seed(0)
    for site in weights(model).values():
        with torch.no_grad():
            site.weight.add_(0.02 * site.weight.std() * torch.randn(site.weight.shape, generator=generator))
            if site.quantizer.log_scale is not None:
                shape = site.quantizer.log_scale.shape
                site.quantizer.log_scale.add_(0.05 * torch.randn(shape, generator=generator))
            if learn == "refit":
                site.quantizer.refit(site.weight)
    out = quiet_export(model, source, tmp_path / "out.gguf", "gguf")
    file = GgufFile(out)
    kinds = {name.split(".")[2]: tensor.tensor_type.name for name, tensor in file.tensors.items() if "blk" in name}
    assert [kinds[name] for name in ("attn_output", "attn_q", "ffn_up", "ffn_down")] == ["Q5_0", "Q6_K", "Q5_K", "Q4_K"]
    assert file.record is not None
    with torch.no_grad():
        for path, entry in file.record["modules"].items():
            assert torch.equal(file.value(entry["tensor"]), weights(model)[path].value().float())
    report = verify_file(out)
    assert report.ok, report


def test_inputs_of_super_blocks_are_trained_and_read_rounded_per_256(tmp_path: Path) -> None:
    """Those of narrower layers per 32; the file, read with inputs rounded as llama.cpp does, is what was trained."""
    source = tiny_model("llama", tmp_path / "source", hidden_size=256, num_hidden_layers=1)
    own = [{**rule, "input": "q8_0" if rule["weight"] == "q5_0" else "q8_k"} for rule in RULES[:-1]]
    model = quantized(source, [*own, RULES[-1]], round_bf16=False, activation_rule="llama_cpp")
    out = quiet_export(model, source, tmp_path / "out.gguf", "gguf")
    with torch.no_grad(), served(model):
        trained = model(ids()).logits
    file = load_file(out, inputs=True)
    file.get_submodule("lm_head")._forward_pre_hooks.clear()  # its BF16 inputs, which the scheme left alone
    with torch.no_grad():
        assert torch.equal(file(ids()).logits, trained)
        assert not torch.equal(load_file(out)(ids()).logits, trained)


def test_inputs_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", hidden_size=256, num_hidden_layers=1)
    for weight, input, has in (("q4_k", "q8_0", "q8_k"), ("q5_0", "q8_k", "q8_0")):
        rules = [{"match": "*.mlp.*_proj", "weight": weight, "input": input}, RULES[-1]]
        message = rf"gguf cannot hold {weight} weights with {input} inputs; nearest inputs for them: {has}, none"
        with pytest.raises(UnsupportedError, match=message):
            quiet_export(quantized(source, rules, round_bf16=False), source, tmp_path / "a.gguf", "gguf")


@pytest.mark.parametrize(("name", "at"), [("ffn_down", 1), ("attn_q", 209), ("ffn_up", 1)])
def test_a_broken_number_above_is_found(name: str, at: int, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", hidden_size=256, num_hidden_layers=1)
    out = quiet_export(quantized(source, RULES, round_bf16=False), source, tmp_path / "out.gguf", "gguf")
    reader = GGUFReader(out, "r+")
    next(tensor.data for tensor in reader.tensors if name in tensor.name)[3, at] = 0x7C  # infinity's exponent
    reader.data.flush()
    found = {check.name: check.detail for check in verify_file(out, logits=False).checks if not check.ok}
    assert found.keys() == {"weights", "scales"} and f"blk.0.{name}.weight: 1 are zero or not" in found["scales"]


def test_rows_that_a_super_block_does_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"q_proj.*super-blocks of 256 do not divide a width of 128"):
        quantized(source, RULES[1:], round_bf16=False)
    with pytest.raises(FormatError, match=r"q_proj: q8_k: groups of 256 do not divide a width of 128"):
        quantized(source, [{"match": "*_proj", "weight": "int8_channel", "input": "q8_k"}, RULES[-1]])
