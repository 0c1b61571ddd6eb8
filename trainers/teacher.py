"""Whether a teacher fits its student, found out before any weight is read or downloaded.

Both read the same token ids, so their tokenizers must agree on every one of them. Embeddings may be padded to different
numbers of rows; then logits are compared over the rows that both have.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.checkpoints.architecture import empty_model
from qat.checkpoints.hf import ModelConfig, describe, load_tokenizer
from qat.errors import ConfigError
from qat.trainers.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Cases, digits, white space, code, accents, scripts, emoji and control-like text: where tokenizers differ first.
PROBE = (
    "The Quick brown fox, it's 12,345.678 metres away!\n\n\tdef f(x):\n        return x**2  # naïve café\r\n"
    "Übung, 東京の天気, Привет мир, مرحبا, 🦊🏽 <think> </s> <|im_start|>user"
)
_SHOWN = 3


def settled(job: Job) -> tuple[Job, list[str]]:
    """`job` with the attention that its models will run with, and what there is to say about them.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be trained here, by its config.json.
        ConfigError: a teacher that does not fit the student.
    """
    source, student = _described(job.model)
    changed: dict[str, Any] = {"model": _with_attention(job.model, student)}
    notes: list[str] = []
    if job.teacher is not None:
        reference, teacher = _described(job.teacher)
        notes = compare(source, reference, student, teacher, job.model.trust_remote_code, job.teacher.trust_remote_code)
        changed["teacher"] = _with_attention(job.teacher, teacher)
    return job.model_copy(update=changed), notes


def _described(config: ModelConfig) -> tuple[Path, "PreTrainedModel"]:
    folder, description = describe(config)
    return folder, empty_model(description, config.id, config.attn_implementation, config.trust_remote_code)


def _with_attention(config: ModelConfig, model: "PreTrainedModel") -> ModelConfig:
    return config.model_copy(update={"attn_implementation": model.config._attn_implementation})


def compare(
    source: Path,
    reference: Path,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    trust_student: bool = False,
    trust_teacher: bool = False,
) -> list[str]:
    """What to say about a teacher that fits: nothing, or how it differs.

    Args:
        source, reference: folders of the student's and the teacher's tokenizer.
        student, teacher: their architectures, with or without weights.

    Raises:
        CheckpointError: no readable tokenizer.
        ConfigError: another tokenizer, or too few rows for it.
    """
    if source.resolve() == reference.resolve():
        return []
    own, other = load_tokenizer(source, trust_student), load_tokenizer(reference, trust_teacher)
    differences = _vocabulary(own, other) or _encoding(own, other)
    if differences:
        raise ConfigError(
            f"the teacher {reference} has another tokenizer than the student {source}: {'; '.join(differences)}. "
            "Teacher and student are compared token id by token id, so take a teacher with the student's tokenizer"
        )
    return _special(own, other) + _rows(student, teacher, max(own.get_vocab().values()) + 1)


def _vocabulary(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> list[str]:
    mine, theirs = own.get_vocab(), other.get_vocab()
    moved = sorted(token for token in mine.keys() & theirs.keys() if mine[token] != theirs[token])
    differences = []
    if moved:
        shown = ", ".join(f"{token!r} is {mine[token]} and {theirs[token]}" for token in moved[:_SHOWN])
        differences.append(f"{len(moved)} tokens have another id (student and teacher: {shown})")
    for whose, tokens in (("student", mine.keys() - theirs.keys()), ("teacher", theirs.keys() - mine.keys())):
        if tokens:
            shown = ", ".join(map(repr, sorted(tokens)[:_SHOWN]))
            differences.append(f"{len(tokens)} tokens are only the {whose}'s ({shown})")
    return differences


def _encoding(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> list[str]:
    """Equal vocabularies can still split text by different rules."""
    for text in [*PROBE.split(), *PROBE.splitlines(), PROBE]:  # the shortest that differs says most
        mine, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (own, other))
        if mine != theirs:
            return [f"{text[:40]!r} is split differently (ids {mine[:6]} and {theirs[:6]})"]
    return []


def _special(own: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> list[str]:
    """Roles of tokens; rows of text are made with the student's."""
    names = ("bos_token", "eos_token", "pad_token")
    roles = [(name, getattr(own, name, None), getattr(other, name, None)) for name in names]
    differ = [f"{name} is {mine!r} for the student and {theirs!r} for the teacher" for name, mine, theirs in roles
              if mine != theirs]  # fmt: skip
    return [f"{'; '.join(differ)}; text is prepared with the student's"] if differ else []


def _rows(student: "PreTrainedModel", teacher: "PreTrainedModel", tokens: int) -> list[str]:
    own, other = (len(model.get_output_embeddings().weight) for model in (student, teacher))
    if own == other:
        return []
    if other < tokens:
        raise ConfigError(f"the teacher's output layer has {other} rows for the tokenizer's {tokens} tokens")
    return [
        f"the student's logits have {own} rows and the teacher's {other} for {tokens} tokens: the rest is padding, and "
        f"they are compared over the first {min(own, other)}"
    ]
