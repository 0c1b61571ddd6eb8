"""Quantized embeddings that are packed: the files hold each table once, also where a head is tied to it, and every
reader makes the trained values of them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.checkpoints.export import RECORD, export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.shards import SINGLE
from qat.checkpoints.verify import verify
from qat.errors import UnsupportedError
from qat.sites import weights
from tests.checkpoints.exports import SKIP_HEAD, broken, edit, ids, pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

TABLE, HEAD = "model.embed_tokens", "lm_head"
INTEGERS = ["int8_channel", "int8_tensor", "int4_g64", "int4_g64_asym", "int3_g64", "ternary_g64"]
FORMATS = [*INTEGERS, "fp8_channel", "fp8_b128", "nvfp4", "mxfp4", "mxfp6", "mxfp8"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "model"
    return tiny_model("llama", folder, num_hidden_layers=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("untied") / "model", num_hidden_layers=1)


def shared(source: Path, table: str, projections: tuple[str, str | None], **options: Any) -> nn.Module:
    """Table and head in one format, the projections in another."""
    rules = [pair_rules(*projections), {"match": "*", "weight": table}]
    return quantized(source, rules, tied="share", **options)


def trained(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {path: site.value().to(torch.bfloat16) for path, site in weights(model).items()}


def by_compressed_tensors(folder: Path) -> dict[str, Tensor]:
    """Every quantized weight as the library decompresses what is stored, by its own reading of config.json."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_named_modules
    from transformers import AutoConfig

    from qat.checkpoints.names import skeleton

    config = AutoConfig.from_pretrained(folder)
    given = QuantizationConfig.model_validate(config.quantization_config)
    model, tensors, found = skeleton(config), load_file(folder / "model.safetensors"), {}
    for scheme in given.config_groups.values():
        for path, _ in match_named_modules(model, scheme.targets, given.ignore):
            own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.weight")}
            if own:
                compressor = BaseCompressor.get_value_from_registry(scheme.format)
                found[path] = compressor.decompress(own, scheme)["weight"].to(torch.bfloat16)
    return found


@pytest.mark.parametrize("table", FORMATS)
def test_a_tied_table_is_stored_once(table: str, tied: Path, tmp_path: Path) -> None:
    model = shared(tied, table, (table, None))
    out = quiet_export(model, tied, tmp_path / "out", pack_tables=True)
    folder, report = open_export(out), verify(out)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert "difference 0.0" in report.checks[-1].detail  # of plain transformers, which ties the head itself
    assert not [name for name in folder.names if name.startswith(HEAD)]
    assert folder.config["tie_word_embeddings"] is True and folder.quantization["ignore"] == []
    assert f"{TABLE}.weight" not in folder.names or folder.modules[TABLE].format.endswith("quantized")
    values = trained(model)
    assert torch.equal(folder.dense(TABLE), values[TABLE]) and torch.equal(values[TABLE], values[HEAD])


@pytest.mark.parametrize(
    "projections", [("int4_g64", None), ("nvfp4", "nvfp4"), ("int8_channel", "int8_token")], ids=str
)
def test_tables_beside_other_formats(projections: tuple[str, str | None], tied: Path, tmp_path: Path) -> None:
    model = shared(tied, "int8_channel", projections)
    out = quiet_export(model, tied, tmp_path / "out", pack_tables=True)
    report, values = verify(out), trained(model)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert "decompressed by compressed-tensors, largest logit difference 0.0" in report.checks[-1].detail
    found = by_compressed_tensors(out)
    assert found.keys() == values.keys() - {HEAD}
    for path, weight in found.items():
        assert torch.equal(weight, values[path]), path
    assert open_export(out).matching_groups(TABLE) == open_export(out).matching_groups(HEAD) == ["group_0"]
    dense = quiet_export(model, tied, tmp_path / "dense")
    with torch.inference_mode():
        assert torch.equal(load_exported(out)(ids()).logits, load_exported(dense)(ids()).logits)
    smaller = sum(each.stat().st_size for each in dense.glob("*.safetensors")) - (out / SINGLE).stat().st_size
    assert 384 * 128 * 2 <= smaller < 384 * 128 * 2 + 2000  # the table in BF16, and a header


@pytest.mark.parametrize("head", [None, ("int8_channel", "int8_token"), ("int4_g64", None)], ids=str)
def test_a_table_apart_from_its_head(head: tuple[str, str | None] | None, untied: Path, tmp_path: Path) -> None:
    rule = SKIP_HEAD if head is None else [pair_rules(*head, match=HEAD)]
    model = quantized(untied, [*rule, {"match": "*", "weight": "int8_channel"}])
    out = quiet_export(model, untied, tmp_path / "out", pack_tables=True)
    report, values = verify(out), trained(model)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert (HEAD in open_export(out).modules) is (head is not None)
    assert open_export(out).config["tie_word_embeddings"] is False
    found = by_compressed_tensors(out)
    assert found.keys() == values.keys() and all(torch.equal(found[path], values[path]) for path in found)


def test_a_tied_head_with_quantized_inputs_has_tensors_of_its_own(tied: Path, tmp_path: Path) -> None:
    """Its layout is another one than that of a table, so one tensor cannot be both."""
    rules = [pair_rules("int8_channel", "int8_token", match=HEAD), {"match": "*", "weight": "int8_channel"}]
    model = quantized(tied, rules, tied="share")
    out = quiet_export(model, tied, tmp_path / "out", pack_tables=True)
    folder = open_export(out)
    assert {TABLE, HEAD} <= folder.modules.keys() and folder.config["tie_word_embeddings"] is False
    assert torch.equal(folder.dense(TABLE), folder.dense(HEAD)) and verify(out).ok


def test_a_head_that_the_source_stores_beside_its_table_is_left_out(tied: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tied, source)
    rewrite(source, lambda tensors: tensors.update({f"{HEAD}.weight": tensors[f"{TABLE}.weight"].clone()}))
    out = quiet_export(shared(source, "int8_channel", ("int4_g64", None)), source, tmp_path / "out", pack_tables=True)
    record = json.loads((out / RECORD).read_text())
    assert record["left_out"] == {f"{HEAD}.weight": f"the same tensor as {TABLE}.weight"} and verify(out).ok
    assert record["embeddings_on_grid"] == {} and record["modules"][TABLE]["weight"] == "int8_channel"


def test_groups_that_target_the_class_of_tables(untied: Path, tmp_path: Path) -> None:
    """As llm-compressor writes them; its "Linear" is no table."""
    rules = [*SKIP_HEAD, pair_rules("int4_g64", None, "*_proj"), {"match": "*", "weight": "int8_channel"}]
    model = quantized(untied, rules)
    out = quiet_export(model, untied, tmp_path / "out", pack_tables=True)

    def by_class(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = ["Embedding" if group["weights"]["num_bits"] == 8 else "Linear"]

    edit(out, by_class)
    folder, values = open_export(out), trained(model)
    assert all(torch.equal(folder.dense(path), values[path]) for path in values)
    assert folder.matching_groups(TABLE) == ["group_0"] and folder.ignored(HEAD)


# --- what is said and refused ---------------------------------------------------------------------


def test_without_the_option_nothing_changes_but_the_advice(tied: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"{TABLE} is quantized .* dense BF16, unless qat export gets --pack-tables"):
        export_model(shared(tied, "int8_channel", ("int4_g64", None)), tied, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    assert TABLE not in folder.modules and HEAD in folder.modules


def test_what_engines_do_with_packed_tables_is_said(tied: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as told:
        export_model(shared(tied, "int8_channel", ("int4_g64", None)), tied, tmp_path / "out", pack_tables=True)
    said = [str(each.message) for each in told]
    for sentence in ("plain transformers .* packed tables only", "vLLM .* no head is tied", "SGLang skips the tensors"):
        assert any(re.search(sentence, each) for each in said)
    assert set(said) == set(json.loads((tmp_path / "out" / RECORD).read_text())["notes"])


@pytest.mark.parametrize("target", [name for name, each in TARGETS.items() if each.TABLES is None])
def test_other_targets_hold_no_packed_tables(target: str, tied: Path, tmp_path: Path) -> None:
    """Whatever else they would say of the model: tables come first."""
    model = shared(tied, "nvfp4", ("nvfp4", "nvfp4"))
    with pytest.raises(UnsupportedError, match=f"{TABLE}: no loader of {target} .*or use --target compressed-tensors"):
        quiet_export(model, tied, tmp_path / "out", target, pack_tables=True)


def test_there_must_be_a_table_to_pack(tied: Path, tmp_path: Path) -> None:
    model = quantized(tied, [pair_rules("int4_g64", None), {"match": "*", "skip": "the rest"}])
    with pytest.raises(UnsupportedError, match=r"no embedding of this model is quantized, .* leave --pack-tables out"):
        quiet_export(model, tied, tmp_path / "out", pack_tables=True)


def test_damage_is_found(tied: Path, tmp_path: Path) -> None:
    out = quiet_export(shared(tied, "int8_channel", ("int4_g64", None)), tied, tmp_path / "out", pack_tables=True)

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors[f"{TABLE}.weight_packed"] = tensors[f"{TABLE}.weight_packed"].roll(1, 0)

    def forget(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = [target for target in group["targets"] if HEAD not in target]

    shutil.copytree(out, tmp_path / "head")
    edit(tmp_path / "head", forget)
    assert "targets" in broken(tmp_path / "head")
    rewrite(out, turn)
    assert broken(out) == {"weights"}
