"""What a run keeps on disk: the best student, and the state from which training goes on exactly.

Both are folders of safetensors plus a small JSON, written under another name and renamed when complete, so whatever
kills the process leaves the last good one loadable. Nothing is pickled.

    runs/<name>/checkpoints/best/            student.safetensors, state.json
    runs/<name>/checkpoints/step-00000040/   student, optimizer, average, random state

With LoRA those hold what training moves, and best/ the adapter in peft's format; what the initialisation moved and
training does not is kept once:

    runs/<name>/checkpoints/base/            base.safetensors
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat import zero
from qat.adapters import candidates
from qat.checkpoints.folders import atomic_folder
from qat.checkpoints.hf import ModelConfig, load_configured
from qat.checkpoints.layouts.reader import digest
from qat.checkpoints.origin import is_path, locate
from qat.checkpoints.peft import write_adapter
from qat.checkpoints.progress import counted
from qat.config import load_yaml, validate
from qat.errors import CheckpointError
from qat.lora import LoraConfig, adapters, attach, is_adapter, merge
from qat.quantizer import LEARNED, WeightQuantizer
from qat.scheme import Rule, Scheme, upgraded
from qat.sharded import put, whole
from qat.surgery import apply, rotate_inputs

BEST, BASE = "best", "base"
STUDENT, _FROZEN = "student.safetensors", "base.safetensors"
_OPTIMIZER, _AVERAGE, _RANDOM = "optimizer.safetensors", "average.safetensors", "random.safetensors"
_STATE = "state.json"


def student_tensors(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that training may move by name, a shared one once (under its first name),
    on CPU. With adapters that is all but matrices and what of the quantizers is fixed.

    Args:
        keep: False gives none: a process that only has to help the others with a divided model.
    """
    return _on_cpu(_moving(model), keep)


def _moving(model: nn.Module) -> dict[str, Tensor]:
    tensors = _named(model)
    if not adapters(model):
        return tensors
    fixed = _fixed(model)
    return {name: tensor for name, tensor in tensors.items() if name not in fixed}


def _on_cpu(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.cpu().contiguous()
    return found


def _fixed(model: nn.Module) -> set[str]:
    """Tensors that stay as they are while adapters are trained."""
    fixed = {n for n, p in model.named_parameters() if p.dim() >= 2 and not is_adapter(n)}
    fixed |= {name for name, _ in model.named_buffers()}
    for path, module in model.named_modules():
        if isinstance(module, WeightQuantizer):
            names = [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
            fixed -= {f"{path}.{name}" for name in names if name in LEARNED or module.learn == "refit"}
    return fixed


def _named(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Digests of the matrices, to tell after the initialisation which of them it moved."""
    matrices = {n for n, p in model.named_parameters() if p.dim() >= 2}
    tensors = _named(model)
    return {
        n: digest(_on_cpu({n: tensors[n]})[n])
        for n in counted(matrices & tensors.keys(), "reading weights", len(matrices), "weights")
    }


def save_base(run: Path, model: nn.Module, before: dict[str, str]) -> None:
    """Keep what the initialisation left and adapters do not move: scales and ranges, and matrices that differ from
    `before`."""
    fixed = _fixed(model)
    tensors = {n: t for n, t in _on_cpu(_named(model)).items() if n in fixed and before.get(n) != digest(t)}
    folder = run / "checkpoints" / BASE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, overwrite=True, expected_bytes=_bytes(tensors)) as partial:
        save_file(tensors, partial / _FROZEN)


def restore_base(run: Path, model: nn.Module) -> None:
    """Put the base of a run with adapters into the model that it was trained from.

    Raises:
        CheckpointError: it is missing, or of another model.
    """
    file = run / "checkpoints" / BASE / _FROZEN
    if not file.is_file():
        raise CheckpointError(f"{run} trained adapters, but the base they belong to ({file}) is missing")
    tensors, state = load_file(file), model.state_dict(keep_vars=True)
    needed = _fixed(model) & state.keys() - {name for name, _ in model.named_parameters()}
    if wrong := [
        n for n in needed | tensors.keys() if n not in state or n not in tensors or state[n].shape != tensors[n].shape
    ]:
        raise CheckpointError(
            f"{file} does not fit this model: {sorted(wrong)[:3]}; was the scheme or the model changed?"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def restore_student(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved values into a model that the same scheme was applied to.

    Raises:
        CheckpointError: a tensor is missing, surplus, or of another shape.
    """
    own = _moving(model)
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    tensors = {name: _with_dimension(t, zero.shape(own[name])) if name in own else t for name, t in tensors.items()}
    wrong = [name for name in own.keys() & tensors.keys() if zero.shape(own[name]) != tensors[name].shape]
    if missing or surplus or wrong:
        raise CheckpointError(
            f"the saved student does not fit this model: missing {missing[:3]}, surplus {surplus[:3]}, "
            f"shapes {wrong[:3]}; was the scheme or the model changed since it was saved?"
        )
    for name, tensor in tensors.items():
        put(own[name], tensor)


def _with_dimension(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Learned input ranges were saved without a dimension by earlier releases."""
    return tensor.view(1) if tensor.dim() == 0 and shape == (1,) else tensor


def save_best(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], lora: LoraConfig | None = None) -> None:
    """Replace the best student; what is trained with `lora` also gets an adapter's files."""
    folder = run / "checkpoints" / BEST
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, overwrite=True, expected_bytes=_bytes(tensors)) as partial:
        save_file(tensors, partial / STUDENT)
        if lora is not None:
            write_adapter(partial, tensors, lora)
        (partial / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def save_state(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    state: dict[str, Any],
    write: bool = True,
) -> Path:
    """Write everything that training needs to go on after `step`, then delete older states.

    Args:
        write: False only helps the process that writes, see `student_tensors`.
    """
    student = student_tensors(model, write)
    moments = _moments(model, optimizer, write)
    averages = None if average is None else _on_cpu(average, write)
    root = run / "checkpoints"
    folder = root / f"step-{step:08d}"
    if not write:
        return folder
    root.mkdir(parents=True, exist_ok=True)
    size = _bytes(student) + _bytes(moments) + _bytes(averages or {})
    with atomic_folder(folder, overwrite=True, expected_bytes=size) as partial:
        save_file(student, partial / STUDENT)
        save_file(moments, partial / _OPTIMIZER)
        save_file(_random_state(), partial / _RANDOM)
        if averages is not None:
            save_file(averages, partial / _AVERAGE)
        (partial / _STATE).write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
    for old in _states(run):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _states(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def has_state(run: Path) -> bool:
    """Whether training can go on from something in `run`."""
    return any((folder / _STATE).is_file() for folder in _states(run))


def last_state(run: Path) -> Path:
    """The newest complete resumable state.

    Raises:
        CheckpointError: there is none.
    """
    states = [folder for folder in _states(run) if (folder / _STATE).is_file()]
    if not states:
        raise CheckpointError(f"{run} holds no resumable state (checkpoints/step-*); start it without --resume")
    return states[-1]


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a saved state."""
    state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return state


def restore_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Bring model, optimizer and random generators back; returns the JSON state and the averaged weights."""
    restore_student(model, load_file(folder / STUDENT))
    _restore_optimizer(model, optimizer, load_file(folder / _OPTIMIZER))
    random = load_file(folder / _RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    average = load_file(folder / _AVERAGE) if (folder / _AVERAGE).is_file() else None
    if average is not None:
        shapes = {name: zero.shape(parameter) for name, parameter in model.named_parameters()}
        average = {name: _with_dimension(tensor, shapes[name]) for name, tensor in average.items()}
    return read_state(folder), average


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Tensor]:
    division = zero.of(model)
    if division is not None:
        return zero.moments(division, keep)
    return _on_cpu(_optimizer_tensors(model, optimizer), keep)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    if unknown := [name for name in (key.rpartition("/")[0] for key in tensors) if name not in parameters]:
        raise CheckpointError(f"the saved optimizer knows {unknown[0]!r}, which this model does not have")
    if (division := zero.of(model)) is not None:
        zero.restore_moments(division, tensors)
        return
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps its step counts wherever the fused kernel wants them; moments live beside their parameter.
        if kind == "step":
            optimizer.state[parameter][kind] = value.to(parameter.device)
            continue
        optimizer.state[parameter][kind] = moment = torch.empty_like(parameter, dtype=value.dtype)
        put(moment, _with_dimension(value, parameter.shape))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load_student(
    run: Path, checkpoint: str = BEST, moved: Path | str | None = None
) -> tuple[nn.Module, Path, dict[str, Any]]:
    """Rebuild a trained student from a run folder.

    Args:
        run: a folder written by `qat train`.
        checkpoint: "best", or the name of a folder below `checkpoints/`.
        moved: where the model that the run was made from is now, if its path changed.

    Returns:
        The model with its fake-quantized layers and trained values (adapters merged, or beside their layers), the
        source folder, and the saved state.

    Raises:
        CheckpointError: not a run, no such checkpoint, or its model is gone or another one.
    """
    if not (run / "job.yaml").is_file():
        raise CheckpointError(f"{run} is not a run: it holds no job.yaml (runs are written by `qat train`)")
    job = load_yaml(run / "job.yaml")
    folder = run / "checkpoints" / checkpoint
    if not (folder / STUDENT).is_file():
        have = sorted(p.name for p in (run / "checkpoints").glob("[!.]*") if (p / STUDENT).is_file())
        raise CheckpointError(f"{run} has no checkpoint {checkpoint!r}; it has: {', '.join(have) or 'none yet'}")
    config = validate(ModelConfig, job["model"], str(run / "job.yaml"))
    scheme = validate(Scheme, upgraded(job["scheme"]), str(run / "job.yaml"))
    source = locate(config, moved, f"say where the model that {run} was made from is now: --model PATH")
    model = load_configured(config, source)
    tensors = load_file(folder / STUDENT)
    lora = lora_config(run)
    if lora is None:  # whose students have the scales by which the release shows
        scheme = _before_experts(scheme, model, tensors)
    rotate_inputs(apply(model, scheme, blank=True), scheme)
    if lora is None:
        restore_student(model, tensors)
    else:
        attach(model, lora)
        restore_base(run, model)
        restore_student(model, tensors)
        merge(model)
    # A path of this machine means nothing elsewhere, so only names that others can resolve are passed on.
    portable = None if is_path(config) else config.id
    return model, source, {**read_state(folder), "model": portable}


def lora_config(run: Path) -> LoraConfig | None:
    """What adapters a run trains, None where it trains weights."""
    given = load_yaml(run / "job.yaml").get("lora")
    return None if given is None else validate(LoraConfig, given, str(run / "job.yaml"))


def _before_experts(scheme: Scheme, model: nn.Module, tensors: dict[str, Tensor]) -> Scheme:
    """The scheme as the release read it that saved `tensors`. Earlier ones could not quantize fused experts, and called
    them by their module's path (`*.mlp.experts`), so that patterns such as `*_proj` did not speak of them."""
    weights = [candidate for candidate in candidates(model) if candidate.role == "weight"]
    quantized = {name.partition(".weight_quantizers.")[0] for name in tensors if ".weight_quantizers." in name}
    dense = [c for c in weights if len(c.slot.shape) > 2 and c.adapter is not None and c.module not in quantized]
    rules = {c.path: scheme.rule_for(c.path, c.module) for c in weights}
    if all(rule is None or rule.weight is None for rule in (rules[c.path] for c in dense)):
        return scheme
    pattern = "|".join(re.escape(candidate.path) for candidate in dense)
    rules.update(dict.fromkeys((candidate.path for candidate in dense), None))
    others = [rule for rule in scheme.rules if any(rule is used for used in rules.values())]
    skip = Rule(match=f"re:{pattern}", skip="experts, which the release that trained this left dense")
    return scheme.model_copy(update={"rules": (skip, *others)})
