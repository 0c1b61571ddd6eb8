"""Exported folders as ordinary models: weights unpacked to their BF16 values once, inputs quantized on the fly.

This is what `qat eval` and `qat generate` run where no engine is at hand, and the second opinion that `verify` compares
plain transformers with. No compressed-tensors is needed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.adapters import adapter_for
from qat.adapters.experts import SECOND
from qat.checkpoints.caches import quantize_caches
from qat.checkpoints.hf import check_generation, check_loading, quiet
from qat.checkpoints.layouts import ExportedFolder, open_export
from qat.checkpoints.layouts.arguments import input_format
from qat.checkpoints.names import StoredNames, stored_names
from qat.checkpoints.peft import put_adapter
from qat.checkpoints.progress import progress
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.format import Format
from qat.numbers.hadamard import BlockHadamard
from qat.same_tensor import SameTensor
from qat.serving.inputs import quantize_input
from qat.serving.matmul import QuantizedLinear
from qat.sites import Quantizers
from qat.training.activations import Reader, fake_quantize_input
from qat.training.npu import NPU_RULES, held

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ServedInput:
    """A forward pre-hook that quantizes a layer's input; layers that an engine fuses share one, and its result.

    Threads may run one model at once.

    Args:
        fmt: the input's format; None only rotates it.
        rule: whose arithmetic, see `qat.training.activations`.
        static: stored scale or divisor, float32 [1], where the format has one; see `static_part`.
        consumers: how many layers read the same tensor.
        codes: give codes and scales (`qat.serving.inputs`) to a layer that multiplies those, instead of rounded values.
        rotation: size of the block Hadamard that comes before rounding, 0 without.
        reader: what reads the tensor.
    """

    def __init__(
        self,
        fmt: Format | None,
        rule: str,
        static: Tensor | None,
        consumers: int = 1,
        *,
        codes: bool = False,
        rotation: int = 0,
        reader: Reader = "layer",
    ) -> None:
        self.format, self.rule, self.static, self.codes, self.reader = fmt, rule, static, codes, reader
        self.rotate = BlockHadamard(rotation) if rotation else None
        self.same = SameTensor(consumers)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the first positional argument by its quantized self."""
        return (*self.of(args[0]), *args[1:])

    def of(self, x: Tensor) -> tuple[Tensor, ...]:
        """x quantized: its rounded values, or codes and scales."""
        quantized: tuple[Tensor, ...] = self.same.once(x, self._quantized)
        return quantized

    def _quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.rotate is None else self.rotate(x)
        if self.format is None:
            return (x,)
        static = self.static
        if static is not None and static.device != x.device:  # once: a copy waits for the device, no graph captures one
            self.static = static = static.to(x.device)
        if self.codes:
            return quantize_input(x, self.format.name, static)
        return (fake_quantize_input(x, self.format, self.rule, "ste", static, self.reader),)


def load_exported(
    folder: Path,
    activation_rule: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantize_inputs: bool = True,
    expert_inputs: bool = True,
    caches: bool = True,
    adapter: bool = True,
) -> "PreTrainedModel":
    """The model in an exported folder, in eval mode, computing in `dtype` with the weights an engine dequantizes.

    Args:
        folder: a checkpoint of one of the export targets, ours or another tool's.
        activation_rule: "vllm", "compressed_tensors" or "ascend"; by default that of who will run it, see `rule`.
        dtype: float32, or bfloat16 to compute as a BF16 server does.
        attn_implementation: as in transformers; by default what it chooses itself.
        quantize_inputs: False leaves inputs in `dtype` (weights only), rotated where the checkpoint asks for it.
        expert_inputs: False leaves those of fused experts alone, as plain transformers does.
        caches, adapter: False leaves keys and values alone, or the adapter beside the weights out.

    Raises:
        CheckpointError: tensors are missing, surplus or damaged.
        UnsupportedError: an input quantization that the catalogue does not know.
    """
    from transformers import AutoConfig, GenerationConfig

    exported, config = open_export(folder), AutoConfig.from_pretrained(folder)
    activation_rule = activation_rule or exported.rule
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense: dict[str, Tensor] = {}
    with progress(f"unpacking {folder.name}", len(exported.modules)) as advance:
        for name, tensor in exported.dense_tensors(activation_rule):
            dense[name] = tensor
            advance(1)
    with quiet():
        model, info = _architecture(config).from_pretrained(
            None,
            config=config,
            state_dict=dense,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    check_loading(model, info, folder)
    check_generation(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    stored = stored_names(model, exported.dense_names)
    _check_layers(exported, stored, type(model).__name__)
    if caches:
        quantize_caches(model, exported, activation_rule, stored)
    hook_inputs(model, exported, activation_rule, stored.modules, quantize_inputs)
    if quantize_inputs and expert_inputs:
        quantize_stack_inputs(model, stack_inputs(exported, activation_rule, stored.rows))
    if adapter:
        put_adapter(model, folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _architecture(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedError(f"transformers has no causal language model for {config.model_type!r}") from None


def _check_layers(exported: ExportedFolder, stored: StoredNames, kind: str) -> None:
    for name, path in exported.weights.items():
        if path not in stored.modules and name not in stored.rows:
            raise CheckpointError(f"{path} is stored, but {kind} has no such layer")
    for head, table in stored.tied_to(exported.modules).items():
        exported.check_tied(head, table)


def hook_inputs(
    model: nn.Module, exported: ExportedFolder, rule: str, own: dict[str, str], quantize: bool = True
) -> None:
    """Hook a `ServedInput` on every layer whose input the checkpoint quantizes or rotates; `QuantizedLinear`s get
    codes.

    Layers that an engine fuses share one where they ask for the same: other tools calibrate each layer by itself.

    Args:
        model: has the layers, of any class.
        exported: says how.
        rule: whose arithmetic, see `qat.training.activations`.
        own: path in the model by checkpoint path; matrices of experts have none, see `stack_inputs`.
        quantize: False only rotates.

    Raises:
        UnsupportedError: an input quantization that the catalogue does not know.
    """
    groups = {path: members for members in exported.fused for path in members}
    shared: dict[tuple[Any, ...], ServedInput] = {}
    for path, module in exported.modules.items():
        fmt = input_format(module.input) if quantize and module.input is not None else None
        if path not in own or (fmt is None and not module.rotation):
            continue
        layer, first = model.get_submodule(own[path]), groups.get(path, [path])[0]
        static, codes = exported.static_input(path), isinstance(layer, QuantizedLinear)
        key = first, fmt and fmt.name, _plain(static), codes, module.rotation
        hook = ServedInput(fmt, rule, static, consumers=0, codes=codes, rotation=module.rotation)
        hook = shared.setdefault(key, hook)
        hook.same.readers += 1
        layer.register_forward_pre_hook(hook)
        if fmt is not None and rule in NPU_RULES:
            layer.register_forward_hook(lambda layer, x, y: held(y, rule))


def _plain(static: Tensor | None) -> str | None:
    return None if static is None else str(static.tolist())


def stack_inputs(
    exported: ExportedFolder, rule: str, rows: dict[str, tuple[str, slice]]
) -> dict[str, dict[str, ServedInput]]:
    """What quantizes the inputs of fused experts, by path of their module and by stack.

    Args:
        exported, rule: as in `hook_inputs`.
        rows: `StoredNames.rows`.

    Raises:
        UnsupportedError: the experts of one layer, which read one tensor, ask for several scales.
    """
    stacks: dict[str, dict[str, ServedInput]] = {}
    for path, module in exported.modules.items():
        place = rows.get(path + exported.DENSE)
        if module.rotation and place is not None:
            raise UnsupportedError(f"{path}: rotated inputs of fused experts cannot be read")
        if module.input is None or place is None:
            continue
        owner, _, slot = place[0].rpartition(".")
        reader: Reader = "second" if slot == SECOND else "experts"
        wanted = ServedInput(input_format(module.input), rule, exported.static_input(path), reader=reader)
        known = stacks.setdefault(owner, {}).setdefault(slot, wanted)
        scales = [_plain(each.static) for each in (known, wanted)]
        if known.format != wanted.format or scales[0] != scales[1]:
            raise UnsupportedError(
                f"{path}: the experts of one layer ask for inputs of different scales ({scales}), but they read one "
                "tensor; readable are checkpoints with one scale per layer"
            )
    return stacks


def quantize_stack_inputs(model: nn.Module, stacks: dict[str, dict[str, ServedInput]]) -> None:
    """Put what `stack_inputs` found in its places."""
    for path, inputs in stacks.items():
        fused = model.get_submodule(path)
        adapter = adapter_for(fused)
        assert adapter is not None  # it is how such names come about
        adapter.attach(fused, {slot: Quantizers(None, _Applied(input)) for slot, input in inputs.items()})


class _Applied(nn.Module):
    """A `ServedInput` as a function of the tensor."""

    def __init__(self, input: ServedInput) -> None:
        super().__init__()
        self.input = input

    def forward(self, x: Tensor) -> Tensor:
        """x, rounded."""
        (values,) = self.input.of(x)
        return values
