"""transformers on our kernels: exported checkpoints whose weights stay packed in memory, for `from_pretrained`,
`pipeline`, `generate` and `transformers serve`.

Opt-in and reversible: while `installed`, this quantizer takes the place of the one that transformers has for a
checkpoint's `quant_method` (that one dequantizes everything on the first forward pass). Checkpoints stay as they are,
and the packages that wrote them are not needed.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.checkpoints.caches import quantize_caches
from qat.checkpoints.exported import hook_inputs, stack_inputs
from qat.checkpoints.hf import check_loading, quiet
from qat.checkpoints.layouts import READERS, TARGETS, open_export
from qat.checkpoints.layouts.arguments import input_format
from qat.checkpoints.layouts.reader import ExportedFolder, PackedModule
from qat.checkpoints.names import StoredNames, missing_names, stored_names
from qat.checkpoints.peft import adapter_of, put_adapter
from qat.checkpoints.progress import progress
from qat.engines.experts import Matrices, pack_experts
from qat.engines.norms import fuse_norms
from qat.engines.stacks import stack_readers
from qat.engines.tables import is_table, put_table, set_heads_aside
from qat.errors import CheckpointError, FormatError, UnsupportedError
from qat.families import find_family, fused_sets
from qat.kernels.device import device_of
from qat.kernels.load import cpu_problem, load
from qat.kernels.quantized_matmul.choose import rounded_reason
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.serving.matmul import QuantizedLinear, hold
from qat.serving.matmul import problem as pair_problem
from qat.serving.packed import PackedLinear, pack, problem
from qat.text import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = tuple(READERS)


class PackedConfig(QuantizationConfigMixin):
    """The checkpoint's `quantization_config` as it is."""

    def __init__(self, quant_method: str, **given: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers takes any string
        self.given = given

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": self.quant_method, **self.given}


class StoredLinear(nn.Module):
    """A linear layer or embedding while its checkpoint is being read: parameters named, typed and shaped as stored.

    Some classes initialise layers through their parents, by the name `weight` (GPTBigCode's `c_proj`): where no such
    tensor is stored there is an empty one, which counts as read.
    """

    def __init__(self, bias: nn.Parameter | None, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        if "weight" not in tensors:
            self.weight = torch.empty(0)
            self.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            self.register_parameter("bias", bias)


class PackedQuantizer(HfQuantizer):
    """Reads packed layers into `PackedLinear`, and quantizes their inputs as the checkpoint asks."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UnsupportedError("packed checkpoints are read from a folder or the hub, not from a state dict")
        self.dtype = model.dtype  # that of the first parameter, which may soon be a stored one
        self.exported = open_export(Path(files[0]).parent)
        self.exported.reader.verify_complete()
        self.stored = stored_names(model, self.exported.dense_names)
        own, rows = self.stored.modules, self.stored.rows
        self.layers = {own[path]: module for path, module in self.exported.modules.items() if path in own}
        unknown = sorted(path for name, path in self.exported.weights.items() if path not in own and name not in rows)
        if unknown:
            raise UnsupportedError(
                f"{len(unknown)} quantized layers are neither linear layers nor experts of {type(model).__name__} "
                f"({unknown[0]}, ...); qat.checkpoints.exported.load_exported reads them densely"
            )
        _check_names(model, self.exported, self.stored)
        self.tables = {path for path in self.layers if is_table(model.get_submodule(path), path)}
        self.heads = set_heads_aside(model, self.layers)
        for head, table in self.heads.items():
            self.exported.check_tied(self.stored.paths[head], self.stored.paths[table])
        self._set_experts_aside(model)
        for path, module in self.layers.items():
            of_layers = self.exported.quantized_names - self.exported.cache_names
            names = [name for name in of_layers if name.startswith(f"{module.path}.")]
            stored = {name[len(module.path) + 1 :]: self.exported.reader.empty(name) for name in names}
            layer = model.get_submodule(path)
            shape, expected = self.exported.shape(module.path), tuple(layer.get_parameter("weight").shape)
            if shape != expected:
                raise CheckpointError(
                    f"{module.path}.weight is stored as {[*shape]}, config.json asks for {[*expected]}"
                )
            model.set_submodule(path, StoredLinear(layer._parameters.get("bias"), stored))

    def _set_experts_aside(self, model: "PreTrainedModel") -> None:
        """Packed experts are read from the file afterwards: transformers must not look for them, or make them up."""
        self.stacks: dict[str, dict[str, dict[str, slice]]] = {}  # module, stack, checkpoint path
        packed = self.exported.weights
        for name in packed.keys() & self.stored.rows.keys():
            place, part = self.stored.rows[name]
            owner, _, slot = place.rpartition(".")
            self.stacks.setdefault(owner, {}).setdefault(slot, {})[packed[name]] = part
        for name, (stack, _) in self.stored.rows.items():
            if stack.rpartition(".")[0] in self.stacks and name not in packed:
                raise UnsupportedError(
                    f"{name} is dense, but other experts of its layer are quantized: they cannot be served packed in "
                    "part; qat.checkpoints.exported.load_exported reads them densely"
                )
        self.experts = {owner: model.get_submodule(owner) for owner in self.stacks}
        for owner in self.stacks:
            model.set_submodule(owner, nn.Identity())
        if self.exported.caches:
            _expect(model, [re.escape(name) for name in self.exported.cache_names])
        if self.stacks:  # under their names in the file, and as transformers renames them
            paths = [path for stacks in self.stacks.values() for each in stacks.values() for path in each]
            stored = {re.sub(r"\.\d+\.[^.]+$", "", path) for path in paths}
            names = "|".join(re.escape(name) for name in (*self.stacks, *sorted(stored)))
            _expect(model, [rf"^(?:{names})\."])

    def _pack_experts(self, model: "PreTrainedModel", dense: dict[str, list[str]]) -> None:
        """Put packed experts in their places; those that have to be dense are added to `dense`, by reason."""
        inputs = stack_inputs(self.exported, "vllm", self.stored.rows)
        with progress("packing experts", len(self.stacks)) as advance:
            for owner, stacks in self.stacks.items():
                module: Any = self.experts[owner]
                packed: dict[str, Matrices] = {}
                for slot, paths in stacks.items():
                    high = module._parameters[slot].shape[-1 if module.is_transposed else -2]
                    biases = self._biases(model, owner, slot)
                    for path, rows in paths.items():
                        tensors = {name: t.to(model.device) for name, t in self.exported.layer(path).items()}
                        q = TARGETS[self.exported.METHOD].unpack(self.exported.modules[path], tensors)
                        for number, one in enumerate(_one_by_one(q)):
                            first = (rows.start or 0) + number * high
                            layer, reason = self._matrix(one, biases.get(first // high), self.dtype)
                            if reason is not None:
                                _note_dense(dense, one, reason, path)
                            packed.setdefault(slot, {})[first // high, first] = layer
                pack_experts(module, packed, inputs.get(owner, {}))
                model.set_submodule(owner, module)
                advance(1)

    def _biases(self, model: "PreTrainedModel", owner: str, slot: str) -> dict[int, torch.Tensor]:
        """The bias of each expert's matrix, where the class has biases; they are set aside with the stacks."""
        place = f"{owner}.{slot}_bias"
        if place.rpartition(".")[2] not in self.experts[owner]._parameters:
            return {}
        name = next((name for name, own in self.stored.origins.items() if own == place), None)
        if name is None:
            raise UnsupportedError(f"{place} is not stored as one tensor; load_exported reads such experts densely")
        return dict(enumerate(self.exported.reader.get(name).to(model.device, self.dtype)))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        load()
        dense: dict[str, list[str]] = {}
        with progress("packing weights", len(self.layers)) as advance:
            for path, module in self.layers.items():
                stored = model.get_submodule(path)
                tensors = {name: parameter.detach() for name, parameter in stored.named_parameters()}
                bias, q = tensors.pop("bias", None), TARGETS[self.exported.METHOD].unpack(module, tensors)
                try:
                    layer, reason = self._layer(module, q, bias, self.dtype)
                except FormatError as error:
                    raise CheckpointError(f"{module.path}: {error}") from error
                if reason is not None:
                    _note_dense(dense, q, reason, path)
                if path in self.tables:
                    put_table(model, path, layer.train(stored.training), self.heads, self.dtype)
                else:
                    model.set_submodule(path, layer.train(stored.training))
                advance(1)
        hook_inputs(model, self.exported, "vllm", {module.path: path for path, module in self.layers.items()})
        self._pack_experts(model, dense)
        quantize_caches(model, self.exported, "vllm", self.stored)
        if model.device.type == "cuda" and adapter_of(self.exported.folder) is None:  # adapters sit on single layers
            stack_readers(model, fused_sets(self.layers, find_family(self.exported.config.get("model_type")).fused))
        for reason, paths in dense.items():
            warnings.warn(f"{some(paths, 1)}: {reason}", stacklevel=2)
        for parameter in model.parameters():  # transformers 5.17 leaves what it renames in the type of the file
            if parameter.dtype == torch.bfloat16 and self.dtype == torch.float32:
                parameter.data = parameter.data.to(self.dtype)
        _warn_of_slow_paths(model)
        del self.exported, self.layers, self.experts  # open files: they would keep the model from being copied
        return model

    def _layer(
        self, module: PackedModule, q: QTensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[nn.Module, str | None]:
        """The layer to serve with, and why it has to be a dense one, if it has."""
        input = None if module.input is None else input_format(module.input)
        if input is not None and multiplies_codes(input, q):
            static = self.exported.static_input(module.path) if input.global_scale else None
            scale = 1.0 if static is None else 1.0 / float(static)
            return QuantizedLinear(hold(q), input.name, scale, dtype, bias), None
        return self._matrix(q, bias, dtype)

    def _matrix(self, q: QTensor, bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[nn.Module, str | None]:
        """A layer whose input comes rounded, and why it has to be a dense one, if it has."""
        reason = problem(q.format)
        return (PackedLinear(pack(q), bias), None) if reason is None else (_dense(q.dequantize(dtype), bias), reason)

    def is_serializable(self) -> bool:
        """No: the checkpoint on disk is the thing to keep."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: packed weights have no gradient."""
        return False


def _expect(model: "PreTrainedModel", patterns: list[str]) -> None:
    """Let transformers find tensors in the file that it has no place for."""
    known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    model._keys_to_ignore_on_load_unexpected = known | set(patterns)


def _note_dense(dense: dict[str, list[str]], q: QTensor, reason: str, path: str) -> None:
    dense.setdefault(f"{q.format.name} weights are dense, no faster than BF16: {reason}", []).append(path)


def _check_names(model: "PreTrainedModel", exported: ExportedFolder, stored: StoredNames) -> None:
    """Refuse what transformers would make up (missing tensors, other shapes, which some versions do not report) or drop
    (of quantized layers, what nothing reads)."""
    expected: set[str] = set(exported.cache_names)
    for path, module in exported.modules.items():
        keys = exported.expected_tensors(module, *exported.shape(path))
        expected |= {exported.tensor_name(path, key) for key in keys}
    missing = sorted({*missing_names(model, stored, exported.dense_names), *(expected - exported.names)})
    dense = stored.tensors.keys() - exported.weights.keys()
    surplus = sorted(n for n in exported.names - expected - dense if n.rpartition(".")[0] in exported.modules)
    for names, what in ((missing, "is missing"), (surplus, "belongs to a quantized layer, but nothing reads it")):
        if names:
            raise CheckpointError(f"{exported.folder}: {some(names, 1)} {what}")
    for name in sorted(dense & exported.names):
        size, own = exported.reader.info(name).shape, stored.tensors[name].shape
        if tuple(size) != tuple(own):
            raise CheckpointError(f"{exported.folder}: {name} is {[*size]}, config.json asks for {[*own]}")


def _one_by_one(q: QTensor) -> list[QTensor]:
    """The matrices of a stack."""
    if q.codes.dim() == 2:
        return [q]
    scales = q.scales.stored.chunk(len(q.codes))
    return [QTensor(q.format, codes, Scales(each)) for codes, each in zip(q.codes, scales, strict=True)]


def multiplies_codes(input: Format, weight: QTensor) -> bool:
    """Whether a layer with quantized inputs multiplies codes here: where `qat::quantized_matmul` has a kernel, and the
    faster one.

    Elsewhere inputs are rounded and the weight stays packed, which is the same product in wider arithmetic.
    """
    if not weight.codes.is_cuda or "cuda" not in load() or pair_problem(input, weight.format) is not None:
        return False
    capability = device_of(weight.codes).capability
    return rounded_reason(input, weight.format, weight.codes.shape[-1], capability) is None


def _dense(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]  # as in torch
    return layer


def _warn_of_slow_paths(model: nn.Module) -> None:
    kinds = {layer.words.device.type for layer in model.modules() if isinstance(layer, PackedLinear)}
    for kind in kinds - set(load()):
        reason = cpu_problem() if kind == "cpu" else "no Triton kernel for this device"
        warnings.warn(f"on {kind}, weights are dequantized at every call, slower than BF16: {reason}", stacklevel=3)


# --- in and out of transformers -------------------------------------------------------------------

_Entry = tuple[Any, Any]
_before: dict[str, _Entry] = {}


def install() -> None:
    """Let transformers load checkpoints of `METHODS` packed, in this process, until `uninstall`."""
    for method in METHODS:
        if method not in _before:
            quantizers, configs = _tables()
            _before[method] = quantizers.get(method), configs.get(method)
            quantizers[method], configs[method] = partial(_quantizer, quantizers.get(method)), PackedConfig


def _quantizer(before: Any, config: Any, **options: Any) -> HfQuantizer:
    """Ours for a checkpoint, transformers' own where the user quantizes with a config of its class."""
    quantizer: HfQuantizer = (
        PackedQuantizer(config, **options) if isinstance(config, PackedConfig) else before(config, **options)
    )
    return quantizer


def uninstall() -> None:
    """Give transformers its own quantizers back; models that are loaded stay as they are."""
    for method, entries in _before.items():
        for table, entry in zip(_tables(), entries, strict=True):
            if entry is None:
                del table[method]
            else:
                table[method] = entry
    _before.clear()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for a block."""
    was = bool(_before)
    install()
    try:
        yield
    finally:
        if not was:
            uninstall()


def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def compute_dtype(device: str) -> torch.dtype:
    """BF16 where it is fast. CPUs without BF16 units emulate its products, several times slower than float32."""
    fast = device not in ("cpu", "auto") or torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """One line instead of transformers' tracebacks: no weights, or another tool's format whose package is missing."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def load_packed(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> "PreTrainedModel":
    """The model in an exported folder, in eval mode, its weights packed, with the adapter beside them if it has one.

    Args:
        folder: a checkpoint of one of `METHODS`.
        dtype: of the activations; None takes `compute_dtype`.
        device: where to put it.

    Raises:
        CheckpointError: tensors are missing, surplus or damaged; named.
        UnsupportedError: layers that cannot be served packed.
    """
    with installed(), quiet(), loading(folder):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or compute_dtype(device),
            device_map=device,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loading refuses them by name
        )
    model, info = pair
    check_loading(model, info, folder)
    put_adapter(model, folder)
    if model.device.type == "cuda":
        fuse_norms(model)
    loaded: PreTrainedModel = model.eval()
    return loaded
