"""Exports served by transformers with packed weights: equal to our dense reading of the same files, opt-in and
reversible, small in memory, and bad checkpoints refused by the tensor's name."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, pipeline
from transformers.quantizers import auto

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.cli import main
from qat.engines.transformers import PackedConfig, install, installed, load_packed, uninstall
from qat.errors import CheckpointError, QatError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.serving.matmul import QuantizedLinear
from qat.serving.matmul import problem as pair_problem
from qat.serving.packed import PackedLinear
from tests.checkpoints.exports import Pair, export_pair, ids, mixed_rules, pair_rules, quantized, quiet_export
from tests.kernels.processes import in_a_process
from tests.tiny import tiny_model

HELD_DENSE = ("int3_", "mxfp6", "fp8_b128")
PAIRS = [pair for pair in pairs(ROWS) if not pair[0].startswith(HELD_DENSE)]
CHUNKS = [PAIRS[i : i + 8] for i in range(0, len(PAIRS), 8)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def int4(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    export_pair(small, out, ("int4_g64", None))
    return out


def logits(model: torch.nn.Module, tokens: int = 48) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(tokens), use_cache=False).logits
    return found.float()


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: "+".join("/".join(map(str, pair)) for pair in chunk))
@pytest.mark.usefixtures("library_sums")
def test_packed_is_dense(chunk: list[Pair], llama: Path, tmp_path: Path) -> None:
    """48 tokens go through dense slices: the very same products, whatever quantizes the inputs."""
    out = quiet_export(quantized(llama, [*mixed_rules(chunk), {"match": "*", "skip": "rest"}]), llama, tmp_path / "out")
    packed, dense = load_packed(out, torch.bfloat16), load_exported(out, dtype=torch.bfloat16)
    assert any(isinstance(layer, PackedLinear) for layer in packed.modules())
    assert torch.equal(logits(packed), logits(dense))


CODES = [pair for pair in pairs(ROWS) if pair[1] and pair_problem(lookup(pair[1]), lookup(pair[0])) is None]


@pytest.mark.parametrize("chunk", [CODES[i : i + 8] for i in range(0, len(CODES), 8)], ids=lambda chunk: chunk[0][0])
def test_layers_that_multiply_codes(
    chunk: list[Pair], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, by the reference operators: each product is the one of rounded inputs, in another order."""
    out = quiet_export(quantized(llama, [*mixed_rules(chunk), {"match": "*", "skip": "rest"}]), llama, tmp_path / "out")
    rounded = load_exported(out)
    monkeypatch.setattr(
        "qat.engines.transformers.multiplies_codes",
        lambda input, weight: pair_problem(input, weight.format) is None,
    )
    coded, seen = load_packed(out, torch.float32), 0
    for path, layer in coded.named_modules():
        if isinstance(layer, QuantizedLinear):
            x, dense = torch.randn(3, layer.in_features), rounded.get_submodule(path)
            expected = dense(x).detach()
            # The dense model's weights are rounded to BF16, the codes' are not.
            torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
            seen += 1
    assert seen >= len(chunk)
    assert bool(torch.isfinite(logits(coded)).all())


def test_triton_kernels_serve_a_model(small: Path, tmp_path: Path) -> None:
    """Interpreted; weight-only layers multiply packed weights, the others codes, as on a GPU."""
    served = (("int4_g64", None), ("nvfp4", "nvfp4"), ("int4_g64", "int8_token"), ("mxfp4", "fp8_token"))
    folders = [tmp_path / f"{weight}-{input}" for weight, input in served]
    for folder, pair in zip(folders, served, strict=True):
        export_pair(small, folder, pair)
    told = in_a_process(
        Path(__file__).with_name("interpret_engine.py"), *map(str, folders), TRITON_INTERPRET="1", QAT_KERNELS="0"
    )
    for folder, (_, input) in zip(folders, served, strict=True):
        layers = "0 packed, 7 multiplied" if input else "7 packed, 0 multiplied"
        assert f"{folder.name}: {layers} by codes" in told


def test_every_token_agrees_where_weights_are_exact_in_bf16(small: Path, tmp_path: Path) -> None:
    export_pair(small, tmp_path / "out", ("nvfp4", None))
    packed, dense = load_packed(tmp_path / "out", torch.float32), load_exported(tmp_path / "out")
    for tokens in (1, 5, 48):
        torch.testing.assert_close(logits(packed, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(ids(5), **options), dense.generate(ids(5), **options))


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma"])
@pytest.mark.usefixtures("library_sums")
def test_architectures(kind: str, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path / "source", num_hidden_layers=2)
    export_pair(source, tmp_path / "out", ("int4_g32", "int8_token"))
    packed, dense = load_packed(tmp_path / "out", torch.bfloat16), load_exported(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(packed), logits(dense))


def test_installing_is_reversible(int4: Path) -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    install()
    install()
    try:
        model = AutoModelForCausalLM.from_pretrained(int4)
        assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear) and not model.training
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(int4.parent / "again")
        assert model.config.to_dict()["quantization_config"]["format"] == "pack-quantized"
    finally:
        uninstall()
    assert before == (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    with installed():
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is PackedConfig
    plain = AutoModelForCausalLM.from_pretrained(int4)
    assert not any(isinstance(layer, PackedLinear) for layer in plain.modules())


def test_other_ways_to_quantize_go_on(small: Path) -> None:
    with installed():
        model = AutoModelForCausalLM.from_pretrained(small, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())


def test_a_plain_call_needs_no_context(int4: Path) -> None:
    model = load_packed(int4, torch.float32)
    assert next(model.parameters()).requires_grad and torch.is_grad_enabled()
    found = model(ids(12)).logits
    assert torch.equal(found.detach(), logits(model, 12))
    with pytest.raises(UnsupportedError, match="packed weights are for inference"):
        found.sum().backward()


def test_a_model_can_be_copied(int4: Path) -> None:
    model = load_packed(int4, torch.float32)
    expected, other = logits(model), copy.deepcopy(model)
    del model
    assert torch.equal(logits(other), expected)


def test_a_pipeline_runs_on_it(int4: Path) -> None:
    with installed():
        generate = pipeline("text-generation", model=str(int4), device="cpu")
    found = generate("The fox", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found.startswith("The fox") and isinstance(generate.model.model.layers[0].mlp.up_proj, PackedLinear)


def test_weights_stay_packed(int4: Path) -> None:
    model = load_packed(int4, torch.bfloat16)
    logits(model)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 7
    for layer in layers:
        assert layer.packed.nbytes / (layer.in_features * layer.out_features) == 0.5 + 2 / 64
    assert not [name for name, _ in model.named_parameters() if "_proj" in name]


def test_formats_that_cannot_be_packed_are_named(small: Path, tmp_path: Path) -> None:
    export_pair(small, tmp_path / "out", ("int3_g64", None))
    with pytest.warns(UserWarning, match="and 6 more: int3_g64 weights are dense, no faster than BF16: codes of 3"):
        packed = load_packed(tmp_path / "out", torch.bfloat16)
    assert torch.equal(logits(packed), logits(load_exported(tmp_path / "out", dtype=torch.bfloat16)))


def test_without_a_compiler_the_slow_path_is_named(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.engines.transformers.load", list)
    monkeypatch.setattr("qat.engines.transformers.cpu_problem", lambda: "no C compiler found")
    with pytest.warns(UserWarning, match="on cpu, weights are dequantized at every call, slower than BF16: no C comp"):
        load_packed(int4)


# --- bad checkpoints ------------------------------------------------------------------------------

SCALE = "model.layers.0.mlp.up_proj.weight_scale"
PACKED = "model.layers.0.mlp.up_proj.weight_packed"


def broken(int4: Path, out: Path, **changes: Tensor | None) -> Path:
    out.mkdir()
    for path in int4.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(int4 / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALE: torch.zeros(256, 2, dtype=torch.bfloat16)}, SCALE + " must be finite and positive"),
        ({SCALE: torch.full((256, 2), torch.inf, dtype=torch.bfloat16)}, SCALE + " must be finite and positive"),
        ({SCALE: torch.ones(256, 3, dtype=torch.bfloat16)}, SCALE + r" is \[256, 3\]"),
        ({PACKED: None}, "up_proj.weight_packed is missing"),
        ({PACKED: torch.zeros(256, 9, dtype=torch.int32)}, r"up_proj: its codes are \[256, 72\]|does not fit"),
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}, "model.norm.weight"),
    ],
)
def test_bad_tensors_are_named(changes: dict[str, Tensor | None], message: str, int4: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_packed(broken(int4, tmp_path / "broken", **changes))


def test_codes_that_are_no_number_are_named(small: Path, tmp_path: Path) -> None:
    export_pair(small, tmp_path / "out", ("mxfp8", None))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(tmp_path / "out" / "model.safetensors")[name].clone()
    weight.view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj: mxfp8: 1 codes are NaN"):
        load_packed(broken(tmp_path / "out", tmp_path / "broken", **{name: weight}))


V_PROJ = "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALE: None}, "mlp.up_proj.weight(_scale)? is missing"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({f"{V_PROJ}.weight_g_idx": torch.arange(128)}, f"{V_PROJ}.weight_g_idx belongs to a quantized layer"),
    ],
)
def test_every_road_refuses_other_tensors(
    changes: dict[str, Tensor | None], message: str, int4: Path, tmp_path: Path
) -> None:
    """Plain transformers, which `qat serve` loads with, would make missing tensors up and drop unknown ones."""
    folder = broken(int4, tmp_path / "broken", **changes)
    with installed(), pytest.raises(QatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_layers_of_another_size_are_refused(int4: Path, tmp_path: Path) -> None:
    tensors = load_file(int4 / "model.safetensors")
    halved = {f"{V_PROJ}.{key}": tensors[f"{V_PROJ}.{key}"][:32].clone() for key in ("weight_packed", "weight_scale")}
    halved[f"{V_PROJ}.weight_shape"] = torch.tensor([32, 128])
    with pytest.raises(
        CheckpointError, match=r"v_proj.weight is stored as \[32, 128\], config.json asks for \[64, 128\]"
    ):
        load_packed(broken(int4, tmp_path / "broken", **halved))


def test_a_folder_without_weights_is_refused_in_a_line(int4: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(int4, tmp_path / "empty")
    for file in (tmp_path / "empty").glob("*.safetensors*"):
        file.unlink()
    for command in (["generate", str(tmp_path / "empty"), "a"], ["serve", str(tmp_path / "empty")]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "safetensors" in told and "Traceback" not in told


def test_truncated_files_and_other_checkpoints_are_refused(int4: Path, tmp_path: Path) -> None:
    out = broken(int4, tmp_path / "short")
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(QatError, match=r"model\.safetensors"):
        load_packed(out)
    config = json.loads((int4 / "config.json").read_text())
    out = broken(int4, tmp_path / "other")
    config["quantization_config"]["quantization_status"] = "frozen"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_status: compressed"):
        load_packed(out)


def test_experts_quantized_in_part_are_refused(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", num_hidden_layers=1)
    model = quantized(
        source, [pair_rules("fp8_channel", "fp8_token", "*self_attn*_proj"), {"match": "*", "skip": "the rest"}]
    )
    quiet_export(model, source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_packed(tmp_path / "out")  # the experts stay BF16: nothing to refuse
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    weight = tensors[name].float()
    tensors[name] = weight.to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(weight.shape[0], 1, dtype=torch.bfloat16)
    config["quantization_config"]["ignore"].remove(name.removesuffix(".weight"))
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=r"0\.down_proj\.weight is dense, but other experts of its layer are quantized"
    ):
        load_packed(tmp_path / "out")


def test_experts_that_cannot_be_packed_are_named(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", num_hidden_layers=1)
    model = quantized(source, [pair_rules("int3_g32", None, "*.experts.*"), {"match": "*", "skip": "the rest"}])
    quiet_export(model, source, tmp_path / "out")
    with pytest.warns(UserWarning, match=r"experts\.\d.*int3_g32 weights are dense, no faster than BF16"):
        load_packed(tmp_path / "out")
