"""What no reader may take for a good checkpoint: other layouts, unknown variants, tensors that do not fit (by name)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.export import RECORD
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import FILES, READERS, TARGETS, open_export
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from tests.checkpoints.exports import broken, edit, projections, quiet_export, rewrite
from tests.tiny import tiny_model

PAIRS = {
    "compressed-tensors": ("nvfp4", "nvfp4"),
    "modelopt": ("nvfp4", "nvfp4"),
    "fp8": ("fp8_b128", "fp8_g128"),
    "ascend": ("mxfp4", "mxfp4"),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    source = tiny_model("llama", root / "source", num_hidden_layers=1)
    models = {pair: projections(source, pair) for pair in set(PAIRS.values())}
    for target, pair in PAIRS.items():
        quiet_export(models[pair], source, root / target, target)
    quiet_export(projections(source, ("int4_g64", None)), source, root / "int4", "compressed-tensors")
    quiet_export(models[PAIRS["modelopt"]], source, root / "sharded", "modelopt", max_shard_bytes=30_000)
    return root


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        shutil.copytree(exports / name, tmp_path / name)
        return tmp_path / name

    return make


def test_every_target_has_a_reader(exports: Path) -> None:
    assert READERS.keys() == TARGETS.keys() - FILES.keys()
    assert PAIRS.keys() == {name for name in READERS if not TARGETS[name].STACKS_OF}
    for target in PAIRS:
        assert isinstance(open_export(exports / target), READERS[target])
        assert verify(exports / target, logits=False).ok


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class(copy: Callable[[str], Path]) -> None:
    """The order of compressed-tensors and vLLM, whatever the order of the groups."""
    folder = copy("int4")

    def change(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        group = groups.pop("group_0")
        targets = {"a": ["Linear"], "b": [Q], "c": [r"re:.*q_proj$"], "d": ["re:.*k_proj$"]}
        groups.update({name: {**group, "targets": target} for name, target in targets.items()})

    edit(folder, change)
    assert open_export(folder).matching_groups(Q) == ["b", "c", "a"]
    assert open_export(folder).matching_groups(Q, linear=False) == ["b", "c"]


@pytest.mark.parametrize("target", PAIRS)
def test_packed_layers_are_those_that_the_reader_decodes(target: str, exports: Path) -> None:
    folder = open_export(exports / target)
    for path, module in folder.modules.items():
        tensors = folder.layer(path)
        q = TARGETS[target].unpack(module, tensors)
        assert torch.equal(q.dequantize(torch.bfloat16), folder.dense(path))
        name = f"weight_{'packed' if 'weight_packed' in tensors else ''}".rstrip("_")
        with pytest.raises(CheckpointError, match=rf"{path}\.{name} is missing"):
            TARGETS[target].unpack(module, {key: tensor for key, tensor in tensors.items() if key != name})


@pytest.mark.parametrize("target", PAIRS)
@pytest.mark.parametrize("other", PAIRS)
def test_a_checkpoint_labelled_as_another_target_is_refused(target: str, other: str, copy: Any, exports: Path) -> None:
    """Its own configuration with another method, and another's configuration over its tensors."""
    if target == other:
        return
    folder, description = copy(target), TARGETS[other].DESCRIPTION
    if TARGETS[target].DESCRIPTION is None:
        edit(folder, lambda c: c["quantization_config"].update(quant_method=other))
        with pytest.raises((CheckpointError, UnsupportedError), match=description or "quantization_config"):
            open_export(folder)
    if description is None:
        theirs = json.loads((exports / other / "config.json").read_text())["quantization_config"]
        edit(folder, lambda c: c.update(quantization_config=theirs), forget=True)
    else:
        shutil.copyfile(exports / other / description, folder / description)
        edit(folder, lambda c: c["quantization_config"].update(quant_method=target), forget=True)
    assert broken(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        (
            "modelopt",
            {"quant_method": "awq"},
            "quant_method 'awq'; readable: compressed-tensors, ascend",
        ),
        ("modelopt", {"quant_method": None}, "describes no quantization"),
        ("modelopt", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'; readable: NVFP4"),
        ("modelopt", {"quant_algo": None}, "quant_algo None"),
        ("modelopt", {"group_size": 32}, "NVFP4 with group_size 32"),
        ("modelopt", {"ignore": ["lm_head", "other"]}, "exclude_modules differs"),
        ("fp8", {"weight_block_size": None}, "weight_block_size None"),
        ("fp8", {"weight_block_size": [1, 32]}, r"weight_block_size \[1, 32\]"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme 'static'; readable: 'dynamic'"),
        ("fp8", {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ("fp8", {"fmt": "e5m2"}, "fmt 'e5m2'"),
        ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status: compressed"),
        ("compressed-tensors", {"version": "99.0"}, "version '99.0' of the format; readable: 0.x"),
        ("compressed-tensors", {"config_groups": None}, "config_groups is None, not a table"),
        ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, "W4A16 is .*perhaps a preset"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"R4": {}, "R1": 1}}}, "transform_config is"),
        ("modelopt", {"transform_config": {"config_groups": {"R4": 1}}}, "transform_config asks"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "quantized caches, but no k_scale is stored"),
        ("compressed-tensors", {"kv_cache_scheme": {"strategy": "attn_head"}}, r"kv_cache_scheme\.strategy is .attn_h"),
        (
            "compressed-tensors",
            {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}},
            "sparsity_config with format 'sparse-24-bitmask'",
        ),
        ("modelopt", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "caches quantized as .*; readable: FP8"),
        ("modelopt", {"kv_cache_quant_algo": "FP8"}, "kv_cache_quant_algo differs from config.json"),
        ("fp8", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme asks for a quantized KV"),
    ],
)
def test_unknown_variants_are_refused(target: str, change: dict[str, Any], message: str, copy: Any) -> None:
    folder = copy(target)
    edit(folder, lambda c: c["quantization_config"].update(change))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_export(folder)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        load_exported(folder)
    assert broken(folder) == {"complete"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, r"group_0\.weights is None"),
        ({"targets": None}, r"group_0\.targets is None"),
        ({"output_activations": {"num_bits": 8}}, r"group_0\.output_activations: quantized outputs are not"),
        ({"weights": {"num_bits": 4, "strategy": "group"}}, r"group_0\.weights\.group_size is None"),
        ({"weights": {"num_bits": 4, "group_size": 64, "strategy": "channel"}}, r"'channel' has no groups"),
        ({"weights": {"num_bits": 4, "group_size": 0}}, r"group_0\.weights\.group_size is 0"),
        ({"weights": {"num_bits": 4, "group_size": 64, "actorder": "group"}}, r"weights\.actorder is 'group'"),
        ({"weights": {"num_bits": 16}}, r"group_0\.weights\.num_bits is 16"),
        ({"weights": {"strategy": "attn_head"}}, r"group_0\.weights\.strategy is 'attn_head'; readable: 'tensor'"),
        ({"weights": {"symmetric": None}}, r"group_0\.weights\.symmetric is None"),
        ({"weights": {"strategy": "block", "type": "float"}}, r"group_0\.weights\.block_structure is None"),
        ({"input_activations": {"strategy": "channel"}}, r"group_0\.input_activations\.strategy is 'channel'"),
        ({"input_activations": []}, r"group_0\.input_activations is \[\]"),
    ],
)
def test_groups_that_cannot_be_read_are_named(change: dict[str, Any], message: str, copy: Any) -> None:
    folder = copy("compressed-tensors")
    edit(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(change))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_export(folder)


def test_what_other_tools_leave_away_is_the_default(copy: Any, exports: Path) -> None:
    """compressed-tensors writes no strategy that follows from the group size, and others write no `symmetric`."""
    folder = copy("int4")
    whole = open_export(folder)

    def bare(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        del quantization["version"]
        quantization.update(transform_config={}, sparsity_config={"format": "dense", "targets": ["Linear"]})
        group = quantization["config_groups"]["group_0"]
        for key in ("strategy", "symmetric", "dynamic", "type"):
            del group["weights"][key]
        group["weights"]["actorder"] = "static"
        del group["output_activations"], group["input_activations"]

    edit(folder, bare, forget=True)
    found = open_export(folder)
    for path, module in found.modules.items():
        assert module.weights == {**whole.modules[path].weights, "actorder": "static"} and module.input is None
        assert torch.equal(found.dense(path), whole.dense(path))
    assert not broken(folder) and verify(folder).ok


def test_scales_of_float16_models_are_read_exactly(copy: Any) -> None:
    folder = copy("int4")
    before = open_export(folder).layer(Q)["weight_scale"]
    rewrite(folder, lambda t: t.update({f"{Q}.weight_scale": before.half() * 1.25}))
    found = open_export(folder)
    scale = (before.half() * 1.25).double().repeat_interleave(64, dim=1)
    codes = TARGETS["compressed-tensors"].unpack(found.modules[Q], found.layer(Q)).codes.view(torch.int8)
    values = torch.where(codes > 7, codes - 16, codes).double()
    assert torch.equal(found.dense(Q), (values * scale).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("modelopt", f"{Q}.pre_quant_scale"),
        ("compressed-tensors", "model.layers.0.self_attn.q_scale"),
    ],
)
def test_tensors_of_what_is_not_implemented_are_named(target: str, name: str, copy: Any) -> None:
    folder = copy(target)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(UnsupportedError, match=rf"{name} belongs to .*, which is not implemented"):
        open_export(folder)


@pytest.mark.parametrize(("target", "key"), [("modelopt", "input_scale"), ("compressed-tensors", "input_global_scale")])
def test_an_input_has_one_static_scale(target: str, key: str, copy: Any) -> None:
    folder = copy(target)
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.{key}": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=rf"{Q}\.{key} is \[2\], not one number"):
        open_export(folder).static_input(Q)


def test_the_legacy_file_is_held_to_the_same(copy: Any) -> None:
    folder = copy("modelopt")
    legacy = json.loads((folder / "hf_quant_config.json").read_text())
    legacy["quantization"]["kv_cache_quant_algo"] = "FP8"
    (folder / "hf_quant_config.json").write_text(json.dumps(legacy))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: kv_cache_quant_algo differs"):
        open_export(folder)


def test_records_of_a_later_version_are_refused(copy: Any) -> None:
    folder = copy("fp8")
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "record_version": 99}))
    (check,) = verify(folder).checks
    assert not check.ok and "record_version 99" in check.detail


@pytest.mark.parametrize(
    ("target", "suffix", "change", "message"),
    [
        ("modelopt", "weight_scale", lambda t: t.view(torch.uint8), r"is U8\[128, 8\], not F8_E4M3\[128, 8\]"),
        ("modelopt", "weight_scale", lambda t: t[:, :-1], r"is F8_E4M3\[128, 7\]"),
        ("modelopt", "weight_scale_2", lambda t: t.reshape(1), r"is F32\[1\], not F32\[\]"),
        ("modelopt", "weight_scale_2", torch.zeros_like, "is zero, negative or not finite in 1 places"),
        ("modelopt", "weight_scale_2", lambda t: t * torch.inf, "is zero, negative or not finite"),
        ("modelopt", "input_scale", lambda t: t * torch.nan, "is zero, negative or not finite"),
        ("modelopt", "weight_scale_2", None, "is missing"),
        ("modelopt", "weight", lambda t: t.view(torch.int8), r"is I8\[128, 64\], not U8\[128, 64\]"),
        ("modelopt", "weight", lambda t: t.flatten(), "not a matrix"),
        ("fp8", "weight_scale_inv", lambda t: t.double(), r"is F64\[1, 1\], not F32\[1, 1\]"),
        ("fp8", "weight_scale_inv", lambda t: t.expand(2, 1), r"is F32\[2, 1\]"),
        ("fp8", "weight_scale_inv", lambda t: -t, "is zero, negative or not finite"),
        ("fp8", "weight", lambda t: t.bfloat16(), r"is BF16\[128, 128\], not F8_E4M3"),
        ("fp8", "weight", None, "no tensor"),
        ("compressed-tensors", "weight_scale", lambda t: t.view(torch.uint8), r"is U8\[128, 8\]"),
        ("compressed-tensors", "weight_global_scale", torch.zeros_like, "is zero, negative or not finite"),
        ("compressed-tensors", "weight_packed", lambda t: t[:, 1:], r"is F8_E4M3\[128, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    target: str, suffix: str, change: Any, message: str, copy: Any
) -> None:
    folder, name = copy(target), f"{Q}.{suffix}"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        stored = tensors.pop(name)
        if change is not None:
            tensors[name] = change(stored)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_exported(folder)
    assert Q in str(caught.value)
    assert broken(folder) & {"tensors", "scales"}


def test_a_truncated_shard_is_refused_by_name(copy: Any) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        load_exported(folder)
    assert broken(folder) == {"complete"}
