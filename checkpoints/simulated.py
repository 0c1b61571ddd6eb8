"""Exported folders as engines on Ascend NPUs would run them, on this machine: the quantized layers by simulated
operators, everything else by transformers. For text and scores (`qat generate`, `qat eval`), and for the check of
`qat verify --engine` that this is what was trained.

The simulation follows vllm-ascend, from CANN's documents; no NPU was asked (docs/ascend.md).
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from qat.checkpoints import simulated_experts
from qat.checkpoints.caches import stored_caches
from qat.checkpoints.exported import load_exported, quantize_stack_inputs, stack_inputs
from qat.checkpoints.layouts import TARGETS, ExportedFolder, npu, open_export, support
from qat.checkpoints.layouts.arguments import input_format, weight_format
from qat.checkpoints.layouts.ascend.simulate import SimulatedLinear
from qat.checkpoints.layouts.ascend.simulate_experts import SimulatedExperts, problem, stacked
from qat.checkpoints.layouts.ascend.types import BY_NAME, Type, find_type
from qat.checkpoints.layouts.ascend.write import METHOD, tensors_of
from qat.checkpoints.layouts.fp8 import simulate as blocks
from qat.checkpoints.layouts.fp8.write import METHOD as BLOCKS
from qat.checkpoints.layouts.reader import HALF_RULE, NPU_RULE
from qat.checkpoints.names import stored_names
from qat.checkpoints.progress import progress
from qat.checkpoints.simulated_caches import simulate_caches, simulated_and_trained
from qat.errors import CheckpointError, UnsupportedError
from qat.families import expert_list
from qat.numbers.format import Format
from qat.text import some
from qat.training.activations import Reader, fake_quantize_input
from qat.training.npu import NPU_RULES
from qat.training.phases import Phase, answering

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16  # that a layer is checked with
PER_ELEMENT, PER_RMS, IN_NORM = 2.0**-7, 2.0**-8, 2.0**-8


def is_simulated(folder: Path) -> bool:
    """Whether the folder is one that only engines on NPUs load."""
    return open_export(folder).METHOD == METHOD


def load_simulated(folder: Path, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The model in an exported folder, in eval mode, its quantized layers simulated; the rest computes in `dtype`.

    Raises:
        CheckpointError: tensors are missing, surplus or damaged.
        UnsupportedError: formats that no engine on an NPU loads.
    """
    exported = open_export(folder)
    model = load_exported(folder, dtype=dtype, quantize_inputs=False)
    stored = stored_names(model, exported.dense_names)
    with progress(f"simulating {folder.name}", len(exported.modules)) as advance:
        for path in exported.modules:
            if (place := stored.modules.get(path)) is not None:
                layer = model.get_submodule(place)
                model.set_submodule(place, simulated(exported, path, layer._parameters.get("bias")))
            advance(1)
    simulate_caches(model)
    stacks = stack_inputs(exported, rule_of(exported), stored.rows)
    why = {path: _simulate_experts(model, exported, path, stored.rows) for path in stacks}
    if left := {path: reason for path, reason in why.items() if reason}:
        quantize_stack_inputs(model, {path: stacks[path] for path in left})
        each = some([f"{path}: {reason}" for path, reason in left.items()])
        warnings.warn(f"experts are fake-quantized by the NPU's rule, not simulated: {each}", stacklevel=2)
    return model


def _simulate_experts(
    model: "PreTrainedModel", exported: ExportedFolder, path: str, rows: dict[str, tuple[str, slice]]
) -> str:
    """Put simulated experts at `path`; returns why they stay, "" where they do not."""
    own = {each: rows[name] for each in exported.modules if (name := each + exported.DENSE) in rows}
    places = {each: place for each, place in own.items() if place[0].rpartition(".")[0] == path}
    kinds: dict[str, set[str]] = {}
    for each, (stack, _) in places.items():
        kinds.setdefault(stack.rpartition(".")[2], set()).add(_kind(exported, each)[0].name)
    experts: Any = model.get_submodule(path)
    if reason := problem(experts, kinds):
        return reason
    parts: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
    for each, (stack, part) in places.items():
        parts.setdefault(stack.rpartition(".")[2], []).append((part.start, exported.layer(each)))
    ((name,), *_) = kinds.values()
    tensors, model_type = {stack: stacked(matrices) for stack, matrices in parts.items()}, NPU_RULES[rule_of(exported)]
    model.set_submodule(path, SimulatedExperts(BY_NAME[name], tensors, experts.num_experts, model_type))
    return ""


def simulated(exported: ExportedFolder, path: str, bias: Tensor | None = None) -> SimulatedLinear:
    """One layer of a checkpoint.

    Raises:
        UnsupportedError: its formats are no type of an NPU's.
    """
    kind, _, _ = _kind(exported, path)
    added = None if kind.input == "tensor" and exported.METHOD == METHOD else bias
    tensors, model = _tensors(exported, path, kind), NPU_RULES[rule_of(exported)]
    return SimulatedLinear(kind, tensors, added, model, expert_list(path) is not None)


def _tensors(exported: ExportedFolder, path: str, kind: Type) -> Mapping[str, Tensor]:
    """What is stored of a layer, as a checkpoint of Ascend's own would have it."""
    tensors = exported.layer(path)
    if exported.METHOD == METHOD:
        return tensors
    q = TARGETS[exported.METHOD].unpack(exported.modules[path], tensors)
    made = tensors_of(kind, q, exported.static_input(path))
    if kind.is_static:  # whose product vllm-ascend then computes itself, in the model's type
        scales = q.scales.stored.to(torch.bfloat16).flatten() * made["input_scale"].to(torch.bfloat16)
        made["deq_scale"] = scales.to(torch.float32)
    return made


def rule_of(exported: ExportedFolder) -> str:
    """The rule of an NPU that the folder is for: one with FP16 models, or with BF16 ones."""
    return HALF_RULE if exported.rule == HALF_RULE else NPU_RULE


def _kind(exported: ExportedFolder, path: str) -> tuple[Type, Format, Format | None]:
    module = exported.modules[path]
    weight = weight_format(module.weights)
    input = None if module.input is None else input_format(module.input)
    kind = find_type(weight, input)
    if kind is None or module.rotation:
        raise UnsupportedError(
            f"{path}: {weight.name} with {input.name if input else 'dense'} inputs has no simulation"
        )
    return kind, weight, input


# --- verify ---------------------------------------------------------------------------------------


def engine_checks(engine: npu.Engine | None) -> dict[str, Callable[[Any], str]]:
    """`check_engine` by the engine's name, as `qat.checkpoints.verify` takes it."""
    return {} if engine is None else {engine: lambda subject: check_engine(subject.exported, engine)}


def check_engine(exported: ExportedFolder, engine: npu.Engine) -> str:
    """Whether an engine loads every layer, and its operators compute what was trained, or what is documented that it
    makes of the layer; says on which devices, and how far from the trained layer they are that compute something else.

    Raises:
        CheckpointError: it does not; names the layers.
    """
    devices, worst = _reading_caches(exported, engine) & _of_type(exported), 0.0
    away: dict[npu.Device, float] = {}
    with progress(f"simulating {engine}", len(exported.modules), "layers") as advance:
        for path, module in exported.modules.items():
            weight = weight_format(module.weights)
            input = None if module.input is None else input_format(module.input)
            row = support.find(TARGETS[exported.METHOD].ROWS, weight, input)
            devices &= {device for device in devices if npu.loads(row, engine, device, path)}
            if (said := npu.unpaired(path, weight, exported.shape(path)[-1])) and engine == npu.ENGINES[0]:
                raise CheckpointError(said)
            if not devices:
                raise CheckpointError(
                    f"{path}: no device on which {engine} loads the layers before has a loader of {exported.METHOD} "
                    f"{weight.name} with {input.name if input else 'dense'} inputs; it loads {_loaded(engine)}"
                )
            for device in sorted(devices) if exported.METHOD == BLOCKS else sorted(devices)[:1]:
                apart, from_trained = _compared(exported, path, device)
                if apart > 1:
                    raise CheckpointError(
                        f"{path}: simulated operators of {engine} are {apart:.1f} times the bound from what was trained"
                    )
                worst, away[device] = max(worst, apart), max(away.get(device, 0.0), from_trained)
            advance(1)
    worst = max(worst, _check_caches(exported, engine), _check_experts(exported, engine))
    said = (
        f"{len(exported.modules)} layers{f' and {count} caches' if (count := len(exported.caches)) else ''} "
        f"load on {', '.join(sorted(devices))} ({npu.VERSIONS[engine]}); simulated "
        f"operators differ from fake quantization by {worst:.2f} of the bound at most"
    )
    if exported.METHOD != BLOCKS:
        return said
    parts = [f"{device} {away[device]:.3f}" for device in sorted(devices)]
    return f"{said}; it computes in other formats than were trained, and is from those, in norm: {', '.join(parts)}"


def _check_caches(exported: ExportedFolder, engine: npu.Engine) -> float:
    """How far simulated attention is from fake quantization at most, in units of the bound.

    Raises:
        CheckpointError: it is beyond; names the layer.
    """
    found = {path: distance(*simulated_and_trained(exported, path)) for path in exported.caches}
    if beyond := [path for path, far in found.items() if far > 1]:
        raise CheckpointError(
            f"{beyond[0]}: simulated attention of {engine} is {found[beyond[0]]:.1f} times the bound from what was "
            "trained"
        )
    return max(found.values(), default=0.0)


def _check_experts(exported: ExportedFolder, engine: npu.Engine) -> float:
    """How far the experts of a list are from fake quantization at most, both products and their gate, in units of the
    bound; of MX types, whose weights are what was trained to the last bit.

    Raises:
        CheckpointError: it is beyond; names the list.
    """
    worst = 0.0
    for owner, few in simulated_experts.lists(exported.modules).items() if exported.METHOD != BLOCKS else ():
        kinds = {kind.name: (kind, input) for path in few[0] for kind, _, input in (_kind(exported, path),)}
        ((kind, input), *others) = kinds.values()
        if others or not kind.is_mx or input is None:
            continue
        experts = [
            [
                simulated_experts.Matrix(_tensors(exported, path, kind), exported.multiplied(path).float())
                for path in three
            ]
            for three in few
        ]
        found, expected, added = simulated_experts.simulated_and_trained(kind, input, rule_of(exported), experts)
        bound = PER_ELEMENT * added + PER_RMS * expected.square().mean().sqrt()
        far = float(((found - expected).abs() / bound).max().nan_to_num(nan=float("inf")))
        if far > 1:
            raise CheckpointError(
                f"{owner}: simulated experts of {engine} are {far:.1f} times the bound from what was trained"
            )
        worst = max(worst, far)
    return worst


def _reading_caches(exported: ExportedFolder, engine: npu.Engine) -> set[npu.Device]:
    """The devices on which the engine reads the folder's caches; all where they are not quantized.

    Raises:
        CheckpointError: there is none.
    """
    given = stored_caches(exported)
    if not given:
        return set(npu.DEVICES)
    layout = TARGETS[exported.METHOD].CACHES if exported.caches else None
    devices = {device for device in npu.DEVICES if npu.loads(layout, engine, device)}
    if not devices:
        formats = dict.fromkeys(fmt.name for roles in given.values() for fmt, _ in roles.values())
        raise CheckpointError(
            f"keys and values are {' and '.join(formats)}, and {engine} does not read such caches from a folder of "
            f"{exported.METHOD}"
        )
    return devices


def _of_type(exported: ExportedFolder) -> set[npu.Device]:
    """The devices that compute in the model's type."""
    half: set[npu.Device] = {npu.HALF}
    return half if rule_of(exported) == HALF_RULE else set(npu.DEVICES) - half


def _loaded(engine: npu.Engine) -> str:
    every = ((name, row) for name, target in TARGETS.items() for row in target.ROWS)
    return some([f"{row.scheme} ({name})" for name, row in every if any(one.engine == engine for one in row.npu)])


def _compared(exported: ExportedFolder, path: str, device: npu.Device) -> tuple[float, float]:
    """How far the simulated layer is from fake quantization in the formats that the engine computes in, in units of the
    bound, for inputs that fill its range; and from the trained formats, as a part of the norm."""
    static = exported.static_input(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, exported.shape(path)[-1], generator=generator)
    if static is not None:  # a few values beyond the range, so that clipping is seen, too
        x = (x * 48 - (static[1:] if static.numel() > 1 else 0.0)) * static[0]
    rule = rule_of(exported)
    x = x.to(NPU_RULES[rule])
    wide = x.float()
    weight, bias = exported.multiplied(path).float(), f"{path}.bias"
    added = exported.reader.get(bias).float() if bias in exported.names else None
    if exported.METHOD == BLOCKS:
        return _blocks(exported, path, device, x, weight, added)
    _, _, input = _kind(exported, path)
    reader: Reader = "layer" if expert_list(path) is None else "experts"
    layer, worst = simulated(exported, path, added), 0.0
    for phase in get_args(Phase) if layer.mixes else get_args(Phase)[:1]:
        with answering(phase):
            read = wide if input is None else fake_quantize_input(wide, input, rule, "ste", static, reader)
            expected = torch.nn.functional.linear(read, weight, added)
            worst = max(worst, distance(layer(x).float(), expected, x.dtype))
    return worst, 0.0


def _blocks(
    exported: ExportedFolder, path: str, device: npu.Device, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[float, float]:
    """The same of FP8 in blocks, which no NPU multiplies: BF16, or MXFP8 of weight and input."""
    module = exported.modules[path]
    assert module.input is not None
    layer = blocks.simulated(exported.layer(path), module.weights["block_structure"], device, bias)
    wide, again = x.float(), blocks.rounds_again(device, x.shape[-1])
    trained = fake_quantize_input(wide, input_format(module.input), exported.RULE, "ste", None)
    product, found = torch.nn.functional.linear, layer(x).float()
    truth = product(trained, weight, bias)
    if again is None:
        expected = product(wide, weight, bias)
    else:
        read, held = (fake_quantize_input(t, again, NPU_RULE, "ste", None) for t in (wide, weight))
        expected = product(read, held, bias)
    return distance(found, expected), float((found - truth).norm() / truth.norm())


def distance(found: Tensor, expected: Tensor, model: torch.dtype = torch.bfloat16) -> float:
    """The smaller of two: the largest difference of an element over 2^-7 of it plus 2^-8 of the root mean square, and
    the difference's norm over 2^-8 of the whole. Of an FP16 model, an eighth of that: it has three bits more, and its
    weights are not rounded in training."""
    difference = (found - expected).double()
    rms = expected.double().square().mean().sqrt()
    element = (difference.abs() / (PER_ELEMENT * expected.double().abs() + PER_RMS * rms)).max()
    norm = difference.norm() / (IN_NORM * expected.double().norm())
    finer = torch.finfo(torch.bfloat16).eps / torch.finfo(model).eps
    return float(torch.minimum(element, norm).nan_to_num(nan=float("inf"))) * finer
