"""Quantized training inside other trainers: what has to happen before (`prepare`) and after (`export`).

`prepare` leaves a Hugging Face model a Hugging Face model, with quantizers on its layers, and hangs everything else on
it by hooks: what follows an optimizer step (`step_hook`), and that checkpoints are whole (`whole_state`). So nothing
depends on which trainer it is given to. What the scheme was is kept in the model's config, which every checkpoint has.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.checkpoints.architecture import quiet
from qat.checkpoints.export import check_export, export_model
from qat.checkpoints.export_plan import DEFAULT_TARGET
from qat.checkpoints.hf import ModelConfig, is_local, local_folder, resolve
from qat.checkpoints.progress import counted
from qat.checkpoints.shards import ShardReader
from qat.checkpoints.wrapped import unwrapped, watch
from qat.config import load_yaml, validate
from qat.errors import CheckpointError, ConfigError, QatError, UnsupportedError
from qat.init.calibration import initialise, observe, unreached
from qat.init.scales import ScaleSearch
from qat.numbers.catalog import lookup
from qat.quantizer import Quantizer
from qat.scheme import Rule, Scheme
from qat.sites import sites
from qat.surgery import apply, report, rotate_inputs
from qat.text import some
from qat.trainers.called import WeightUses, check_called
from qat.trainers.optim import Cage, OptimConfig
from qat.trainers.packing import evaluating
from qat.trainers.step_hook import StepHook
from qat.trainers.whole_state import keep_whole, second_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "qat"  # key of a prepared model's config.json
PAIR = "+"  # between the formats of a preset
_STATE = "_qat_prepared"
Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What is known of a prepared model besides its tensors.

    Attributes:
        scheme: that was applied.
        source: folder of the unquantized model, or None where it is not known.
        hub_id: of the unquantized model, or None where it was a folder, whose path means nothing elsewhere.
        notes: what its initialisation and a later export have to say.
    """

    scheme: Scheme
    source: Path | None
    hub_id: str | None = None
    notes: tuple[str, ...] = ()


def prepare(
    model: "PreTrainedModel",
    scheme: Scheme | Mapping[str, Any] | str | Path,
    calibration: Batches | None = None,
    *,
    source: str | Path | None = None,
    refit_every: int = 5,
    cage: Cage | Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> "PreTrainedModel":
    """Quantize a loaded causal language model for training, in place; returns it.

    Args:
        model: as `from_pretrained` gives it. Its weights become float32, as masters of what is rounded have to be;
            mixed precision is the trainer's business.
        scheme: a Scheme, a table with its keys, the path of a YAML file with one (or of a job, whose `scheme` is
            taken), or a preset: `WEIGHT` or `WEIGHT+INPUT`, formats of all projections, the rest left alone.
        calibration: a few batches, each what `model(**batch)` takes; for activation ranges and the scheme's `init`.
        source: folder or hub id of the unquantized model, for the export; by default what the model was loaded from.
        refit_every: optimizer steps between two refits of scales with `learn: refit`.
        cage: damping of oscillation, see `qat.trainers.optim.Cage`; needs `steps`.
        steps: optimizer steps of the whole training.

    Raises:
        ConfigError: the scheme does not fit the model, or needs calibration that was not given.
        UnsupportedError: no export target could hold the model, or it is none that can be prepared.
    """
    optim = validate(OptimConfig, {"refit_every": refit_every, **({"cage": cage} if cage else {})}, "qat.prepare")
    if optim.cage.strength and steps is None:
        raise ConfigError("cage pulls harder towards the end, so it needs `steps`, the optimizer steps of the training")
    _check_model(model)
    chosen = as_scheme(scheme, calibrated=calibration is not None)
    if calibration is None:
        _check_needs_no_calibration(chosen)
    check_called(model, report(model, chosen))
    name = model.config.name_or_path or ""
    folder, notes = _source(source, name, getattr(model.config, "_commit_hash", None))
    model.float()
    apply(model, chosen, defer_init=calibration is not None)
    notes += [f"export: {note}" for note in check_export(model, folder)]
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    if calibration is not None:
        notes += _initialised(model, chosen, calibration)
    local = not name or Path(name).expanduser().exists()
    return _hung(model, Prepared(chosen, folder, None if local else name, tuple(notes)), optim, steps)


def load_prepared(
    folder: str | Path,
    *,
    source: str | Path | None = None,
    refit_every: int = 5,
    cage: Cage | Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> "PreTrainedModel":
    """The prepared model in a folder that `save_pretrained` wrote, a trainer's checkpoint for example, with its scales;
    to go on training, or to export it.

    Args:
        folder: of the checkpoint.
        source: as in `prepare`; needed for the export, since checkpoints name no folders.
        refit_every, cage, steps: as in `prepare`.

    Raises:
        CheckpointError: no prepared model was saved there, or tensors are missing or surplus.
    """
    import transformers

    folder = local_folder(Path(folder).expanduser())
    optim = validate(OptimConfig, {"refit_every": refit_every, **({"cage": cage} if cage else {})}, "qat.load_prepared")
    config = transformers.AutoConfig.from_pretrained(folder)
    record = getattr(config, RECORD, None)
    if not isinstance(record, dict) or "scheme" not in record:
        raise CheckpointError(f"{folder} holds no model that qat.prepare prepared: its config.json has no {RECORD!r}")
    scheme = validate(Scheme, record["scheme"], str(folder / "config.json"))
    kind: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    with quiet():
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    rotate_inputs(apply(model, scheme, blank=True), scheme)
    _restore_quantizers(model, folder)
    hub_id = record.get("source")
    found, notes = _source(source, hub_id or "")
    return _hung(model, Prepared(scheme, found, hub_id, tuple(notes)), optim, steps)


def export_prepared(
    model: "PreTrainedModel",
    out: Path,
    target: str = DEFAULT_TARGET,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    pack_tables: bool = False,
) -> Path:
    """Write a prepared model as a checkpoint of `target`, adapters of peft around it merged; `source` where `prepare`
    did not know it. With `pack_tables` quantized embeddings are packed too, see `export_plan.plan_export`.

    Raises:
        ConfigError: the model was not prepared.
        CheckpointError: where the unquantized model lies is not known; and as `export_model`.
    """
    with unwrapped(model) as plain:
        state = prepared(plain)
        folder = _folder(source) if source is not None else state.source
        if folder is None:
            raise CheckpointError(
                "an export copies names, config.json and tokenizer from the unquantized model, whose folder is not "
                "known: give source=, a folder or hub id"
            )
        student: Any = plain
        return export_model(student, folder, out, target, overwrite=overwrite, pack_tables=pack_tables)


def prepared(model: nn.Module) -> Prepared:
    """What `prepare` left on a model.

    Raises:
        ConfigError: it was not prepared.
    """
    state = getattr(model, _STATE, None)
    if not isinstance(state, Prepared):
        hint = "; of a wrapped model give the inner one, as trainer.accelerator.unwrap_model(trainer.model) gives it"
        raise ConfigError(f"this {type(model).__name__} was not prepared by qat.prepare{hint}")
    return state


# --- the scheme -----------------------------------------------------------------------------------


def as_scheme(given: Scheme | Mapping[str, Any] | str | Path, calibrated: bool = True) -> Scheme:
    """The Scheme that is meant, see `prepare`; a preset weighs errors by inputs only where there is calibration."""
    if isinstance(given, Scheme):
        return given
    if isinstance(given, Mapping):
        return validate(Scheme, dict(given), "scheme")
    if isinstance(given, Path) or given.endswith((".yaml", ".yml")):
        data = load_yaml(Path(given).expanduser())
        return validate(Scheme, data.get("scheme", data), str(given))
    weight, _, input = given.partition(PAIR)
    projections = Rule(match="*_proj", weight=lookup(weight).name, input=lookup(input).name if input else None)
    rules = (projections, Rule(match="*", skip="not a projection"))
    return Scheme(rules=rules, init=(ScaleSearch(weighted=calibrated),))


def _check_needs_no_calibration(scheme: Scheme) -> None:
    steps = [step for rule in scheme.rules for step in rule.init or ()] + list(scheme.init)
    needs: list[str] = [step.kind for step in steps if not isinstance(step, ScaleSearch)]
    if any(isinstance(step, ScaleSearch) and step.weighted for step in steps):
        needs.append("scales (which weighs errors by inputs; or {kind: scales, weighted: false})")
    names = {name for rule in scheme.rules for name in (rule.input, rule.key, rule.value) if name is not None}
    needs += [f"{name} (a calibrated range)" for name in sorted(names) if _has_range(name)]
    if needs:
        raise ConfigError(
            f"calibration: {some(dict.fromkeys(needs))} of this scheme needs it, and none was given; give a few "
            "batches, such as [tokenizer(text, return_tensors='pt') for text in texts]"
        )


def _has_range(name: str) -> bool:
    fmt = lookup(name)
    return fmt.global_scale or fmt.is_static or fmt.is_columnwise


# --- the model ------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if hasattr(model, _STATE):
        raise ConfigError("this model was prepared already; load it anew to prepare it otherwise")
    if sites(model):
        raise ConfigError("a scheme was applied to this model already; give qat.prepare the model as loaded")
    if getattr(model.config, RECORD, None) is not None:
        raise ConfigError(
            f"{model.config.name_or_path or 'this model'} was saved by a prepared model, and as loaded it lacks its "
            "scales; use qat.load_prepared(FOLDER)"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedError("this model holds packed weights; give qat.prepare the unquantized one")
    if hasattr(model, "peft_config"):
        raise UnsupportedError(
            "this model carries adapters of peft; give qat.prepare the model without them and add them afterwards, or "
            "merge them first (docs/plug_in.md)"
        )
    stored = model.state_dict()
    rounded = [n for n, b in model.named_buffers() if n not in stored and b.dtype in (torch.bfloat16, torch.float16)]
    if rounded:  # Gemma's factor of embeddings: made by the class in the type it was loaded in
        raise UnsupportedError(
            f"{some(rounded)} of this model was computed in {model.dtype} and cannot be made float32 afterwards; load "
            "the model with dtype=torch.float32"
        )


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _source(given: str | Path | None, name: str, revision: str | None = None) -> tuple[Path | None, list[str]]:
    """The folder of the unquantized model, as given or by the name it was loaded by; or None and what that means."""
    if given is not None:
        return _folder(given), []
    try:
        return _folder(name, revision), []
    except QatError:
        return None, [f"export: {name!r} is no model's folder or hub id; qat.export will ask for source="]


def _initialised(model: Any, scheme: Scheme, calibration: Batches) -> list[str]:
    """Initialise as the scheme says; what is worth telling."""
    batches = [_on(batch, model.device) for batch in calibration]
    if not batches:
        raise ConfigError("calibration holds no batch; give a few, each what model(**batch) takes")
    with evaluating(model):
        mean_square = observe(model, batches)
        return [*unreached(model), *initialise(model, batches, scheme, mean_square, _tracked)]


def _tracked(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return counted(found.items(), "initialising weights", len(found), "layers")


def _folder(given: str | Path, revision: str | None = None) -> Path:
    config = validate(ModelConfig, {"id": str(given)}, "source")
    return resolve(config if is_local(config) else config.model_copy(update={"revision": revision}))


def _hung(model: Any, state: Prepared, optim: OptimConfig, steps: int | None) -> "PreTrainedModel":
    setattr(model, _STATE, state)
    record: dict[str, Any] = {"scheme": state.scheme.model_dump(mode="json", exclude_none=True)}
    setattr(model.config, RECORD, record | ({"source": state.hub_id} if state.hub_id else {}))
    if optim.cage.strength or any(getattr(site.quantizer, "learn", "") == "refit" for site in sites(model, "weight")):
        StepHook(model, optim, steps)
    keep_whole(model)
    watch(model)
    _FirstPass(model)
    loaded: PreTrainedModel = model
    return loaded


class _FirstPass:
    """Watches the first pass that will be differentiated, for losses that multiply with a quantized weight themselves
    (fused heads): they would train against numbers that are not served."""

    def __init__(self, model: nn.Module) -> None:
        self.uses: WeightUses | None = None
        self.hooks = [model.register_forward_pre_hook(self._begin)]
        self.hooks.append(model.register_forward_hook(self._end, always_call=True))

    def _begin(self, model: nn.Module, _: Any) -> None:
        off = not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        if off or self.uses is not None:
            return
        found = sites(model, "weight")
        self.uses = WeightUses({id(site.parameter): site.path for site in found})
        self.hooks += [hook for site in found for hook in self.uses.watch(site.owner)]
        self.uses.__enter__()

    def _end(self, *_: Any) -> None:
        if self.uses is None:
            return
        self.uses.__exit__(None, None, None)
        for hook in self.hooks:
            hook.remove()
        if self.uses.names:
            raise UnsupportedError(
                f"the weight of {some(self.uses.names, 1)} is multiplied with outside its layer, so without its "
                "quantizer (a fused head of the trainer?); turn that off, or give the layer a rule with `skip:`"
            )


def _restore_quantizers(model: nn.Module, folder: Path) -> None:
    """Scales and ranges from the checkpoint's files; everything else has been loaded.

    Raises:
        CheckpointError: one is missing, surplus, or of another shape.
    """
    paths = {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)}
    state = model.state_dict(keep_vars=True)
    own = {name for name in state if name.rpartition(".")[0] in paths} - second_names(model)
    with ShardReader(folder) as reader, torch.no_grad():
        stored = {name for name in reader.names() if "quantizer" in name}
        if wrong := sorted(own ^ stored):
            raise CheckpointError(f"{folder} does not hold exactly the scales of its scheme: {some(wrong)} differ")
        for name in own:
            value = reader.get(name)
            if value.shape != state[name].shape:
                raise CheckpointError(f"{folder}: {name} is {[*value.shape]}, not {[*state[name].shape]}")
            state[name].copy_(value)
