"""Exported folders as ordinary models: weights unpacked to their BF16 values once, inputs quantized on the fly.

This is what `qat eval` and `qat generate` run where no engine is at hand, and the second opinion that `verify` compares
plain transformers with. No compressed-tensors is needed.
"""

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.activations import fake_quantize_input
from qat.checkpoints.codes import input_format
from qat.checkpoints.hf import check_loading, quiet
from qat.checkpoints.names import fused_groups, stored_paths
from qat.checkpoints.progress import progress
from qat.checkpoints.unpack import ExportedFolder
from qat.errors import CheckpointError, UnsupportedError
from qat.format import Format

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ServedInput:
    """A forward pre-hook that quantizes a layer's input; layers that an engine fuses share one, and its result.

    Args:
        fmt: the input's format.
        rule: whose arithmetic, see `qat.activations`.
        static: stored scale or divisor, float32 [1], where the format has one.
        consumers: how many layers read the same tensor.
    """

    def __init__(self, fmt: Format, rule: str, static: Tensor | None, consumers: int = 1) -> None:
        self.format, self.rule, self.static, self.consumers = fmt, rule, static, consumers
        self._input: weakref.ref[Tensor] | None = None
        self._output: Tensor | None = None
        self._uses = 0

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the first positional argument by its quantized self."""
        x: Tensor = args[0]
        if self._output is None or self._input is None or self._input() is not x:
            static = None if self.static is None else self.static.to(x.device)
            self._output = fake_quantize_input(x, self.format, self.rule, "ste", static)
            self._input, self._uses = weakref.ref(x), 0
        output = self._output
        self._uses += 1
        if self._uses >= self.consumers:
            self._input = self._output = None
        return (output, *args[1:])


def load_exported(
    folder: Path,
    activation_rule: str = "vllm",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    quantize_inputs: bool = True,
) -> "PreTrainedModel":
    """The model in an exported folder, in eval mode, computing in `dtype` with the weights an engine dequantizes.

    Args:
        folder: a compressed-tensors checkpoint, ours or another tool's.
        activation_rule: "vllm" or "compressed_tensors".
        dtype: float32, or bfloat16 to compute as a BF16 server does.
        attn_implementation: as in transformers.
        quantize_inputs: False leaves the inputs alone (weights only).

    Raises:
        CheckpointError: tensors are missing, surplus or damaged.
        UnsupportedError: an input quantization that the catalogue does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    exported = ExportedFolder(folder)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedError(f"transformers has no causal language model for {config.model_type!r}") from None
    dense: dict[str, Tensor] = {}
    with progress(f"unpacking {folder.name}", len(exported.modules)) as advance:
        for name, tensor in exported.dense_tensors():
            dense[name] = tensor
            advance(1)
    with quiet():
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dense,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    check_loading(model, info, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if quantize_inputs:
        own = {stored: path for path, stored in stored_paths(model).items()}
        hook_inputs(model, exported, activation_rule, own)
    loaded: PreTrainedModel = model.eval()
    return loaded


def hook_inputs(model: nn.Module, exported: ExportedFolder, rule: str, own: dict[str, str]) -> None:
    """Hook a `ServedInput` on every layer whose input the checkpoint quantizes.

    Args:
        model: has the layers, of any class.
        exported: says how.
        rule: whose arithmetic, see `qat.activations`.
        own: path in the model by checkpoint path.

    Raises:
        CheckpointError: the model lacks a layer.
        UnsupportedError: an input quantization that the catalogue does not know.
    """
    groups = {path: members for members in fused_groups(list(exported.modules)) for path in members}
    shared: dict[str, ServedInput] = {}
    for path, module in exported.modules.items():
        if module.input is None:
            continue
        if path not in own:
            raise CheckpointError(f"{path} is stored, but {type(model).__name__} has no such layer")
        members = groups.get(path, [path])
        if members[0] not in shared:
            fmt = input_format(module.input)
            shared[members[0]] = ServedInput(fmt, rule, exported.static_input(path), len(members))
        model.get_submodule(own[path]).register_forward_pre_hook(shared[members[0]])
