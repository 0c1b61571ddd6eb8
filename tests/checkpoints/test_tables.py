"""Quantized embeddings that are packed: the files hold each table once, also where a head is tied to it, and every
reader makes the trained values of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.checkpoints.export import RECORD, export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.checkpoints.verify import verify
from qat.errors import UnsupportedError
from qat.sites import weights
from tests.checkpoints.exports import SKIP_HEAD, broken, edit, ids, pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

TABLE, HEAD = "model.embed_tokens", "lm_head"
FORMATS = [weight for weight, input in pairs(ROWS) if input is None]


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


@pytest.mark.parametrize("projections", [("int4_g64", None), ("nvfp4", "nvfp4"), ("int8_channel", "int8_token")], ids=str)
def test_tables_beside_other_formats(projections: tuple[str, str | None], tied: Path, tmp_path: Path) -> None:
    model = shared(tied, "int8_channel", projections)
    out = quiet_export(model, tied, tmp_path / "out", pack_tables=True)
    report, values = verify(out), trained(model)
    assert report.ok, [check for check in report.checks if not check.ok]
    found = by_compressed_tensors(out)
    assert found.keys() == values.keys() - {HEAD}
    for path, weight in found.items():
        assert torch.equal(weight, values[path]), path
    for name in (TABLE, HEAD):
        assert open_export(out).quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 8
        assert open_export(out).matching_groups(name) == ["group_0"]
    with torch.inference_mode():
        assert torch.equal(load_exported(out)(ids()).logits, load_exported(dense_twin(model, tied, tmp_path))(ids()).logits)


def dense_twin(model: nn.Module, source: Path, folder: Path) -> Path:
    return quiet_export(model, source, folder / "dense")
