"""Packed checkpoints as models to train: the unpacked model, put at the stored scales, computes what the checkpoint
does, whoever wrote it."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints import packed
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import ModelConfig, load_model, resolve
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, Scales
from qat.scheme import Scheme
from qat.sites import sites, weights
from qat.surgery import apply
from tests.checkpoints.exports import Pair, edit, export_pair, ids, pair_rules, quantized, quiet_export, rewrite
from tests.checkpoints.layouts.test_mxfp4 import EXPERTS, GPT_OSS
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "the rest"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("source"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))


def begun(folder: Path, pair: Pair, match: str = "*_proj", **scheme: Any) -> Any:
    """The student that training begins with, from a packed checkpoint."""
    unpacked = resolve(ModelConfig(id=str(folder)))
    found = packed.read(unpacked)
    assert found is not None
    rules = Scheme(rules=[pair_rules(*pair, match), REST], **{"init": (), **scheme})
    model: Any = apply(load_model(unpacked), rules, defer_init=True)
    assert found.put(model) == []
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids()).logits
    return result


@pytest.mark.parametrize(
    ("pair", "target"),
    [
        (("nvfp4", "nvfp4"), "compressed-tensors"),
        (("nvfp4", "nvfp4"), "modelopt"),
        (("nvfp4", None), "compressed-tensors"),
        (("mxfp4", None), "compressed-tensors"),
        (("int4_g32", None), "compressed-tensors"),
        (("int4_g32_asym", None), "compressed-tensors"),
        (("int8_channel", "int8_token"), "compressed-tensors"),
        (("fp8_tensor", "fp8_tensor"), "compressed-tensors"),
    ],
)
def test_training_begins_at_our_export_bit_for_bit(pair: Pair, target: str, source: Path, tmp_path: Path) -> None:
    trained = export_pair(source, tmp_path / "export", pair, target)
    static = pair[1] in ("nvfp4", "fp8_tensor")
    weight = "fp8_channel" if pair[0] == "fp8_tensor" else pair[0]  # one scale per tensor is held once per row
    model = begun(tmp_path / "export", (weight, pair[1]))
    served = load_exported(tmp_path / "export")
    assert torch.equal(logits(model), logits(served))
    for path, site in weights(model).items():
        before = weights(trained)[path]
        assert torch.equal(site.quantizer.quantize(site.weight).codes, before.quantizer.quantize(before.weight).codes)
        assert not static or torch.equal(site.input.static(), before.input.static())


def test_it_is_exported_as_it_was(source: Path, tmp_path: Path) -> None:
    export_pair(source, tmp_path / "one", ("nvfp4", "nvfp4"))
    model = begun(tmp_path / "one", ("nvfp4", "nvfp4"))
    quiet_export(model, resolve(ModelConfig(id=str(tmp_path / "one"))), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)
    assert verify(tmp_path / "two").ok


def test_it_is_unpacked_once_and_again_when_it_changes(source: Path, tmp_path: Path) -> None:
    export_pair(source, tmp_path / "export", ("int4_g32", None))
    config = ModelConfig(id=str(tmp_path / "export"))
    first = resolve(config)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(config) == first and (first / "model.safetensors").stat().st_mtime_ns == made
    assert (first / "tokenizer.json").is_file() and not (first / "qat.json").exists()
    shutil.copytree(tmp_path / "export", tmp_path / "moved" / "export")
    assert resolve(ModelConfig(id=str(tmp_path / "moved" / "export"))) == first
    rewrite(tmp_path / "export", lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert resolve(config) != first


# --- other tools ----------------------------------------------------------------------------------


def by_the_library(source: Path, out: Path, name: str, targets: str, **weights_args: Any) -> Path:
    """Packed by compressed-tensors' own compressor, with scales as llm-compressor chooses them."""
    pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(symmetric=True, **weights_args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    dense, stored = load_file(source / "model.safetensors"), {}
    compressor = BaseCompressor.get_value_from_registry(name)
    for key, tensor in dense.items():
        path = key.removesuffix(".weight")
        if targets not in key or tensor.dim() != 2:
            stored[key] = tensor
            continue
        blocks = tensor.float().unflatten(1, (-1, args.group_size))
        amax = blocks.abs().amax(-1)
        given: dict[str, Tensor] = {"weight": tensor}
        if name.startswith("nvfp4"):
            divisor = 448 * 6 / tensor.float().abs().amax().reshape(1)
            given["weight_global_scale"] = divisor
            given["weight_scale"] = (amax / 6 * divisor).to(torch.float8_e4m3fn).float()  # which it rounds again
        else:
            given["weight_scale"] = (amax / 7.5).to(torch.bfloat16)
        made = compressor.compress(given, scheme)
        stored |= {f"{path}.{part}": value.contiguous() for part, value in made.items()}
    shutil.copytree(source, out)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    ignore = [k.removesuffix(".weight") for k, t in dense.items() if t.dim() == 2 and targets not in k]
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
    edit(out, lambda config: config.update(quantization_config=quantization))
    return out


def test_nvfp4_of_the_library_with_any_global_scale(source: Path, tmp_path: Path) -> None:
    folder = by_the_library(
        source, tmp_path / "theirs", "nvfp4-pack-quantized", "_proj", num_bits=4, type="float", strategy="tensor_group",
        group_size=16,
    )  # fmt: skip
    model = begun(folder, ("nvfp4", None))
    above = weights(model)["model.layers.0.mlp.down_proj"].quantizer.global_scale
    assert float(above.log2()) % 1  # no power of two
    assert torch.equal(logits(model), logits(load_exported(folder)))


INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def test_int4_of_the_library_down_to_its_lowest_code(source: Path, tmp_path: Path) -> None:
    """Its scale is amax / 7.5, so that -8 occurs, which symmetric formats here do not round to."""
    folder = by_the_library(source, tmp_path / "theirs", "pack-quantized", "_proj", **INT4)
    model = begun(folder, ("int4_g32_asym", None))
    assert torch.equal(logits(model), logits(load_exported(folder)))
    codes = torch.cat([s.quantizer.quantize(s.weight).codes.flatten() for s in weights(model).values()])
    assert bool((codes == 8).any())
    assert not any(bool(site.quantizer.zero_point.any()) for site in weights(model).values())


def test_int4_on_experts_only(tmp_path: Path) -> None:
    """As Kimi K2 is published: experts in groups of 32, one matrix each in the file, all else dense."""
    dense = tiny_model("qwen3_moe", tmp_path / "dense", num_hidden_layers=1)
    folder = by_the_library(dense, tmp_path / "theirs", "pack-quantized", ".experts.", **INT4)
    model = begun(folder, ("int4_g32_asym", None), "*.experts.*")
    assert {site.slot for site in sites(model, "weight")} == {"gate_up_proj", "down_proj"}
    assert torch.equal(logits(model), logits(load_exported(folder)))
    quiet_export(model, resolve(ModelConfig(id=str(folder))), tmp_path / "again")
    assert torch.equal(logits(load_exported(tmp_path / "again")), logits(model))


def test_nvfp4_experts_keep_a_global_scale_each(tmp_path: Path) -> None:
    dense = tiny_model("qwen3_moe", tmp_path / "dense", num_hidden_layers=1)
    folder = by_the_library(
        dense, tmp_path / "theirs", "nvfp4-pack-quantized", ".experts.", num_bits=4, type="float",
        strategy="tensor_group", group_size=16,
    )  # fmt: skip
    model = begun(folder, ("nvfp4", None), "*.experts.*")
    assert torch.equal(logits(model), logits(load_exported(folder)))


def test_mxfp4_stacks_of_gpt_oss(tmp_path: Path) -> None:
    dense = tiny_model("gpt_oss", tmp_path / "dense", **GPT_OSS)
    trained: Any = quantized(dense, EXPERTS)
    quiet_export(trained, dense, tmp_path / "export", "mxfp4")
    model = begun(tmp_path / "export", ("mxfp4", None), "*.experts.*")
    served = load_exported(tmp_path / "export")
    torch.testing.assert_close(logits(model), logits(served))  # stacks that lie transposed are summed in another order
    for path, site in weights(model).items():
        stack = served.get_submodule(site.module).get_parameter(site.slot).transpose(-1, -2)
        assert torch.equal(site.value(), stack) and torch.equal(site.value(), weights(trained)[path].value())


# --- what is refused ------------------------------------------------------------------------------


def test_scales_that_training_would_round_are_refused(source: Path, tmp_path: Path) -> None:
    export_pair(source, tmp_path / "export", ("int4_g32", None))

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = (tensors[name].float() * 1.001).half()

    rewrite(tmp_path / "export", widen)
    with pytest.raises(UnsupportedError, match=r"q_proj|down_proj: its scales .* are not exact in bf16"):
        resolve(ModelConfig(id=str(tmp_path / "export")))


def test_rotated_inputs_and_damaged_scales_are_refused(source: Path, tmp_path: Path) -> None:
    export_pair(source, tmp_path / "rotated", ("int4_g32", "int8_token"), init=("hadamard",))
    with pytest.raises(UnsupportedError, match="inputs are rotated"):
        resolve(ModelConfig(id=str(tmp_path / "rotated")))
    export_pair(source, tmp_path / "damaged", ("int4_g32", None))
    rewrite(tmp_path / "damaged", lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].zero_())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is zero"):
        resolve(ModelConfig(id=str(tmp_path / "damaged")))
    assert not list((tmp_path / "cache" / "models").glob("damaged*"))


def test_methods_that_no_reader_knows_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "gptq")
    edit(folder, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(UnsupportedError, match=r"quantized already \(gptq\)"):
        load_model(resolve(ModelConfig(id=str(folder))))


def test_a_neighbour_of_the_reciprocal_is_found() -> None:
    """Where the reciprocal of a divisor rounds a product to another BF16 number than the division does."""
    torch.manual_seed(0)
    fmt = lookup("nvfp4")
    scale = torch.arange(8, 16).float().view(8, 1)
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 9] * 2] * 8, dtype=torch.uint8)
    divisors, values = torch.rand(1 << 18) * 1000 + 1, torch.tensor([1.0, 1.5])
    ways = [scale[:, :, None] / divisors, scale[:, :, None] * divisors.reciprocal()]
    one, other = ((values[None, :, None] * way).to(torch.bfloat16) for way in ways)
    apart = divisors[(one != other).any(dim=(0, 1))]
    assert 0 < len(apart) < 1e-3 * len(divisors)
    settled = 0
    for divisor in apart:
        dense = (fmt.element.decode(codes) * (scale / divisor)).to(torch.bfloat16)
        q = QTensor(fmt, codes, Scales(scale.to(torch.float8_e4m3fn), divisor.reciprocal()))
        assert not torch.equal(q.dequantize(torch.bfloat16), dense)
        with contextlib.suppress(UnsupportedError):  # no number does where two products want different ones
            assert torch.equal(
                QTensor(fmt, codes, packed._settled(dense, q, "layer")).dequantize(torch.bfloat16), dense
            )
            settled += 1
    assert settled >= 0.5 * len(apart)
