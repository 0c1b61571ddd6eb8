"""A vLLM plugin: linear layers of compressed-tensors checkpoints multiply with packed weights by `qat::packed_linear`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process it starts. From
then on a checkpoint that says compressed-tensors is served by `Config` (reported as quantization "qat"), which decides
layer by layer by `RULES`: pairs of formats that are ours get a `Packed` scheme, all others are vLLM's own, and one line
of the log per pair says which. `quantization="compressed-tensors"` leaves everything to vLLM, and so does
`VLLM_PLUGINS=` in the environment. Experts of mixtures are always vLLM's. Run and tested on CPUs only.

vLLM does not notice tensors that a quantized checkpoint lacks, and rounds those of another type while it copies them:
`Packed` counts and checks what is loaded, and names what is missing or wrong.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from vllm.platforms import current_platform

from qat.checkpoints.layouts.arguments import input_format, weight_format
from qat.checkpoints.layouts.caches import says_nothing
from qat.checkpoints.layouts.compressed_tensors.codes import read_layer
from qat.checkpoints.layouts.compressed_tensors.read import expected_tensors
from qat.checkpoints.layouts.compressed_tensors.transforms import KEY
from qat.checkpoints.layouts.compressed_tensors.write import METHOD as CHECKPOINTS
from qat.checkpoints.layouts.reader import PackedModule
from qat.errors import CheckpointError, UnsupportedError
from qat.kernels.load import available, cpu_problem, load
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.numbers.scale import E8M0
from qat.serving.packed import PackedLinear, pack, packed_linear, problem
from qat.training.activations import fake_quantize_input

METHOD = "qat"
ACTIVATION_RULE = "vllm"

_TYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.float32,  # scales of other tools have other types: taken whole, narrowed where that is exact
    "F32": torch.float32,
}
_SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a fused attention input; others are numbers

logger = init_logger("vllm.qat")  # below vLLM's own logger, whose handler and level it then has


def register() -> None:
    """Entry point of the plugin; may be called any number of times."""
    load()
    register_quantization_config(METHOD)(Config)


@torch.library.custom_op("qat::served_input", mutates_args=())
def served_input(x: Tensor, static: Tensor | None, format: str) -> Tensor:
    """x on the grid of an input format by `ACTIVATION_RULE`; one opaque step for torch.compile, which would spend
    minutes on the arithmetic inside."""
    return fake_quantize_input(x, lookup(format), ACTIVATION_RULE, "ste", static).contiguous()


@served_input.register_fake
def _(x: Tensor, static: Tensor | None, format: str) -> Tensor:
    return x.new_empty(x.shape)


# --- who serves what --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Pairs of formats on a device, whose they are, and why.

    Attributes:
        device: "cpu" or "cuda".
        fits: of the weight's format, the input's (None: left in 16 bits), and the compute capability (90 for sm_90; 0
            on a CPU).
        ours: else vLLM's.
        why: for the log.
    """

    device: str
    fits: Callable[[Format, Format | None, int], bool]
    ours: bool
    why: str


def _integer(fmt: Format | None, bits: int = 8) -> bool:
    """Integers of at most so many bits."""
    return fmt is not None and fmt.element.is_integer and fmt.element.bits <= bits


def _fp4(fmt: Format | None) -> bool:
    return fmt is not None and fmt.element.is_minifloat and fmt.element.bits == 4


def _eight_bits(weight: Format, input: Format | None, capability: int) -> bool:
    """A scale per row and per token, or one for all integer inputs; its product fails with one for all FP8 inputs."""
    if input is None or weight.element.bits != 8 or input.element.bits != 8:
        return False
    return weight.block == (1, 0) and (input.block == (1, 0) or (input.is_static and _integer(input)))


def _int4_alone(weight: Format, input: Format | None, capability: int) -> bool:
    """4-bit integers, where vLLM's build for this CPU has the product (that for AVX2 lacks it): it gains more from many
    sequences. SmolLM2-135M, INT4 g64, one AVX-512 core, tokens/s of vLLM's and ours: 39 and 49 with one sequence, 142
    and 142 with four, 235 and 192 with eight; reading 256 tokens at once, 681 and 1188."""
    mine = input is None and _integer(weight, 4) and weight.element.bits == 4
    return mine and hasattr(torch.ops._C, "cpu_gemm_wna16")


def _anything(weight: Format, input: Format | None, capability: int) -> bool:
    """Of the rest, vLLM's CPU build refuses most, and leaves inputs in 16 bits that should have 8 or 4."""
    return True


def _small_integers(weight: Format, input: Format | None, capability: int) -> bool:
    """INT4 with INT8 or INT4 inputs, and the like: without the Humming kernels vLLM only keeps the weight in 4 bits."""
    return _integer(weight, 7) and _integer(input)


def _int4_fp8(weight: Format, input: Format | None, capability: int) -> bool:
    return _integer(weight, 7) and input is not None and not _integer(input) and capability != 90


def _fp4_before_sm100(weight: Format, input: Format | None, capability: int) -> bool:
    """Rounded inputs times packed weights, see `qat.kernels.quantized_matmul.choose.rounded_reason`."""
    return _fp4(weight) and _fp4(input) and capability < 100


def _mxfp4_alone(weight: Format, input: Format | None, capability: int) -> bool:
    return _fp4(weight) and weight.scale is E8M0 and input is None and capability >= 100


# The first that fits decides; what none fits is vLLM's. Those for CUDA follow from vLLM's source and were never run.
RULES = (
    Rule("cpu", _eight_bits, False, "products in 8 bits"),
    Rule("cpu", _int4_alone, False, "its product with packed weights gains more from many sequences"),
    Rule("cpu", _anything, True, "weights stay packed, inputs as the checkpoint says"),
    Rule("cuda", _small_integers, True, "vLLM would leave the inputs in 16 bits"),
    Rule("cuda", _int4_fp8, True, "vLLM has these inputs on sm_90 only"),
    Rule("cuda", _fp4_before_sm100, True, "vLLM would leave the inputs in 16 bits"),
    Rule("cuda", _mxfp4_alone, True, "vLLM would quantize the inputs, which the checkpoint does not ask for"),
)


def takes(weight: Format, input: Format | None, device: str, capability: int = 0) -> Rule | None:
    """The rule by which the pair is ours, or that leaves it to vLLM; None where there is none, or no packed weight."""
    if problem(weight) is not None:
        return None
    return next((r for r in RULES if r.device == device and r.fits(weight, input, capability)), None)


def _rule(weight: Format, input: Format | None) -> Rule | None:
    device = current_platform.device_type
    capability = current_platform.get_device_capability() if device == "cuda" else None
    return takes(weight, input, device, 0 if capability is None else capability.to_int())


def _slow() -> str:
    """What to add to the log where no kernel runs."""
    if current_platform.device_type == "cpu":
        return "" if cpu_problem() is None else f"; SLOW, weights are dequantized at every call: {cpu_problem()}"
    return "" if available() else "; SLOW, weights are dequantized at every call: no Triton"


class Config(CompressedTensorsConfig):
    """vLLM's reading of a compressed-tensors config, with our scheme for the layers that are ours."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim compressed-tensors checkpoints unless the user named another method, or their inputs are rotated: that
        is left to vLLM, which rotates them on CUDA."""
        ours = hf_quant_cfg.get("quant_method") == CHECKPOINTS and user_quant in (None, METHOD)
        if not ours or says_nothing(hf_quant_cfg.get(KEY)):
            return METHOD if ours else None
        if user_quant == METHOD:
            raise UnsupportedError(f"--quantization {METHOD} does not rotate inputs ({KEY}); use {CHECKPOINTS}")
        logger.info_once("qat: left to vLLM: %s rotates inputs, which this plugin does not", KEY)
        return None

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> Any:
        """The scheme of one (fused) layer, None where it is not quantized."""
        parts = self.get_scheme_dict(layer, layer_name)
        if not parts or parts.get("weights") is None:
            return super().get_scheme(layer, layer_name)
        # QuantizationArgs say in JSON what config.json says, defaults written out.
        args = parts["weights"].model_dump(mode="json")
        inputs = None if parts.get("input_activations") is None else parts["input_activations"].model_dump(mode="json")
        try:
            weight, input = weight_format(args), None if inputs is None else input_format(inputs)
        except UnsupportedError as error:
            logger.info_once("qat: left to vLLM: %s", str(error))
            return super().get_scheme(layer, layer_name)
        rule = None if parts.get("output_activations") is not None else _rule(weight, input)
        pair = f"{weight.name} weights with {'16-bit' if input is None else input.name} inputs"
        if rule is not None and rule.ours:
            logger.info_once("qat: %s: qat::packed_linear (%s%s)", pair, rule.why, _slow())
            path = layer_name or ""
            return Packed(PackedModule(path, parts["format"], args, inputs), weight, input, self._members(path))
        scheme = super().get_scheme(layer, layer_name)
        logger.info_once("qat: %s: vLLM's %s%s", pair, type(scheme).__name__, f" ({rule.why})" if rule else "")
        return scheme

    def _members(self, path: str) -> list[str]:
        """Paths in the checkpoint of the layers that vLLM fuses into `path`."""
        parent, dot, leaf = path.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]


# --- one layer --------------------------------------------------------------------------------------------------------


class Packed(CompressedTensorsScheme):
    """One linear layer, fused as vLLM fuses it: loads the stored tensors, packs them once, multiplies.

    Args:
        module: the layer as config.json describes it, under vLLM's path.
        weight: format of the weight.
        input: of the inputs, None where they stay as they are.
        members: paths in the checkpoint of the layers that are fused into it.
    """

    def __init__(self, module: PackedModule, weight: Format, input: Format | None, members: list[str]) -> None:
        self.module, self.weight, self.input, self.members = module, weight, input, members
        self.loaded: dict[str, set[int]] = {}

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: what runs is the dispatcher's choice."""
        return 0

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        """Parameters named as the stored tensors, in the shapes of this rank's share of the fused layer."""
        self.sizes, self.columns = output_partition_sizes, input_size_per_partition
        if len(self.members) != len(self.sizes):  # stored fused, or fused in a way that vLLM does not tell
            self.members = [self.module.path] * len(self.sizes)
        whole_groups = self.weight.divides(self.columns) and (self.input is None or self.input.divides(self.columns))
        if not whole_groups or self.columns * self.weight.element.bits % 32:
            raise UnsupportedError(
                f"{self.module.path}: the {self.columns} input columns of one rank do not hold whole groups and words; "
                f"use fewer ranks, or --quantization {CHECKPOINTS}"
            )
        for name, (kind, shape) in expected_tensors(self.module, sum(self.sizes), self.columns).items():
            size = (len(self.sizes),) if shape == (1,) else shape
            if self._packed_rows(name, _TYPES[kind]) and any(rows % (32 // self.module.bits) for rows in self.sizes):
                raise UnsupportedError(
                    f"{self.module.path}.{name} shares words among rows, which the fused parts {self.sizes} cut; use "
                    f"--quantization {CHECKPOINTS}"
                )
            layer.register_parameter(
                name, self._parameter(name, torch.empty(size, dtype=_TYPES[kind]), self._checked(name, weight_loader))
            )

    def _packed_rows(self, name: str, dtype: torch.dtype) -> bool:
        return name == "weight_zero_point" and dtype == torch.int32

    def _parameter(self, name: str, data: Tensor, loader: Callable[..., Any]) -> Any:
        """The vLLM parameter that knows how this tensor is cut over ranks and where its shards go."""
        if name == "weight_shape":
            return BasevLLMParameter(data=data, weight_loader=loader)  # of the whole layer; not read
        if data.ndim < 2:
            return PerTensorScaleParameter(data=data, weight_loader=loader)
        if self._packed_rows(name, data.dtype):
            factor = 32 // self.module.bits
            return PackedvLLMParameter(
                data=data, input_dim=1, output_dim=0, packed_dim=0, packed_factor=factor, weight_loader=loader
            )
        if name in ("weight_scale", "weight_zero_point"):
            if data.shape[1] == 1:
                return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)

    def _checked(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader of a parameter, which then counts the parts and refuses other types."""
        parts = self.loaded.setdefault(name, set())

        def load_part(parameter: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            shard = args[0] if args else options.get("loaded_shard_id", options.get("shard_id"))
            every: Any = range(len(self.sizes)) if shard is None else shard
            shards: Iterable[int | str] = every if isinstance(every, range | tuple) else (every,)
            numbers = [_SHARDS[number] if isinstance(number, str) else int(number) for number in shards]
            wider = parameter.dtype == torch.float32 and value.dtype in (torch.bfloat16, torch.float16)
            if value.dtype != parameter.dtype and not wider and name != "weight_shape":
                where = self.members[numbers[0]]
                raise CheckpointError(f"{where}.{name} is {value.dtype}, but its layout has {parameter.dtype}")
            parts.update(numbers)
            return loader(parameter, value, *args, **options)

        return load_part

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stored tensors become one packed weight; their memory is given back."""
        for name, parts in self.loaded.items():
            for number, member in enumerate(self.members):
                if number not in parts:
                    raise CheckpointError(f"{member}.{name} is missing")
        _fill_padding(layer)
        stored = {name: getattr(layer, name).data for name in self.loaded}
        layers = [read_layer(replace(self.module, path=m), self._part(stored, i)) for i, m in enumerate(self.members)]
        packed = pack(self._joined(layers))
        layer.packed = PackedLinear(packed)
        layer.packed.prepare()
        static = self.module.static_input
        layer.register_buffer("static_input", None if static is None else self._one(stored[static], static))
        for name in stored:
            delattr(layer, name)
        layer.weight_packed = layer.packed.words  # by which vLLM sees where adapters of this layer belong

    def _part(self, stored: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The tensors of one of the fused layers, as they are stored (rows that one rank has)."""
        rows, first, part = self.sizes[number], sum(self.sizes[:number]), {}
        for name, tensor in stored.items():
            if name == "weight_shape":
                part[name] = torch.tensor([rows, self.columns])
            elif tensor.ndim < 2:
                part[name] = tensor[number : number + 1]
            else:
                per_word = 32 // self.module.bits if self._packed_rows(name, tensor.dtype) else 1
                part[name] = tensor[first // per_word : (first + rows) // per_word]
        scale = part["weight_scale"]
        if scale.dtype == torch.float32:
            narrow = scale.to(self.weight.scale.storage)
            part["weight_scale"] = narrow if torch.equal(narrow.to(torch.float32), scale) else scale
        return part

    def _joined(self, layers: list[QTensor]) -> QTensor:
        """The fused layer: rows below each other, one global scale."""
        scales = [layer.scales for layer in layers]
        shared = None
        if scales[0].global_scale is not None:
            values = torch.stack([s.global_scale for s in scales if s.global_scale is not None])
            shared = self._one(values, "weight_global_scale").reshape(())
        zeros = [s.zero_point for s in scales if s.zero_point is not None]
        stored = self.weight.scale.from_bytes(torch.cat([self.weight.scale.to_bytes(s.stored) for s in scales]))
        codes = torch.cat([layer.codes for layer in layers])
        return QTensor(self.weight, codes, Scales(stored, shared, torch.cat(zeros) if zeros else None))

    def _one(self, values: Tensor, name: str) -> Tensor:
        """The value that all fused layers share, float32 [1]."""
        if not bool((values == values[0]).all()):
            raise CheckpointError(
                f"{name} differs among {', '.join(self.members)}, which vLLM fuses: {values.tolist()}; a packed weight "
                f"has one. Export with qat, which trains them equal, or serve with --quantization {CHECKPOINTS}"
            )
        return values[:1].to(torch.float32)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, columns) -> (tokens, rows)."""
        prepared: Any = layer  # with what process_weights_after_loading put there
        if self.input is not None:
            x = served_input(x, prepared.static_input, self.input.name)
        if bias is not None:
            return packed_linear(x, prepared.packed.packed, bias)
        y: Tensor = prepared.packed(x)
        return y


def _fill_padding(layer: Any) -> None:
    """Output heads have rows beyond the vocabulary, zeros all of them; no scale may be zero. Nobody reads them."""
    shards = getattr(layer, "shard_indices", None)
    if shards is not None and layer.weight_scale.ndim > 1:
        layer.weight_scale.data[shards.num_org_elements :].fill_(1)
