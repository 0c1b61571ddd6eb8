"""Our GGUF files inside llama.cpp itself, and beside what its own converter writes of the same models. Needs the
environment of `make test-llama-cpp`, where llama-cpp-python and llama.cpp's converter are; elsewhere it skips."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor

from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts.gguf.load import load_file
from qat.scheme import Scheme
from qat.surgery import apply
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.tiny import tiny_model

PYTHON = os.environ.get("QAT_LLAMA_CPP_PYTHON", "")  # has llama_cpp
CONVERTER = os.environ.get("QAT_LLAMA_CPP_SOURCE", "")  # llama.cpp's own files, with convert_hf_to_gguf.py
HERE = Path(__file__).parent
needs_engine = pytest.mark.skipif(not PYTHON, reason="make test-llama-cpp builds llama.cpp")
needs_converter = pytest.mark.skipif(not CONVERTER, reason="make test-llama-cpp fetches llama.cpp's converter")
ALL = "re:.*(_proj|experts.*)"
REST = {"match": "*", "skip": "the rest"}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
OWN = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type", "qat.record"}


def export(root: Path, kind: str, weight: str, tables: bool, trained: bool = True, **config: object) -> Path:
    source = tiny_model(kind, root / f"{kind}-{weight}", **config)
    table = {"match": "re:lm_head|.*embed_tokens", "weight": "q8_0"}
    rules = [{"match": ALL, "weight": weight}, table if tables else REST]
    if trained:
        model = quantized(source, rules, round_bf16=False, tied="share")
    else:
        model = load_model(source).eval()
        apply(model, Scheme.model_validate({"rules": rules, "learn": "none", "init": (), "round_bf16": False}))
    return quiet_export(model, source, root / f"{kind}-{weight}.gguf", "gguf")


def in_float32(file: Path, out: Path) -> Path:
    """The same file with every tensor as the gguf package dequantizes it."""
    reader = GGUFReader(file)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name in OWN or name == "general.architecture":
            continue
        if field.types[0] is GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in tensor.shape[::-1]]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def llama_cpp(root: Path, files: list[Path]) -> list[Tensor]:
    np.save(root / "ids.npy", ids().numpy())
    command = [PYTHON, HERE / "llama_cpp_logits.py", root / "ids.npy", root, *files]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return [torch.from_numpy(np.load(root / f"{file.stem}.npy")) for file in files]


def ours(file: Path, inputs: bool) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_file(file, inputs)(ids()).logits
    return logits


@needs_engine
def test_dequantized_weights_give_our_logits(tmp_path: Path) -> None:
    """Names, order of rows, settings: everything but the rounding of inputs."""
    files = [export(tmp_path, kind, "q4_0", tables=False) for kind in KINDS]
    plain = [in_float32(file, tmp_path / f"{file.stem}-f32.gguf") for file in files]
    for file, theirs in zip(files, llama_cpp(tmp_path, plain), strict=True):
        own = ours(file, False)
        assert torch.equal(own.argmax(-1), theirs.argmax(-1)), file.name
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-4)


@needs_engine
def test_the_rule_is_what_its_products_do(tmp_path: Path) -> None:
    """In one layer, most positions agree to the last bits of float32, until somewhere a value near the middle of two
    codes falls to the other side; without the rule none does."""
    formats = ("q4_0", "q5_0", "q8_0", "mxfp4")
    files = [export(tmp_path, "llama", weight, tables=True, num_hidden_layers=1) for weight in formats]
    for file, theirs in zip(files, llama_cpp(tmp_path, files), strict=True):
        apart, plain = ((ours(file, inputs) - theirs).abs().amax(-1) for inputs in (True, False))
        assert float((apart < 1e-5).float().mean()) > 0.2 and float(plain.min()) > 1e-3, file.name
        assert float(apart.mean()) < 0.7 * float(plain.mean()), file.name


def in_256(x: Tensor) -> Tensor:
    """quantize_row_q8_K of ggml: INT8 per 256, the number of largest magnitude at -127."""
    blocks = x.unflatten(-1, (-1, 256))
    inverse = -127 / blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    return ((inverse * blocks).round() * (1 / inverse)).flatten(-2)


@needs_engine
def test_super_blocks_are_multiplied_with_inputs_rounded_per_256(tmp_path: Path) -> None:
    """Its own kernels unpack them as we do: with that rounding most positions agree to the last bits of float32."""
    formats = ("q4_k", "q5_k", "q6_k")
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 1}
    files = [export(tmp_path, "llama", weight, tables=False, **wide) for weight in formats]
    for file, theirs in zip(files, llama_cpp(tmp_path, files), strict=True):
        model = load_file(file)
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, args: (in_256(args[0]),))
            if name == "lm_head":  # BF16 weights
                module.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(),))
        with torch.no_grad():
            apart = (model(ids()).logits - theirs).abs().amax(-1)
        plain = (ours(file, False) - theirs).abs().amax(-1)
        assert float((apart < 1e-5).float().mean()) > 0.2 and float(plain.min()) > 1e-3, file.name
        assert float(apart.mean()) < 0.7 * float(plain.mean()), file.name


@needs_converter
@pytest.mark.parametrize("kind", [*KINDS, "llama3"])
def test_keys_and_unquantized_tensors_are_the_converters(kind: str, tmp_path: Path) -> None:
    config: dict[str, object] = {}
    if kind == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        config["rope_parameters"] = rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    kind = "llama" if kind == "llama3" else kind
    file = export(tmp_path, kind, "q4_0", tables=False, trained=False, **config)
    out = tmp_path / "theirs.gguf"
    command = [sys.executable, HERE / "llama_cpp_convert.py", CONVERTER, tmp_path / f"{kind}-q4_0", out]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found, wanted = GGUFReader(file), GGUFReader(out)
    mine, theirs = ({k: f.contents() for k, f in r.fields.items() if k not in OWN} for r in (found, wanted))
    assert mine.pop("tokenizer.ggml.add_bos_token") is False  # said where the converter leaves it to llama.cpp
    assert mine == theirs
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in wanted.tensors]
    compared = 0
    for own, other in zip(found.tensors, wanted.tensors, strict=True):
        assert own.shape.tolist() == other.shape.tolist()
        values = [gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in (own, other)]
        if own.tensor_type == other.tensor_type:
            assert np.array_equal(*values), own.name
            compared += 1
        else:
            assert np.square(values[0] - values[1]).sum() < 0.01 * np.square(values[1]).sum(), own.name
    assert compared >= 7
