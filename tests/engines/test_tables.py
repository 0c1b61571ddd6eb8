"""Packed embeddings served by transformers: equal to our dense reading of the same files, and in memory once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.checkpoints.exported import load_exported
from qat.engines.transformers import load_packed
from qat.errors import CheckpointError, UnsupportedError
from qat.serving.packed import PackedLinear
from qat.serving.table import PackedEmbedding
from tests.checkpoints.exports import edit, ids, pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

TABLE, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        tie: tiny_model("llama", root / str(tie), num_hidden_layers=1, tie_word_embeddings=tie) for tie in (True, False)
    }


def logits(model: nn.Module, tokens: int = 48) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(tokens), use_cache=False).logits
    return found.float()


def exported(source: Path, out: Path, table: str, **options: Any) -> Path:
    model = quantized(source, [pair_rules("int4_g64", "int8_token"), {"match": "*", "weight": table}], tied="share")
    return quiet_export(model, source, out, pack_tables=True, **options)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("table", ["int8_channel", "int4_g64", "int4_g32_asym", "nvfp4", "mxfp8", "fp8_channel"])
@pytest.mark.usefixtures("library_sums")
def test_packed_is_dense(table: str, tie: bool, sources: dict[bool, Path], tmp_path: Path) -> None:
    out = exported(sources[tie], tmp_path / "out", table)
    for dtype in (torch.bfloat16, torch.float32):
        packed, dense = load_packed(out, dtype), load_exported(out, dtype=dtype)
        assert packed.dtype == dtype and packed.get_input_embeddings()(ids()).dtype == dtype
        assert torch.equal(packed.get_input_embeddings()(ids()), dense.get_input_embeddings()(ids()))
    packed, dense = load_packed(out, torch.bfloat16), load_exported(out, dtype=torch.bfloat16)
    embedding, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert torch.equal(logits(packed), logits(dense))
    assert (embedding.matrix is head) is tie
    assert not [name for name, _ in packed.named_parameters() if name.startswith((TABLE, HEAD))]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert packed.generate(ids(5), **options).shape == (1, 11)


def test_a_shared_table_takes_its_bytes_once(sources: dict[bool, Path], tmp_path: Path) -> None:
    packed = load_packed(exported(sources[True], tmp_path / "out", "int8_channel"), torch.bfloat16)
    held = {
        b.data_ptr(): b.nbytes for n, b in packed.named_buffers(remove_duplicate=False) if n.startswith((TABLE, HEAD))
    }
    rows, columns = 384, 128
    assert sum(held.values()) == rows * columns + rows * 2  # a byte each, and a BF16 scale per row


@pytest.mark.usefixtures("library_sums")
def test_tables_that_cannot_be_packed_are_shared_dense(sources: dict[bool, Path], tmp_path: Path) -> None:
    out = exported(sources[True], tmp_path / "out", "int3_g64")
    with pytest.warns(UserWarning, match=rf"{TABLE}: int3_g64 weights are dense, no faster than BF16: codes of 3 bits"):
        packed = load_packed(out, torch.bfloat16)
    assert packed.get_input_embeddings().weight is packed.get_output_embeddings().weight
    assert torch.equal(logits(packed), logits(load_exported(out, dtype=torch.bfloat16)))


def test_a_head_stored_beside_the_table_it_is_tied_to_is_refused(sources: dict[bool, Path], tmp_path: Path) -> None:
    out = exported(sources[False], tmp_path / "out", "int8_channel")
    edit(out, lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=rf"config.json ties {HEAD} to {TABLE}, but both are stored"):
        load_packed(out)


@pytest.mark.parametrize("road", [load_packed, load_exported])
def test_a_head_that_is_quantized_in_another_way_is_refused(
    road: Any, sources: dict[bool, Path], tmp_path: Path
) -> None:
    out = exported(sources[True], tmp_path / "out", "int8_channel")

    def change(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        (own,) = (name for name, group in groups.items() if f"re:.*{HEAD}$" in group["targets"])
        groups[own]["targets"].remove(f"re:.*{HEAD}$")
        inputs = next(group["input_activations"] for group in groups.values() if group["input_activations"])
        groups["other"] = {**groups[own], "targets": [HEAD], "input_activations": inputs}

    edit(out, change)
    with pytest.raises(UnsupportedError, match=f"{HEAD} is tied to {TABLE}, which is stored packed, but is quantized"):
        road(out)


def test_other_tables_and_heads_are_refused(sources: dict[bool, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.models.llama import modeling_llama

    out = exported(sources[True], tmp_path / "out", "int8_channel")
    plain = modeling_llama.LlamaModel.__init__

    class Scaled(nn.Embedding):
        """As Gemma has it."""

    def scaled(self: Any, config: Any) -> None:
        plain(self, config)
        self.embed_tokens.__class__ = Scaled

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", scaled)
    with pytest.raises(UnsupportedError, match=rf"{TABLE} is a Scaled, which does more than look rows up"):
        load_packed(out)
    monkeypatch.undo()
    whole = modeling_llama.LlamaForCausalLM.__init__

    def biased(self: Any, config: Any) -> None:
        whole(self, config)
        self.lm_head.bias = nn.Parameter(torch.zeros(384))

    rewrite(out, lambda tensors: tensors.update({f"{HEAD}.bias": torch.zeros(384, dtype=torch.bfloat16)}))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "__init__", biased)
    with pytest.raises(UnsupportedError, match=f"{HEAD} is tied to a packed table, but is more than a product"):
        load_packed(out)


def test_a_missing_tensor_of_a_table_is_named(sources: dict[bool, Path], tmp_path: Path) -> None:
    out = exported(sources[True], tmp_path / "out", "int8_channel")
    rewrite(out, lambda tensors: tensors.pop(f"{TABLE}.weight_scale"))
    with pytest.raises(CheckpointError, match=r"weight and 1 more is missing"):
        load_packed(out)
