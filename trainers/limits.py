"""What a model can take: positions and token ids, compared with the data before anything is trained or evaluated.

A position beyond a learned table is an index error deep inside a model, and a rotary one is a number the model has
never seen, about which nothing complains. A token added to a tokenizer alone has no row in the embedding.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qat.checkpoints.hf import load_tokenizer, resolve
from qat.checkpoints.positions import known_positions, most_positions, table_positions
from qat.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from qat.trainers import rows, sources, tokens
from qat.trainers.data import Blocks, DataConfig, planned
from qat.trainers.packing import LEAKS, leakage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat.trainers.job import Job

SAMPLE_TOKENS = 1 << 15  # of each text, which `--dry-run` looks at


# ---- positions


def check_positions(model: nn.Module, lengths: dict[str, int]) -> list[str]:
    """Compare text lengths with the positions that `model` has.

    Args:
        model: a Hugging Face causal LM; without storage (meta) is enough.
        lengths: what to call each length, for example `data.seq_len`, and how many tokens it is.

    Returns:
        A note for each length that exceeds what the model was trained on but can be computed.

    Raises:
        ConfigError: a length exceeds a table of positions, so that it cannot be computed.
    """
    table, known = table_positions(model), known_positions(model)
    name = type(model).__name__
    notes = []
    for what, length in lengths.items():
        if table is not None and length > table:
            raise ConfigError(f"{what} {length} exceeds the {table} positions that {name} has; at most {table} will do")
        if known is not None and length > known:
            notes.append(f"{what} {length} exceeds the {known} positions that {name} was made for (config.json); "
                         "beyond them it computes but was not trained")  # fmt: skip
    return notes


# ---- token ids


def check_ids(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", largest: int, what: str) -> None:
    """Compare the largest token id of a text (`what`) with the rows of the model's embedding.

    Raises:
        DataError: it has no row.
    """
    known = _embedded(model)
    if largest < known:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise DataError(
        f"{what} holds token {token!r} with id {largest}, but the embedding of {type(model).__name__} has {known} rows "
        f"(ids 0 to {known - 1}); use the tokenizer that the model was trained with, or enlarge the embedding "
        "(resize_token_embeddings) and save the model first"
    )


def _embedded(model: nn.Module) -> int:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # a transformers method
    config: Any = model.config
    weight = getattr(embedding, "weight", None)
    return int(config.get_text_config().vocab_size if weight is None else weight.shape[0])


def check_rows(tokenizer: "PreTrainedTokenizerBase", texts: dict[str, Blocks], *models: nn.Module) -> None:
    """`check_ids` of rows, each named by the key of the configuration that gave them."""
    for name, blocks in texts.items():
        for model in models:
            check_ids(model, tokenizer, blocks.largest_id, f"the text of {name} ({blocks.source.split(' ')[0]})")


# ---- a job, and a command without one


def check_lengths(job: "Job", *models: nn.Module) -> list[str]:
    """`check_positions` of every text of a job."""
    lengths = {f"{name}.seq_len": config.seq_len for name, (config, _) in _texts(job).items()}
    return list(dict.fromkeys(note for model in models for note in check_positions(model, lengths)))


def check_packing(job: "Job", *models: Any) -> None:
    """Refuse packed texts where a model lets documents see each other.

    Raises:
        UnsupportedError: it does; says which keys to set.
    """
    texts = {"data": job.data, "eval.data": job.eval.data, "eval.choose": job.eval.choose}
    texts["calibration"] = job.calibration
    packed = [name for name, text in texts.items() if text is not None and text.pack]
    for model in models if packed else ():
        leak = leakage(model)
        if leak > LEAKS:
            raise UnsupportedError(
                f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed documents see "
                f"each other (leakage {leak:.2f}); set {' and '.join(f'{name}.pack' for name in packed)} to false"
            )


def fitting(length: int, *models: nn.Module | None) -> int:
    """`length`, or less where one of the models knows fewer positions."""
    known = [most_positions(model) for model in models if model is not None]
    return min([length, *(positions for positions in known if positions is not None)])


def dry_run(job: "Job", *models: nn.Module) -> list[str]:
    """Check lengths, and the ids in the beginning of every text that is at hand; returns what there is to note.

    Raises:
        ConfigError, DataError: as a run would, before its first step.
    """
    notes = check_lengths(job, *models)
    if not (job.model.id.startswith("embedded:") or Path(job.model.id).expanduser().exists()):
        return [*notes, f"texts were not looked at: the tokenizer of {job.model.id} is not on this machine"]
    try:
        tokenizer = load_tokenizer(resolve(job.model), job.model.trust_remote_code)
    except CheckpointError as error:
        return [*notes, f"texts were not looked at: {error}"]
    for name, (config, wanted) in _texts(job).items():
        if sources.is_hub(config):
            notes.append(f"{name} was not looked at: {config.source} is on the hub")
        elif config.source != "teacher":
            largest = _largest_id(sources.pinned(config), wanted, tokenizer)
            for model in models:
                check_ids(model, tokenizer, largest, f"the text of {name} ({config.source})")
    return notes


def _largest_id(config: DataConfig, wanted: int, tokenizer: "PreTrainedTokenizerBase") -> int:
    """In the rows for the `wanted` tokens, or for the first SAMPLE_TOKENS of them."""
    tally = rows.Tally()
    plan = planned(config, min(wanted, SAMPLE_TOKENS))
    documents = tokens.encode(sources.documents(config), tokenizer)
    count = sum(1 for _ in rows.build(documents, config, plan, tokenizer, tally))
    rows.refuse_nothing(config, tally, count)
    return tally.largest


def _texts(job: "Job") -> dict[str, tuple[DataConfig, int]]:
    """`Job.texts`, each part of a mix by a key of its own."""
    texts: dict[str, tuple[DataConfig, int]] = {}
    for name, (config, wanted) in job.texts.items():
        keys = [f"{name}.mix.{index}" for index in range(len(config.mix))] or [name]
        texts |= {key: (part, wanted) for key, part in zip(keys, config.parts, strict=True)}
    return texts


def warn(notes: list[str]) -> None:
    """Say each note once, as a warning."""
    for note in notes:
        warnings.warn(note, stacklevel=2)
