"""A job whose model is quantized already (`qat.checkpoints.packed`): the scheme that continues it, what is refused
before its first step, and when its student is put where the checkpoint is."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.adapters import Candidate, candidates
from qat.checkpoints import packed
from qat.checkpoints.architecture import empty_model, read_config
from qat.checkpoints.hf import ModelConfig, resolve
from qat.config import validate
from qat.errors import ConfigError

if TYPE_CHECKING:
    from qat.trainers.job import Job

SKIP = "not quantized in the checkpoint"


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of a job file, with what its model says of the scheme where the file does not.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be unpacked.
    """
    config, scheme = data.get("model"), data.get("scheme", {})
    if not (isinstance(config, dict) and isinstance(config.get("id"), str) and isinstance(scheme, dict)):
        return data  # what is wrong is said where the job is checked
    folder = Path(config["id"]).expanduser()
    if not ((folder / "config.json").is_file() and packed.is_packed(folder)):
        return data
    scheme = {"init": [], **scheme}
    if "rules" not in scheme:
        scheme["rules"] = rules(validate(ModelConfig, config, "model"))
    return {**data, "scheme": scheme}


def rules(config: ModelConfig) -> list[dict[str, Any]]:
    """The rules of a scheme with the formats of a packed checkpoint: one for each last part of a path, and before them
    one for each weight that is treated otherwise than most of that name."""
    folder = resolve(config)
    found = packed.read(folder)
    assert found is not None
    model = empty_model(read_config(folder, config.trust_remote_code), config.id, None, config.trust_remote_code)
    treatments = found.treatments(model)
    by_name: dict[str, dict[str, packed.Treatment | None]] = defaultdict(dict)
    for candidate in _weights(model):
        by_name[candidate.path.rpartition(".")[2]][candidate.path] = treatments.get(_place(candidate))
    exact, general = [], []
    for name, treated in by_name.items():
        usual = Counter(treated.values()).most_common(1)[0][0]
        exact += [_rule(path, treatment) for path, treatment in treated.items() if treatment != usual]
        general.append(_rule(name if name in treated else f"*.{name}", usual))
    return exact + general


def _rule(match: str, treatment: packed.Treatment | None) -> dict[str, Any]:
    if treatment is None:
        return {"match": match, "skip": SKIP}
    return {"match": match, "weight": treatment[0], "input": treatment[1]}


def _weights(model: Any) -> list[Candidate]:
    return [candidate for candidate in candidates(model) if candidate.role == "weight"]


def _place(candidate: Candidate) -> str:
    return f"{candidate.module}.{candidate.slot.name}"


def check(job: "Job", folder: Path | None, model: Any) -> None:
    """Refuse a job that would not continue its packed model, if that is what its model is.

    Args:
        job: with the scheme that will be trained.
        folder: the model's, resolved; None where only its config is known.
        model: the student without numbers.

    Raises:
        ConfigError: another scheme, an initialisation, or nothing to learn from.
        UnsupportedError: experts of one layer that are quantized in different ways.
    """
    found = packed.read(folder) if folder is not None else None
    if found is None:
        return
    steps = [step.kind for init in (job.scheme.init, *(rule.init for rule in job.scheme.rules)) for step in init or ()]
    if steps or job.scheme.fallback is not None:
        raise ConfigError(
            f"{job.model.id} is quantized already, and training goes on from its codes and scales, which "
            f"{steps[0] if steps else 'fallback'} would replace; leave it out (scheme.init: []), or give the original "
            "weights as model.id"
        )
    if job.method == "qad" and job.teacher is None:
        raise ConfigError(
            f"{job.model.id} is quantized already, so a teacher made of it would know no more than the student; say "
            "teacher.id=ORIGINAL, the model that it was quantized from (or method: qat)"
        )
    treatments = found.treatments(model)
    for candidate in _weights(model):
        rule, stored = job.scheme.rule_for(candidate.path, candidate.module), treatments.get(_place(candidate))
        own, given = stored and stored[0], rule and rule.weight
        if own != given:
            raise ConfigError(
                f"{candidate.path} is {own or 'not quantized'} in {job.model.id}, but {given or 'skipped'} in the "
                "scheme; leave scheme.rules out to go on with the checkpoint's formats, or give the original weights "
                "as model.id"
            )


def continues(student: Any) -> bool:
    """Whether `student` was unpacked from a packed checkpoint."""
    return is_from_packed(folder_of(student))


def is_from_packed(folder: Path) -> bool:
    """Whether the model in `folder` was."""
    return packed.read(folder) is not None


def put(student: Any) -> list[str]:
    """Put a quantized student where its packed checkpoint is, if it is made of one; returns what is worth telling."""
    found = packed.read(folder_of(student))
    return [] if found is None else found.put(student)


def folder_of(student: Any) -> Path:
    """Where the student was loaded from."""
    return Path(student.config._name_or_path)
