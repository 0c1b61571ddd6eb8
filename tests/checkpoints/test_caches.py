"""Quantized caches in files: exported by every layout that holds them, read back equal, refused where none does."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qat.checkpoints.export import RECORD, check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import open_export
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.init.calibration import observe
from qat.quantizer import InputQuantizer
from qat.scheme import Scheme
from qat.sites import sites
from qat.surgery import apply
from tests.checkpoints.exports import broken, edit, ids, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

ATTENTION = "model.layers.0.self_attn"
STORED = [  # target, weights, caches
    ("compressed-tensors", "nvfp4", "fp8_tensor"),
    ("compressed-tensors", "int4_g64", "int8_tensor"),
    ("modelopt", "nvfp4", "fp8_tensor"),
]
RECORDED = [
    ("compressed-tensors", "int4_g64", "nvfp4", "int8_token"),
    ("modelopt", "nvfp4", "int4_token", "fp8_token"),
    ("fp8", "fp8_b128", "fp8_token", "fp8_token"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def rules(weight: str, key: str, value: str, match: str = "*.self_attn") -> list[dict[str, Any]]:
    input = {"input": "fp8_g128"} if weight == "fp8_b128" else {}
    return [
        {"match": match, "key": key, "value": value},
        {"match": "*_proj", "weight": weight, **input},
        {"match": "*", "skip": "left alone"},
    ]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(), use_cache=False).logits
    return found


def served(model: nn.Module) -> Tensor:
    """Logits of the trained model with BF16 values where the files have them."""
    from qat.modes import served

    with served(model):
        return logits(model)


def checks(folder: Path) -> dict[str, str]:
    report = verify(folder)
    assert report.ok, report
    return {check.name: check.detail for check in report.checks}


@pytest.mark.parametrize(("target", "weight", "cached"), STORED)
def test_scales_are_stored_where_engines_look(
    target: str, weight: str, cached: str, source: Path, tmp_path: Path
) -> None:
    model = quantized(source, rules(weight, cached, cached))
    out = quiet_export(model, source, tmp_path / "out", target)
    config = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert config["num_bits"] == 8 and config["type"] == ("float" if "fp8" in cached else "int")
    assert config["dynamic"] is False
    exported = open_export(out)
    for site in sites(model, "key", "value"):
        name = "k_scale" if site.role == "key" else "v_scale"
        place = f"{site.path}.{name[0]}_proj.{name}" if target == "modelopt" else f"{site.path}.{name}"
        info, scale = exported.reader.info(place), exported.reader.get(place)
        assert (info.code, info.shape) == (("F32", ()) if target == "modelopt" else ("BF16", (1,)))
        wanted = (site.quantizer.amax / site.format.element.max).to(torch.bfloat16).float()
        assert float(scale) == float(wanted)
    if target == "modelopt":
        legacy = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        assert legacy["kv_cache_quant_algo"] == "FP8"
    assert torch.equal(logits(load_exported(out)), served(model))
    details = checks(out)
    assert details["caches"] == f"2 layers cache {cached}; scales are stored"
    if target == "compressed-tensors":
        assert "difference 0.0 " in details["transformers"]


def test_plain_transformers_does_quantize_the_cache(source: Path, tmp_path: Path) -> None:
    """Else the comparison of `verify` would say nothing."""
    out = quiet_export(quantized(source, rules("nvfp4", "fp8_tensor", "fp8_tensor")), source, tmp_path / "out")
    plain = logits(AutoModelForCausalLM.from_pretrained(out))
    ours = [logits(load_exported(out, "compressed_tensors", torch.bfloat16, caches=c)) for c in (True, False)]
    assert torch.equal(plain, ours[0]) and not torch.equal(plain, ours[1])


@pytest.mark.parametrize(("target", "weight", "key", "value"), RECORDED)
def test_what_no_layout_says_is_recorded(
    target: str, weight: str, key: str, value: str, source: Path, tmp_path: Path
) -> None:
    model = quantized(source, rules(weight, key, value))
    out = quiet_export(model, source, tmp_path / "out", target)
    notes = json.loads((out / RECORD).read_text())["notes"]
    assert any("vLLM has to be told" in note and f"{key}: --kv-cache-dtype" in note for note in notes)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert not config.get("kv_cache_scheme") and not open_export(out).caches
    assert torch.equal(logits(load_exported(out)), served(model))
    assert checks(out)["caches"] == f"2 layers cache {', '.join(dict.fromkeys((key, value)))}; only {RECORD} says so"


def test_damage_is_named(source: Path, tmp_path: Path) -> None:
    model = quantized(source, rules("int4_g64", "fp8_tensor", "fp8_tensor"))

    def fresh(name: str) -> Path:
        return quiet_export(model, source, tmp_path / name, "compressed-tensors")

    out = fresh("missing")
    rewrite(out, lambda tensors: tensors.pop(f"{ATTENTION}.v_scale"))
    assert broken(out) == {"weights", "caches"}
    with pytest.raises(CheckpointError, match=rf"{ATTENTION}\.v_scale is missing"):
        load_exported(out)
    out = fresh("layer")
    rewrite(out, lambda tensors: [tensors.pop(f"{ATTENTION}.{name}") for name in ("k_scale", "v_scale")])
    assert broken(out) == {"weights", "caches"}
    with pytest.raises(CheckpointError, match=rf"{ATTENTION} has no scales"):
        load_exported(out)
    out = fresh("zero")
    rewrite(out, lambda tensors: tensors[f"{ATTENTION}.k_scale"].zero_())
    assert broken(out) == {"weights", "caches"}
    out = fresh("config")
    edit(out, lambda config: config["quantization_config"].update(kv_cache_scheme=None))
    with pytest.raises(CheckpointError, match="k_scale scales a cache that"):
        open_export(out)


def test_another_tool_s_scales_need_no_record(source: Path, tmp_path: Path) -> None:
    model = quantized(source, rules("int4_g64", "fp8_tensor", "fp8_tensor"))
    out = quiet_export(model, source, tmp_path / "out")
    rewrite(out, lambda tensors: tensors.update({f"{ATTENTION}.k_scale": torch.tensor([0.1234567])}))  # float32
    edit(out, lambda config: None, forget=True)
    assert not broken(out)
    loaded = load_exported(out)
    scales = {site.role: float(site.quantizer.static()) for site in sites(loaded, "key", "value") if "0" in site.path}
    assert scales["key"] == float(torch.tensor(0.1234567))


def test_formats_that_no_target_holds_are_named_before_training(source: Path) -> None:
    def said(*caches: str, match: str = "*.self_attn") -> list[str]:
        scheme = Scheme(rules=rules("int4_g64", *caches, match=match), init=())
        return check_export(apply(load_model(source), scheme), source)

    assert any("fp8_tensor caches: vLLM" in note for note in said("fp8_tensor", "fp8_tensor"))
    assert any("vLLM refuses the whole" in note for note in said("int8_tensor", "int8_tensor"))
    (note,) = said("int4_g32", "int4_g32")
    assert note.startswith("no export target holds int4_g32 caches: this can be trained")
    with pytest.raises(UnsupportedError, match="one format for the keys and values of all layers, but these are"):
        said("fp8_tensor", "int8_tensor")
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn has none"):
        said("fp8_tensor", "fp8_tensor", match="*.0.self_attn")


def test_layers_without_projections_are_refused(tmp_path: Path) -> None:
    source = tiny_model("phi3", tmp_path / "phi3")
    scheme = Scheme(rules=rules("int4_g32", "fp8_tensor", "fp8_tensor"), init=())
    with pytest.raises(UnsupportedError, match="look for k_proj and v_proj"):
        check_export(apply(load_model(source), scheme), source)


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), 0.0])
def test_ranges_that_are_no_range_are_not_written(amax: float, source: Path, tmp_path: Path) -> None:
    model = quantized(source, rules("int4_g64", "fp8_tensor", "fp8_tensor"))
    quantizer: InputQuantizer = sites(model, "value")[1].quantizer
    quantizer.amax.fill_(amax)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.self_attn: the range of its value is {amax}; run"):
        quiet_export(model, source, tmp_path / "out")


def test_a_run_without_caches_says_nothing_of_them(source: Path, tmp_path: Path) -> None:
    model = quantized(source, rules("int4_g64", "fp8_tensor", "fp8_tensor")[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(model, [{"input_ids": ids()}])
    out = quiet_export(model, source, tmp_path / "out")
    assert json.loads((out / RECORD).read_text())["caches"] == {}
    assert checks(out)["caches"] == "caches are not quantized"
