"""Our GGUF files inside llama.cpp itself, and beside what its own converter writes of the same models. Needs the
environment of `make test-llama-cpp`, where llama-cpp-python and llama.cpp's converter are; elsewhere it skips."""

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor, nn

from qat.checkpoints.hf import load_model, load_tokenizer
from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.layouts.gguf.read import GgufFile, above_of
from qat.checkpoints.layouts.gguf.types import FORMATS
from qat.cli import main
from qat.engines import llama_cpp as llama_cpp_engine
from qat.errors import ConfigError
from qat.numbers.catalog import CATALOG
from qat.scheme import Scheme
from qat.surgery import apply
from qat.training.activations import fake_quantize_input, llama_cpp_input
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.checkpoints.sentencepieces import sentencepiece_files
from tests.tiny import tiny_model, tiny_tokenizer

PYTHON = os.environ.get("QAT_LLAMA_CPP_PYTHON", "")  # has llama_cpp
CONVERTER = os.environ.get("QAT_LLAMA_CPP_SOURCE", "")  # llama.cpp's own files, with convert_hf_to_gguf.py
HERE = Path(__file__).parent
needs_engine = pytest.mark.skipif(not PYTHON, reason="make test-llama-cpp builds llama.cpp")
needs_converter = pytest.mark.skipif(not CONVERTER, reason="make test-llama-cpp fetches llama.cpp's converter")
ALL = "re:.*(_proj|experts.*)"
REST = {"match": "*", "skip": "the rest"}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
PERIOD = [*["sliding_attention"] * 5, "full_attention"]
GEMMAS: dict[str, dict[str, object]] = {
    "gemma2": {},
    "gemma": {"num_hidden_layers": 6, "layer_types": PERIOD, "sliding_window": 16},
}
OWN = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type", "qat.record"}


def export(
    root: Path, kind: str, weight: str, tables: bool, trained: bool = True, pieces: bool = False, **config: object
) -> Path:
    source = tiny_model(kind, root / f"{kind}-{weight}", **config)
    if pieces:
        sentencepiece_files(source, prefix=not kind.startswith("gemma"))
    table = {"match": "re:lm_head|.*embed_tokens", "weight": "q8_0"}
    rules = [{"match": ALL, "weight": weight}, table if tables else REST]
    if not trained:
        return untrained(source, rules)
    model = quantized(source, [*rules, REST] if tables else rules, round_bf16=False, tied="share")
    return quiet_export(model, source, root / f"{kind}-{weight}.gguf", "gguf")


def untrained(source: Path, rules: list[dict[str, str]]) -> Path:
    """The export of the model in a folder, beside it, with what is not quantized as it is there."""
    model = load_model(source).eval()
    apply(model, Scheme.model_validate({"rules": rules, "learn": "none", "init": (), "round_bf16": False}))
    return quiet_export(model, source, source.with_suffix(".gguf"), "gguf")


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


def run(script: str, root: Path, files: list[Path], rows: Tensor | None = None) -> None:
    np.save(root / "ids.npy", (ids() if rows is None else rows).numpy())
    command = [PYTHON, HERE / script, root / "ids.npy", root, *files]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def llama_cpp(root: Path, files: list[Path], rows: Tensor | None = None) -> list[Tensor]:
    run("llama_cpp_logits.py", root, files, rows)
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


class InFp16(nn.Module):
    """GELU as llama.cpp looks it up: of an FP16 number, in FP16."""

    def forward(self, x: Tensor) -> Tensor:
        table = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@needs_engine
@pytest.mark.parametrize("kind", GEMMAS)
def test_gemma_is_ours_but_for_the_table_of_its_activation(kind: str, tmp_path: Path) -> None:
    file = export(tmp_path, kind, "q4_0", tables=False, **GEMMAS[kind])
    (theirs,) = llama_cpp(tmp_path, [in_float32(file, tmp_path / "f32.gguf")])
    model = load_file(file)
    with torch.no_grad():
        exact = model(ids()).logits
        for layer in model.model.layers:
            layer.mlp.act_fn = InFp16()
        looked_up = model(ids()).logits
    assert torch.equal(exact.argmax(-1), theirs.argmax(-1))
    before, after = ((each - theirs).abs() for each in (exact, looked_up))
    assert float((after < 2e-4).float().mean()) > 0.95 > float((before < 2e-4).float().mean())
    assert float(after.max()) < 1e-3  # of numbers that fall to the other side of one of FP16


WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 1}


@needs_engine
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "phi3", "llama of super-blocks"])
def test_every_product_follows_the_rule(kind: str, tmp_path: Path) -> None:
    """Of llama.cpp's own inputs, each product is that of our rule, in every row, up to how float32 sums are ordered;
    discrete tables make exact ties of the first inputs. Without the rule no row is."""
    wide = kind.endswith("super-blocks")
    formats = ("q4_k", "q5_k", "q6_k") if wide else ("q4_0", "q5_0", "q8_0", "mxfp4", "nvfp4")
    if kind == "phi3":
        formats = formats[:-1]  # of NVFP4 it leaves scales out
    files = [export(tmp_path, kind.split()[0], each, tables=True, **(WIDE if wide else {})) for each in formats]
    run("llama_cpp_products.py", tmp_path, files)
    for path in files:
        file, seen = GgufFile(path), np.load(tmp_path / f"{path.stem}-products.npz")
        names = [name.removesuffix(":in") for name in seen.files if name.endswith(":in")]
        quantized = [name for name in names if file.stored(name).tensor_type in FORMATS]
        assert len(quantized) == {"llama": 15, "qwen3_moe": 9, "phi3": 9}.get(kind, 8), names
        for name in quantized:
            x, theirs = (torch.from_numpy(seen[f"{name}:{end}"]) for end in ("in", "out"))
            tensor = file.stored(name)
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            fmt = llama_cpp_input(FORMATS[tensor.tensor_type])
            rule = fake_quantize_input(x, fmt, "llama_cpp", "ste", None)
            apart, plain = (
                (each.double() @ weight.double().T - theirs).abs().amax(-1) / theirs.abs().amax(-1)
                for each in (rule, x)
            )
            assert float(apart.max()) < 2e-6 and float(plain.min()) > 1e-5, (path.name, name)


@needs_engine
def test_inputs_are_rounded_as_llama_cpps_own_library_does() -> None:
    """Both of its ways to round to Q8_K: rows by themselves, and four at a time for weights that it interleaves."""
    folder = next(Path(PYTHON).parents[1].glob("lib/python*/site-packages/llama_cpp/lib"))
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=seed) * torch.logspace(-30, 4, 64)[:, None]
    x[3, 256:] = 0.0
    near = torch.randint(-127, 128, (512, 256), generator=seed) * torch.rand(512, 1, generator=seed)
    for each in (x, near, near.to(torch.bfloat16).float()):
        ours = fake_quantize_input(each, CATALOG["q8_k"], "llama_cpp", "ste", None)
        blocks = each.numel() // 256
        for library, rounds in ((base, "quantize_row_q8_K_ref"), (cpu, "quantize_row_q8_K")):
            raw, theirs = np.zeros((blocks, 292), dtype=np.uint8), torch.empty_like(each)
            count = ctypes.c_int64(each.numel())
            getattr(library, rounds)(ctypes.c_void_p(each.data_ptr()), raw.ctypes.data_as(ctypes.c_void_p), count)
            base.dequantize_row_q8_K(raw.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(theirs.data_ptr()), count)
            assert torch.equal(ours, theirs), rounds
        for four, wanted in zip(each.split(4), ours.split(4), strict=True):
            raw = np.zeros((four.shape[1] // 256, 4 * 292), dtype=np.uint8)
            pointers = (ctypes.c_void_p(four.data_ptr()), raw.ctypes.data_as(ctypes.c_void_p))
            cpu.ggml_quantize_mat_q8_K_4x8(*pointers, ctypes.c_int64(four.shape[1]))
            scales = raw[:, :16].copy().view(np.float32)  # of each of the four rows
            codes = raw[:, 16 : 16 + 1024].view(np.int8).reshape(-1, 32, 4, 8).transpose(2, 0, 1, 3)
            values = codes.reshape(4, -1, 256).astype(np.float32) * scales.T[:, :, None]
            assert np.array_equal(values.reshape(four.shape), wanted.numpy())


@needs_converter
@pytest.mark.parametrize(
    "kind", [*KINDS, "llama3", "llama of pieces", "mistral of pieces", "gemma2 of pieces", "gemma of pieces"]
)
def test_keys_and_unquantized_tensors_are_the_converters(kind: str, tmp_path: Path) -> None:
    config: dict[str, object] = {**GEMMAS.get(kind.split()[0], {})}
    if kind == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        config["rope_parameters"] = rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    kind, _, pieces = ("llama" if kind == "llama3" else kind).partition(" of ")
    file = export(tmp_path, kind, "q4_0", tables=False, trained=False, pieces=bool(pieces), **config)
    assert_converted(file, tmp_path / f"{kind}-q4_0", bool(pieces))


def assert_converted(file: Path, source: Path, pieces: bool) -> None:
    """Keys and tensors of an export are those of llama.cpp's converter, but for codes that are chosen otherwise."""
    out = file.with_name("theirs.gguf")
    command = [sys.executable, HERE / "llama_cpp_convert.py", CONVERTER, source, out]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found, wanted = GGUFReader(file), GGUFReader(out)
    mine, theirs = ({k: f.contents() for k, f in r.fields.items() if k not in OWN} for r in (found, wanted))
    if not pieces:  # said where the converter leaves it to llama.cpp
        assert mine.pop("tokenizer.ggml.add_bos_token") is False
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


@needs_converter
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_nvfp4_is_what_the_converter_makes_of_another_export(kind: str, tmp_path: Path) -> None:
    """Byte by byte, with the scales above: from the same model as modelopt's folder has it."""
    source = tiny_model(kind, tmp_path / "source")
    model = quantized(source, [{"match": ALL, "weight": "nvfp4"}, REST])
    file = GgufFile(quiet_export(model, source, tmp_path / "ours.gguf", "gguf"))
    folder = quiet_export(model, source, tmp_path / "folder", "modelopt")
    command = [sys.executable, HERE / "llama_cpp_convert.py", CONVERTER, folder, tmp_path / "theirs.gguf"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    other = GgufFile(tmp_path / "theirs.gguf")
    names = [name for name, tensor in file.tensors.items() if tensor.tensor_type.name == "NVFP4"]
    assert len(names) == 14
    for name in [*names, *(above_of(name) for name in names)]:
        own, theirs = file.stored(name), other.stored(name)
        assert own.tensor_type == theirs.tensor_type and np.array_equal(own.data, theirs.data), name
    assert file.facts["general.file_type"] == other.facts["general.file_type"]


@needs_engine
def test_nvfp4_inside_llama_cpp_has_our_logits(tmp_path: Path) -> None:
    """With the scales above as llama.cpp multiplies with them, after its products; weights in float32 below."""
    files = [export(tmp_path, kind, "nvfp4", tables=False) for kind in ("llama", "qwen3", "qwen3_moe")]
    plain = [in_float32(file, tmp_path / f"{file.stem}-f32.gguf") for file in files]
    for file, theirs in zip(files, llama_cpp(tmp_path, plain), strict=True):
        own = ours(file, False)
        assert torch.equal(own.argmax(-1), theirs.argmax(-1)), file.name
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-4)


@needs_engine
def test_pieces_are_joined_as_transformers_joins_them(tmp_path: Path) -> None:
    file = export(tmp_path, "llama", "q4_0", tables=False, pieces=True)
    texts = [
        "The quick brown fox, 345 (jumps)",
        " over  two spaces\n",
        "h\u00e9llo \U0001f600 training",
        "x" * 20 + "ing the dog",
    ]
    program = (
        "import json, sys; from llama_cpp import Llama; m = Llama(sys.argv[1], vocab_only=True, verbose=False); "
        "print(json.dumps([m.tokenize(t.encode(), add_bos=True) for t in json.loads(sys.argv[2])]))"
    )
    words = [PYTHON, "-c", program, str(file), json.dumps(texts)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    tokenizer = load_tokenizer(tmp_path / "llama-q4_0")
    assert json.loads(done.stdout) == [tokenizer(text)["input_ids"] for text in texts]


# --- generate and serve -----------------------------------------------------------------------------


def command(*words: object) -> tuple[list[str], dict[str, str]]:
    """`qat ...` where llama-cpp-python is: its environment's packages come before ours."""
    (site,) = Path(PYTHON).parent.parent.glob("lib/python*/site-packages")
    paths = {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{site}"}
    return [sys.executable, "-m", "qat.cli", *map(str, words)], {**os.environ, **paths}


def test_llama_cpp_is_chosen_where_it_can_write(tmp_path: Path) -> None:
    file, folder = tmp_path / "model.gguf", tmp_path / "model"
    assert not llama_cpp_engine.chosen(folder, "auto", []) and not llama_cpp_engine.chosen(file, "qat", [])
    assert llama_cpp_engine.chosen(file, "llama.cpp", [])
    assert llama_cpp_engine.chosen(file, "auto", []) == llama_cpp_engine.installed()
    assert not llama_cpp_engine.chosen(file, "auto", ["--dense"])
    with pytest.raises(ConfigError, match=r"--engine llama\.cpp reads \.gguf files, but .*model is none"):
        llama_cpp_engine.chosen(folder, "llama.cpp", [])
    with pytest.raises(ConfigError, match=r"--dense and --device cannot be given with --engine llama\.cpp"):
        llama_cpp_engine.chosen(file, "llama.cpp", ["--dense", "--device"])


@pytest.mark.skipif(llama_cpp_engine.installed(), reason="llama-cpp-python is installed")
def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").touch()
    assert main(["generate", str(tmp_path / "model.gguf"), "Hello", "--engine", "llama.cpp"]) == 2
    assert "needs it: pip install llama-cpp-python" in capsys.readouterr().err


@needs_engine
def test_it_writes_what_is_likeliest(tmp_path: Path) -> None:
    file, prompt = export(tmp_path, "llama", "q4_0", tables=True), "In 1984, they said"
    into, where = command("generate", file, prompt, "--tokens", 3)
    done = subprocess.run(into, env=where, capture_output=True, text=True, check=True)
    assert "llama.cpp writes (llama-cpp-python 0.3." in done.stderr and "3 tokens in " in done.stderr
    tokenizer = tiny_tokenizer()
    rows = tokenizer(prompt)["input_ids"]
    for _ in range(3):
        (logits,) = llama_cpp(tmp_path, [file], torch.tensor([rows]))
        rows.append(int(logits[0, -1].argmax()))
    assert done.stdout == tokenizer.decode(rows) + "\n"
    whole = file.read_bytes()
    for cut, said in ((len(whole) - 64, "llama.cpp does not load"), (3000, "is truncated or damaged")):
        file.write_bytes(whole[:cut])
        broken = subprocess.run(into, env=where, capture_output=True, text=True, check=False)
        assert broken.returncode == 2 and said in broken.stderr and "Traceback" not in broken.stderr


@needs_engine
def test_its_server_answers(tmp_path: Path) -> None:
    file = export(tmp_path, "llama", "q4_0", tables=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    into, where = command("serve", file, "--engine", "llama.cpp", "--port", port, "--served-model-name", "mine")
    question = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(question).encode(),
        {"content-type": "application/json"},
    )
    with (tmp_path / "log").open("w") as log, subprocess.Popen(into, env=where, stderr=log, stdout=log) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(urllib.error.URLError):
                    answer = json.load(urllib.request.urlopen(request, timeout=60))
                    break
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(1)
        finally:
            server.terminate()
    assert answer["model"] == "mine" and answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 4
