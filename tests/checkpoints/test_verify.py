"""`verify` must find every kind of damage, name the check that it breaks, and accept what other tools write."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qat.checkpoints.export import RECORD
from qat.checkpoints.layouts import open_export
from qat.checkpoints.shards import INDEX, SINGLE
from qat.checkpoints.verify import CHECKS, verify
from qat.errors import CheckpointError
from tests.checkpoints.exports import broken, edit, export_pair, mixed_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    model = export_pair(source, root / "nvfp4", ("nvfp4", "nvfp4"))
    quiet_export(model, source, root / "sharded", max_shard_bytes=30_000)
    export_pair(source, root / "int4", ("int4_g64", "int8_token"))
    export_pair(source, root / "static", ("fp8_tensor", "fp8_tensor"))
    rules = [*mixed_rules([("int4_g32", None), ("mxfp4", "mxfp4"), ("int8_channel", "int8_token"), ("mxfp8", None)])]
    quiet_export(quantized(source, [*rules, {"match": "*", "skip": "x"}]), source, root / "mixed")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        shutil.copytree(exports[name], tmp_path / name)
        return tmp_path / name

    return make


# --- damage to tensors ----------------------------------------------------------------------------


def swap_nibbles(tensors: dict[str, Tensor]) -> None:
    packed = tensors[f"{Q}.weight_packed"]
    tensors[f"{Q}.weight_packed"] = packed >> 4 | packed << 4


def shift_group(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)


def zero_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[2, 3] = 0


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[2, 3] = 0x7F


def infinite_input_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.input_global_scale"].fill_(float("inf"))


def other_input_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.input_global_scale"] *= 2


def unequal_fused_weights(tensors: dict[str, Tensor]) -> None:
    tensors[f"{K}.weight_global_scale"] *= 2


def unequal_fused_inputs(tensors: dict[str, Tensor]) -> None:
    tensors[f"{K}.input_global_scale"] *= 2


def scalar_global_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_global_scale"] = tensors[f"{Q}.weight_global_scale"][0].clone()


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q}.weight_scale"]


def drop_input_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q}.input_global_scale"]


def drop_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def surplus(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)


def touch_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] *= 1.5


def single_precision_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def touch_table(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][7, 9] += 1


@pytest.mark.parametrize(
    ("damage", "checks"),
    [
        (swap_nibbles, {"weights"}),
        (shift_group, {"weights"}),
        (zero_scale, {"scales", "weights"}),
        (nan_scale, {"scales", "weights"}),
        (infinite_input_scale, {"scales", "weights"}),
        (other_input_scale, {"weights"}),
        (unequal_fused_weights, {"fused", "weights"}),
        (unequal_fused_inputs, {"fused", "weights"}),
        (scalar_global_scale, {"tensors"}),
        (drop_input_scale, {"tensors", "weights"}),
        (drop_norm, {"tensors", "weights"}),
        (surplus, {"tensors"}),
        (touch_norm, {"weights"}),
        (single_precision_norm, {"tensors", "weights"}),
        (touch_table, {"weights"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_tensors_are_found(
    damage: Callable[[dict[str, Tensor]], None], checks: set[str], copy: Callable[[str], Path]
) -> None:
    folder = copy("nvfp4")
    rewrite(folder, damage)
    found = broken(folder)
    assert checks <= found and (found <= checks | {"size"} or "tensors" in checks)


def test_a_lost_scale_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("nvfp4")
    rewrite(folder, drop_scale)
    assert {"tensors", "weights", "targets"} <= broken(folder)


@pytest.mark.parametrize(
    ("name", "suffix", "convert"),
    [
        ("int4", "weight_scale", lambda t: t.float()),
        ("int4", "weight_packed", lambda t: t[:, :-1]),
        ("int4", "weight_shape", lambda t: t.flip(0)),
        ("mixed", "weight_scale", lambda t: t.view(torch.float8_e8m0fnu)),
        ("static", "input_scale", lambda t: t.float()),
    ],
)
def test_wrong_types_and_shapes_are_found(
    name: str, suffix: str, convert: Callable[[Tensor], Tensor], copy: Callable[[str], Path]
) -> None:
    folder, path = copy(name), DOWN

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{path}.{suffix}"] = convert(tensors[f"{path}.{suffix}"])

    rewrite(folder, change)
    assert {"tensors", "weights"} & broken(folder)


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_anywhere_is_found(seed: int, copy: Callable[[str], Path]) -> None:
    folder = copy(["nvfp4", "int4", "static", "mixed"][seed % 4])
    raw = bytearray((folder / SINGLE).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    generator = torch.Generator().manual_seed(seed)
    position = int(torch.randint(start, len(raw), (1,), generator=generator))
    raw[position] ^= 1 << (seed % 8)
    (folder / SINGLE).write_bytes(bytes(raw))
    assert broken(folder)


# --- damage to files ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated", "header"])
def test_incomplete_shards_are_found(damage: str, copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    report = verify(folder)
    assert [check.name for check in report.checks] == ["complete"] and not report.ok
    assert shard.name in report.checks[0].detail


def test_shards_swapped_in_the_index_are_found(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded")
    index = json.loads((folder / INDEX).read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (folder / INDEX).write_text(json.dumps(index))
    assert broken(folder) == {"complete"}


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_missing_and_changed_companions_are_found(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("int4")
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert broken(folder) == {"companions"}
    (folder / name).unlink()
    assert broken(folder) == {"companions"}


def group(config: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"][f"group_{index}"]
    return found


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("int4", lambda c: c.update(tie_word_embeddings=True), "tied"),
        ("int4", lambda c: c["quantization_config"].update(ignore=[]), "targets"),
        ("int4", lambda c: c["quantization_config"]["ignore"].append(Q), "weights"),
        ("int4", lambda c: c["quantization_config"].update(quantization_status="frozen"), "complete"),
        ("int4", lambda c: c.pop("quantization_config"), "complete"),
        ("int4", lambda c: group(c)["weights"].update(num_bits=8), "size"),
        ("int4", lambda c: group(c)["weights"].update(group_size=32), "tensors"),
        ("int4", lambda c: c.update(hidden_size=256), "tensors"),
        ("mixed", lambda c: group(c, 0)["targets"].append("re:.*o_proj"), "targets"),
        ("mixed", lambda c: group(c, 0)["targets"].pop(), "weights"),
        ("static", lambda c: group(c)["input_activations"].update(dynamic=True, strategy="token"), "tensors"),
    ],
)
def test_a_config_that_does_not_fit_is_found(
    name: str, change: Callable[[dict[str, Any]], Any], check: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(name)
    edit(folder, change)
    found = broken(folder)
    assert check in found and (check == "complete" or "companions" in found)


def test_a_config_that_does_not_parse_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("int4")
    (folder / "config.json").write_text("{")
    assert broken(folder) == {"complete"}


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        verify(tmp_path / "none")


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "sharded", "int4", "static", "mixed"])
def test_good_exports_pass_everything(name: str, exports: dict[str, Path]) -> None:
    report = verify(exports[name])
    assert report.ok and [check.name for check in report.checks] == ["complete", *CHECKS, "transformers"]
    assert "difference 0.0" in report.checks[-1].detail
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert not verify(exports[name], logits=False).checks[-1].detail.startswith("largest")


def test_without_compressed_tensors_the_logits_are_skipped(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def hidden(name: str, *rest: Any) -> Any:
        return None if name == "compressed_tensors" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    for name in [name for name in sys.modules if name.startswith("compressed_tensors")]:
        monkeypatch.delitem(sys.modules, name)
    report = verify(exports["int4"])
    assert report.ok and report.checks[-1].detail == "skipped: compressed-tensors is not installed"


def test_a_disagreement_of_the_loaders_is_found(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.checkpoints import verify as module

    real = module.load_exported

    def other_rule(folder: Path, _rule: str, *rest: Any, **more: Any) -> Any:
        return real(folder, "vllm", *rest, **more)

    monkeypatch.setattr(module, "load_exported", other_rule)
    assert broken(exports["int4"], logits=True) == {"transformers"}


# --- other tools' folders -------------------------------------------------------------------------


def test_a_folder_without_record_is_checked_too(copy: Callable[[str], Path]) -> None:
    folder = copy("nvfp4")
    (folder / RECORD).unlink()

    def odd_divisors(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_global_scale"):  # llm-compressor's are no powers of two
                tensor *= 1.1

    rewrite(folder, odd_divisors)
    report = verify(folder)
    assert report.ok and "difference 0.0" in report.checks[-1].detail
    skipped = {check.name for check in report.checks if check.detail.startswith("skipped")}
    assert skipped == {"weights"}
    rewrite(folder, unequal_fused_weights)
    assert broken(folder) == {"fused"}
    rewrite(folder, zero_scale)
    assert broken(folder) == {"fused", "scales"}
    (folder / "generation_config.json").unlink()
    assert "companions" in broken(folder)


@pytest.mark.parametrize("name", ["nvfp4", "int4", "static", "mixed"])
def test_configs_as_the_library_writes_them_are_read(name: str, copy: Callable[[str], Path]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")

    def rewritten(config: dict[str, Any]) -> None:
        parsed = quantization.QuantizationConfig.model_validate(config["quantization_config"])
        config["quantization_config"] = json.loads(parsed.model_dump_json())

    folder = copy(name)
    edit(folder, rewritten, forget=True)
    report = verify(folder)
    assert report.ok, report.checks
    assert "difference 0.0" in report.checks[-1].detail


def test_a_checkpoint_that_the_library_compressed_is_read(source: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from transformers import AutoModelForCausalLM

    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    model = AutoModelForCausalLM.from_pretrained(source)
    tensors, dense = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        blocks = tensor.unflatten(1, (-1, 32))
        state = {"weight": tensor, "weight_scale": (blocks.abs().amax(-1) / 7.5).contiguous()}
        packed = compressor.compress(state, scheme)
        tensors.update({name.removesuffix("weight") + key: value for key, value in packed.items()})
        dense[name.removesuffix(".weight")] = compressor.decompress(packed, scheme)["weight"]
    folder = tmp_path / "theirs"
    shutil.copytree(source, folder)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    config |= {"ignore": ["lm_head"], "config_groups": {"g": {"targets": ["Linear"], "weights": args}}}
    edit(folder, lambda c: c.update(quantization_config=config, dtype="bfloat16"))
    report = verify(folder)
    assert report.ok, report.checks
    exported = open_export(folder)
    assert all(torch.equal(exported.dense(path), weight) for path, weight in dense.items())
