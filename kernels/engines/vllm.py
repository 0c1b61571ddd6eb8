"""A vLLM plugin: linear layers of compressed-tensors checkpoints multiply with packed weights by `qat::packed_linear`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process it starts. From
then on a checkpoint that says compressed-tensors is served by `Config` (reported as quantization "qat"), which decides
layer by layer: pairs of formats that it takes get a `Packed` scheme, all others are vLLM's own. Asking for
`quantization="compressed-tensors"` leaves everything to vLLM, and so does `VLLM_PLUGINS=` in the environment.

This file is a composition root beside `qat/cli.py`: it joins the layout on disk (`qat.checkpoints`) with the operator
(`qat.packed`), both imported inside functions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from qat.activations import fake_quantize_input
from qat.catalog import CATALOG
from qat.errors import CheckpointError, UnsupportedError
from qat.format import Format
from qat.numerics import QTensor, Scales
from qat.packed import PackedLinear, pack, packed_linear, problem

if TYPE_CHECKING:
    from qat.checkpoints.unpack import PackedModule

METHOD = "qat"
CHECKPOINTS = "compressed-tensors"
ACTIVATION_RULE = "vllm"

_TYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_PER_SHARD = ("weight_global_scale", "input_global_scale", "input_scale")

logger = init_logger("vllm.qat")  # below vLLM's own logger, whose handler and level it then has


def register() -> None:
    """Entry point of the plugin; may be called any number of times."""
    register_quantization_config(METHOD)(Config)


class Config(CompressedTensorsConfig):
    """vLLM's reading of a compressed-tensors config, with our scheme for the layers that `takes` accepts."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim compressed-tensors checkpoints unless the user named another method."""
        ours = hf_quant_cfg.get("quant_method") == CHECKPOINTS and user_quant in (None, METHOD)
        return METHOD if ours else None

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> Any:
        """The scheme of one (fused) layer, None where it is not quantized."""
        parts = self.get_scheme_dict(layer, layer_name)
        scheme = None if not parts or parts.get("weights") is None else _scheme(parts, layer_name or "")
        if scheme is None:
            return super().get_scheme(layer, layer_name)
        logger.info_once("%s", scheme.describe())
        return scheme


def takes(weight: Format, input: Format | None) -> bool:
    """Whether we run this pair on this machine; what vLLM's CPU build multiplies in 8 bits stays with vLLM."""
    return not (weight.element.bits == 8 and weight.block in ((0, 0), (1, 0)) and input is not None)


def _scheme(parts: dict[str, Any], path: str) -> "Packed | None":
    from qat.checkpoints.exported import input_format
    from qat.checkpoints.unpack import PackedModule

    # QuantizationArgs say in JSON what config.json says, defaults written out.
    args = parts["weights"].model_dump(mode="json")
    inputs = None if parts.get("input_activations") is None else parts["input_activations"].model_dump(mode="json")
    weight = weight_format(args)
    if weight is None:
        return None
    try:
        input = None if inputs is None else input_format(inputs)
    except UnsupportedError:
        return None
    return Packed(PackedModule(path, parts["format"], args, inputs), weight, input) if takes(weight, input) else None


def weight_format(args: dict[str, Any]) -> Format | None:
    """The catalogue's format for QuantizationArgs of a weight, None where there is none that can be held packed.

    One scale per tensor is stored once per row, so those arguments name two formats; only that per row can be packed.
    """
    from qat.checkpoints.exported import _essence
    from qat.checkpoints.targets.compressed_tensors import weight_args

    for fmt in CATALOG.values():
        known = weight_args(fmt)
        if known is not None and _essence(known) == _essence(args) and problem(fmt) is None:
            return fmt
    return None


class Packed(CompressedTensorsScheme):
    """One linear layer, fused as vLLM fuses it: loads the stored tensors, packs them once, multiplies."""

    def __init__(self, module: "PackedModule", weight: Format, input: Format | None) -> None:
        self.module, self.weight, self.input = module, weight, input

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: what runs is the dispatcher's choice."""
        return 0

    def describe(self) -> str:
        """For the log."""
        inputs = "16-bit inputs" if self.input is None else f"{self.input.name} inputs"
        return f"qat::packed_linear serves {self.weight.name} weights with {inputs}"

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        """Parameters named as the stored tensors, in the shapes of this rank's share of the fused layer."""
        from qat.checkpoints.unpack import expected_tensors

        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if not self.weight.divides(columns) or (self.input is not None and not self.input.divides(columns)):
            raise UnsupportedError(f"{self.module.path}: {columns} input columns of one rank do not hold whole groups")
        for name, (kind, shape) in expected_tensors(self.module, rows, columns).items():
            size = (len(output_partition_sizes),) if name in _PER_SHARD else shape
            data = _unloaded(size, _TYPES[kind])
            layer.register_parameter(name, _parameter(name, data, self.module.bits, weight_loader))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stored tensors become one packed weight; their memory is given back."""
        from qat.checkpoints.unpack import expected_tensors

        stored = {name: getattr(layer, name).data for name in expected_tensors(self.module, 1, self.weight.group or 1)}
        for name in _PER_SHARD:
            if name in stored:
                stored[name] = _one(stored[name], f"{self.module.path}.{name}")
        layer.packed = PackedLinear(pack(read_layer(stored, self.module, self.weight)))
        layer.register_buffer("static_input", stored.get(self.module.static_input or ""))
        for name in stored:
            delattr(layer, name)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, columns) -> (tokens, rows)."""
        held: Any = layer  # with what process_weights_after_loading put there
        if self.input is not None:
            x = fake_quantize_input(x, self.input, ACTIVATION_RULE, "ste", held.static_input)
        return packed_linear(x, held.packed.packed, bias)


def _unloaded(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN where the type has one: vLLM does not notice tensors that a quantized checkpoint lacks."""
    empty = torch.empty(size, dtype=dtype)
    if dtype == torch.float8_e4m3fn:
        empty.view(torch.uint8).fill_(255)
    elif dtype == torch.uint8:
        empty.fill_(255)  # as a scale, NaN
    elif dtype.is_floating_point:
        empty.fill_(torch.nan)
    else:
        empty.zero_()
    return empty


def _parameter(name: str, data: Tensor, bits: int, loader: Callable[..., Any]) -> BasevLLMParameter:
    """The vLLM parameter that knows how this tensor is cut over ranks and where its shards go."""
    if name in _PER_SHARD:
        return PerTensorScaleParameter(data=data, weight_loader=loader)
    if name == "weight_shape":
        return BasevLLMParameter(data=data, weight_loader=loader)  # the last shard's; not read
    if name == "weight_zero_point" and data.dtype == torch.int32:  # packed along the rows
        return PackedvLLMParameter(
            data=data, input_dim=1, output_dim=0, packed_dim=0, packed_factor=32 // bits, weight_loader=loader
        )
    if name in ("weight_scale", "weight_zero_point"):
        if data.ndim < 2 or data.shape[1] == 1:
            return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def _one(values: Tensor, name: str) -> Tensor:
    """The value that all shards of a fused layer share, float32 [1]."""
    if not bool((values == values[0]).all()):
        raise CheckpointError(
            f"{name}: layers that vLLM fuses were stored with different values {values.tolist()}; a packed weight has "
            "one. Export with qat, which trains them equal, or serve with quantization=compressed-tensors"
        )
    return values[:1].to(torch.float32)


# --- to be replaced by qat.checkpoints.codes.read_layer --------------------------------------------------------------


def read_layer(stored: dict[str, Tensor], module: "PackedModule", fmt: Format) -> QTensor:
    """Codes and scales of one layer from its stored tensors; rows of several fused layers lie below each other."""
    if module.packed:
        per_byte = 8 // module.bits
        raw = stored["weight_packed"].contiguous().view(torch.uint8)
        shifts = torch.arange(per_byte, dtype=torch.uint8) * module.bits
        codes = ((raw[..., None] >> shifts) & (2**module.bits - 1)).flatten(-2)
    else:
        codes = stored["weight"].view(torch.uint8)
    if fmt.element.kind == "integer" and module.packed:
        codes = codes ^ (1 << (module.bits - 1))
    zero = None
    if fmt.zero_point:
        words = stored["weight_zero_point"].t().contiguous().view(torch.uint8)
        shifts = torch.arange(8 // module.bits, dtype=torch.uint8) * module.bits
        fields = ((words[..., None] >> shifts) & (2**module.bits - 1)).flatten(-2).t()
        zero = (fields.to(torch.int16) - (1 << (module.bits - 1))).to(torch.int8).contiguous()
    divisor = stored.get("weight_global_scale")
    multiplier = None if divisor is None else divisor.reciprocal().reshape(())
    return QTensor(fmt, codes.contiguous(), Scales(stored["weight_scale"], multiplier, zero))
