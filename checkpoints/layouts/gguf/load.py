"""A file that `write` made as a model of transformers in float32: what `qat verify` compares others with, and what `qat
eval` and `qat generate` run where llama.cpp is not installed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qat.checkpoints.exported import ServedInput
from qat.checkpoints.hf import check_loading, quiet
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.types import FORMATS
from qat.errors import CheckpointError, UnsupportedError
from qat.training.activations import llama_cpp_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that transformers (5.23) leaves at the defaults of some configurations.
_MISREAD = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_SCALED_BY_WIDTH = (46, 62)  # layers of Gemma models whose query_pre_attn_scalar transformers knows as the usual one


def dense_tensors(file: GgufFile) -> dict[str, Tensor]:
    """float32 tensors by transformers' names.

    Raises:
        UnsupportedError: no export of ours wrote the file, so that the names are not known.
        CheckpointError: a tensor is missing.
    """
    if file.record is None:
        raise UnsupportedError(f"{file.path} was not written by `qat export`; give it as `model.id` of a run instead")
    found: dict[str, Tensor] = {}
    for part, entry in parts(file.record).items():
        value = file.value(entry["tensor"])
        found[part] = value if "expert" not in entry else value[entry["expert"]]
    return found


def parts(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of a record by the name of the dense tensor."""
    modules, tensors = record.get("modules"), record.get("tensors")
    if not isinstance(modules, dict) or not isinstance(tensors, dict):
        raise CheckpointError("the file's record has no modules and tensors")
    return {**{f"{path}.weight": entry for path, entry in modules.items()}, **tensors}


def load_file(path: Path, inputs: bool = False, opened: GgufFile | None = None) -> "PreTrainedModel":
    """The model in eval mode, its weights as llama.cpp dequantizes them.

    Args:
        path: the file.
        inputs: round what layers multiply with as llama.cpp does, too: to INT8 per 32 before blocks, per 256 before
            super-blocks, to BF16 before BF16 weights. Otherwise they stay as they come.
        opened: the file, where it is already.

    Raises:
        CheckpointError: it is cut short, or tensors are missing.
        UnsupportedError: another tool wrote it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = opened or GgufFile(path)
    state = dense_tensors(file)
    with quiet():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        for trace in ("quantization_config", "_name_or_path"):
            if hasattr(config, trace):
                delattr(config, trace)
        for key, name in _MISREAD.items():
            if (value := file.facts.get(f"{file.arch}.{key}")) is not None:
                setattr(config, name, value)
        if file.arch == "phi3":
            settle_phi3(config, file)
        if hasattr(config, "query_pre_attn_scalar") and config.num_hidden_layers not in _SCALED_BY_WIDTH:
            config.query_pre_attn_scalar = config.head_dim  # as llama.cpp has it, and the file does not say
        loader: Any = AutoModelForCausalLM._model_mapping[type(config)]
        model, info = loader.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    check_loading(model, info, path)
    if inputs:
        _round_inputs(model, file)
    loaded: PreTrainedModel = model.eval()
    return loaded


def settle_phi3(config: Any, file: GgufFile) -> None:
    """Say what transformers (5.23) leaves at the defaults of Phi-3: its rotation and its window."""
    facts = {key.removeprefix("phi3."): value for key, value in file.facts.items()}
    config.original_max_position_embeddings = facts.get(
        "rope.scaling.original_context_length", config.max_position_embeddings
    )
    config.sliding_window = facts.get("attention.sliding_window") or None  # 0 says none
    rope, head = dict(config.rope_parameters, partial_rotary_factor=1.0), _width(config)
    if (rotated := facts.get("rope.dimension_count", head)) != head:
        share = rotated / head
        rope["partial_rotary_factor"] = share if int(head * share) == rotated else (rotated + 0.5) / head
    kinds = {f"{kind}_factor": f"rope_factors_{kind}.weight" for kind in ("long", "short")}
    if all(name in file.tensors for name in kinds.values()):
        rope |= {key: file.value(name).tolist() for key, name in kinds.items()}
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings
        rope |= {"rope_type": "longrope", "attention_factor": facts.get("rope.scaling.attn_factor", 1.0)}
    config.rope_parameters = rope


def _width(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def misread_phi3(file: GgufFile, tokens: int) -> str:
    """What of a text of so many tokens plain transformers (5.23) would compute otherwise, or "" where nothing."""
    facts = {key.removeprefix("phi3."): value for key, value in file.facts.items()}
    if "rope_factors_long.weight" in file.tensors:
        return "does not read LongRoPE's factors of phi3 files"
    if facts["rope.dimension_count"] != facts["embedding_length"] // facts["attention.head_count"]:
        return "takes every channel of phi3 files for rotated"
    return "does not read sliding_window of phi3 files" if 0 < facts["attention.sliding_window"] < tokens else ""


def _round_inputs(model: "PreTrainedModel", file: GgufFile) -> None:
    assert file.record is not None
    stored = {name: file.stored(entry["tensor"]).tensor_type for name, entry in parts(file.record).items()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    for name, kind in stored.items():
        module = modules.get(name.removesuffix(".weight"))  # none for an expert of a stack
        if module is table:
            module = head if head is not None and head.weight is table.weight else None
        if module is None:
            continue
        if kind is GGMLQuantizationType.BF16:
            module.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(), *args[1:]))
        elif kind in FORMATS:
            module.register_forward_pre_hook(ServedInput(llama_cpp_input(FORMATS[kind]), "llama_cpp", None))
