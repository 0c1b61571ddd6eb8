"""Training data: from a configured source to batches that are a pure function of (seed, step).

Text is read as a stream, tokenised, and written once as fixed rows into a memory-mapped file, keyed by a
hash of all that decides its content: memory stays bounded, and the next run starts at once. Because a batch
depends on nothing but the seed and its index, resuming exactly needs no sampler state.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pydantic import Field, field_validator, model_validator
from torch import nn

from qat.cache import cache_folder
from qat.checkpoints.folders import atomic_folder
from qat.checkpoints.progress import progress
from qat.config import Strict
from qat.errors import ConfigError, DataError
from qat.trainers import mixing, rows, selfwritten, sources, tokens
from qat.trainers.packing import CHANNELS, Batch, collate
from qat.trainers.records import CHATS
from qat.trainers.selfwritten import Generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 3  # raise it when the same key would give other rows
_META = "meta.json"


class DataConfig(Strict):
    """Which text to train or evaluate on, and how it becomes rows of tokens.

    Attributes:
        source: `embedded` (the help texts inside Python), `heldout` (the text shipped for evaluation) or a half of its
            documents (`heldout/choosing`, `heldout/reporting`), `teacher` (text the teacher writes), a local .jsonl,
            .json, .csv, .tsv, .parquet, .txt or .md file (all but .parquet also as .gz, .bz2, .xz or .zst), a folder
            of such files, or a hub id `owner/name`.
        config_name, split, revision: of a hub data set.
        records: what a record is, a key of `records.SHAPES`; `auto` goes by the fields that are there.
        text_field, messages_field: where a record holds its text, or its chat of {role, content} messages.
        prompt_field, completion_field: where it holds what is not learnt, and what is.
        tools_field: where it holds the tools of its chat; null leaves them out.
        seq_len: tokens per row.
        pack: documents end to end in full rows, separated by position ids; else one padded document a row.
        chat: `auto` takes a record's messages if it has them, and the chat template for prompts and their
            completions; `never` takes its text, or prompt and completion as they are.
        max_tokens: read no more than this.
        seed: of the text a teacher writes.
        generate: how a teacher writes.
        mix: several texts, each as `{share: ..., source: ..., ...}` with keys of its own; their rows are interleaved by
            their shares. `source` is then `mix`, and may be left out.
    """

    source: str = Field(default="embedded", min_length=1)
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    records: Literal["auto", "text", "messages", "sharegpt", "prompt", "alpaca"] = "auto"
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    tools_field: str | None = "tools"
    seq_len: int = Field(default=512, ge=8)
    pack: bool = True
    chat: Literal["auto", "never"] = "auto"
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    generate: Generate = Generate()
    mix: tuple["Part", ...] = ()

    @property
    def parts(self) -> "tuple[DataConfig, ...]":
        """The texts of a mix; else this one."""
        return self.mix or (self,)

    @model_validator(mode="before")
    @classmethod
    def _mixed(cls, given: Any) -> Any:
        """Parts have rows like the whole's."""
        if not isinstance(given, dict) or not given.get("mix") or not isinstance(given["mix"], list | tuple):
            return given
        rows_of_all = {key: given[key] for key in ("seq_len", "pack") if key in given}
        parts = [{**rows_of_all, **part} if isinstance(part, dict) else part for part in given["mix"]]
        return {"source": mixing.MIX, **given, "mix": parts}

    @field_validator("generate", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        return Generate() if value is None else value  # the only way in which an override can remove a recipe's

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if problem := mixing.problem(self):
            raise ValueError(problem)
        if self.source != "teacher" and self.generate != Generate():
            raise ValueError(
                f"generate only works with source: teacher, but source is {self.source!r}; leave it out "
                "(calibration.generate=null where a recipe has it for its calibration)"
            )
        if self.chat == "never" and self.records in CHATS:
            raise ValueError(f"records: {self.records} are chats, but chat is 'never'; remove one of the two")
        if self.pack and self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise ValueError(
                f"max_tokens {self.max_tokens} is less than one row of seq_len {self.seq_len}; "
                "raise it or set pack: false"
            )
        return self


class Part(DataConfig):
    """One text of a mix.

    Attributes:
        share: of the rows, in proportion to the other parts'.
    """

    share: float = Field(gt=0, allow_inf_nan=False)


DataConfig.model_rebuild()


@dataclass(frozen=True)
class Blocks:
    """Rows of tokens on disk.

    Attributes:
        path: folder that holds them.
        source: what they were made from, with its content hash or commit.
        num_rows, seq_len: shape of the whole.
        tokens: tokens in the rows, padding not counted.
        loss_tokens: positions with a target.
        dropped_tokens: read but in no row: the unfilled last row (packed), what was cut off (padded), and rows
            that were left out.
        documents: documents read, the skipped ones not counted.
        skipped_documents: chats without an assistant turn.
        digest: sha256 of the rows: ids, targets and document numbers.
        empty_rows: rows without a target, which were left out.
        leading_turns: assistant turns that were left out because chats began with them.
        largest_id: the largest token id, padding included.
        shapes: documents of each kind of record.
    """

    path: Path
    source: str
    num_rows: int
    seq_len: int
    tokens: int
    loss_tokens: int
    dropped_tokens: int
    documents: int
    skipped_documents: int
    digest: str
    empty_rows: int = 0
    leading_turns: int = 0
    largest_id: int = -1
    shapes: dict[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """What was read and what became of it, in one sentence."""
        kinds = [f"{count:,} {name}" if len(self.shapes) > 1 else name for name, count in sorted(self.shapes.items())]
        text = f"{self.documents:,} documents ({', '.join(kinds)}) in {self.num_rows:,} rows of {self.seq_len} tokens"
        text += f", {self.loss_tokens:,} tokens to learn"
        if self.skipped_documents:
            text += f"; {self.skipped_documents:,} without an assistant turn to learn left out"
        if self.empty_rows:
            text += f"; {self.empty_rows:,} rows without a token to learn left out (prompts longer than a row)"
        if self.leading_turns:
            text += f"; {self.leading_turns:,} assistant turns that chats began with left out"
        return text

    def __len__(self) -> int:
        return self.num_rows

    def array(self) -> npt.NDArray[np.int32]:
        """All rows, memory-mapped: int32 of shape (num_rows, 3, seq_len); ids, targets, document
        numbers."""
        shape = (self.num_rows, CHANNELS, self.seq_len)
        return np.memmap(self.path / rows.ROWS, dtype=rows.STORED, mode="r", shape=shape)

    def rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """The rows at `indices` as int64 tensors of shape (len(indices), seq_len).

        `input_ids`, `position_ids` (restart with each document), `document_ids` (from 0 in each row, -1 on
        padding), and `targets`: what the logits at the same position predict, -100 where they predict
        nothing.
        """
        return collate(self.array()[np.asarray(indices, np.int64)])


@dataclass(frozen=True)
class Batches:
    """Batches of rows; `batch(index)` depends only on the blocks, the seed and the index.

    Every epoch visits each row once, in an order drawn from (seed, epoch); a batch may straddle two epochs.

    Attributes:
        blocks: where rows come from.
        rows_per_batch: rows of a global batch, over all ranks; may exceed the number of rows.
        seed: of the order.
        rank, world_size: this process's share of each global batch.
    """

    blocks: Blocks
    rows_per_batch: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.rows_per_batch < 1 or self.rows_per_batch % self.world_size:
            raise ConfigError(
                f"{self.rows_per_batch} rows per batch cannot be shared equally by {self.world_size} "
                f"processes; give a positive multiple of {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} must be from 0 to {self.world_size - 1}")

    def indices(self, index: int) -> npt.NDArray[np.int64]:
        """Row numbers of this rank's share of global batch `index`."""
        share = self.rows_per_batch // self.world_size
        begin = index * self.rows_per_batch + self.rank * share
        count = self.blocks.num_rows
        places = (divmod(place, count) for place in range(begin, begin + share))
        return np.array([_order(count, self.seed, epoch)[offset] for epoch, offset in places], np.int64)

    def batch(self, index: int) -> Batch:
        """This rank's share of global batch `index`, as `Blocks.rows` gives it."""
        return self.blocks.rows(self.indices(index))


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def load_blocks(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_tokens: int | None = None,
    cache_dir: Path | None = None,
    teacher: nn.Module | str | None = None,
) -> Blocks:
    """The rows of a source, from the cache or built now.

    Processes that ask for the same rows at once build them once. With `source: teacher` call this before
    the teacher is spread over processes.

    Args:
        config: what to read and how.
        tokenizer: of the model to be trained.
        num_tokens: stop when there are rows for this many tokens; a source that has fewer gives what it
        has.
        cache_dir: where rows are cached, `qat.cache.cache_folder("data")` unless given.
        teacher: who writes the text of `source: teacher`; or the digest of its weights, if it wrote before.

    Raises:
        DataError: the source cannot be read, or holds less than one row.
    """
    if config.mix:
        return _load_mix(config, tokenizer, planned(config, num_tokens).rows, cache_dir, teacher)
    config = sources.pinned(config)
    plan = planned(config, num_tokens)
    source = sources.fingerprint(config)
    if config.source == "teacher":
        if teacher is None:
            raise DataError("source 'teacher' needs the teacher model, but none was given")
        digest = teacher if isinstance(teacher, str) else selfwritten.weights_digest(teacher)
        source = f"teacher sha256:{digest}"
    key = _key(config, source, tokens.fingerprint(tokenizer), plan)
    with _folder(key, cache_dir) as folder:
        cached = _open(folder)
        if cached is not None:
            return cached
        if isinstance(teacher, str) and config.source == "teacher":
            raise DataError("the teacher has not written this text yet; let it, with: qat teacher CONFIG")
        writer = None if isinstance(teacher, str) else teacher
        what = f"{'writing' if config.source == 'teacher' else 'tokenising'} {config.source}"
        total = plan.rows * config.seq_len if plan.rows else plan.tokens
        with (
            progress(what, total, "tokens") as step,
            contextlib.closing(_encoded(config, tokenizer, writer, plan, step)) as documents,
        ):
            return _made(folder, source, lambda partial: rows.write(partial, documents, config, plan, tokenizer))


@contextlib.contextmanager
def _folder(key: str, cache_dir: Path | None) -> Generator[Path, None, None]:
    """Where rows of this key are cached, locked."""
    folder = (cache_dir.expanduser() if cache_dir else cache_folder("data")) / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        yield folder


def _load_mix(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    wanted: int | None,
    cache_dir: Path | None,
    teacher: nn.Module | str | None,
) -> Blocks:
    """The rows of each part, from the cache or built now, and then those of the mix."""
    shares = [part.share for part in config.mix]
    counts = [None] * len(shares) if wanted is None else mixing.counts(shares, wanted)
    parts = []
    for part, count in zip(config.mix, counts, strict=True):
        tokens_of = None if count is None else count * part.seq_len
        one = DataConfig(**{name: getattr(part, name) for name in DataConfig.model_fields})
        parts.append(load_blocks(one, tokenizer, num_tokens=tokens_of, cache_dir=cache_dir, teacher=teacher))
    key = [CACHE_VERSION, mixing.MIX, [part.digest for part in parts], counts]
    source = "; ".join(f"{share:g} {part.source}" for share, part in zip(shares, parts, strict=True))
    with _folder(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32], cache_dir) as folder:
        made = _open(folder)
        return made or _made(folder, f"{mixing.MIX} {source}", lambda partial: mixing.write(partial, parts, counts))


def _made(folder: Path, source: str, write: Callable[[Path], dict[str, Any]]) -> Blocks:
    """The rows that `write` writes, kept in `folder`."""
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / _META).write_text(json.dumps({"source": source, **write(partial)}, indent=1), encoding="utf-8")
    return _read(folder)


def planned(config: DataConfig, num_tokens: int | None) -> rows.Plan:
    """Where `load_blocks` stops."""
    wanted = num_tokens
    if config.source == "teacher":
        wanted = config.generate.tokens or num_tokens or config.max_tokens
        if wanted is None:
            raise DataError("source 'teacher' never ends; set generate.tokens")
    limits = [] if wanted is None else [-(-wanted // config.seq_len)]
    if config.pack and config.max_tokens is not None:
        limits.append(config.max_tokens // config.seq_len)
    return rows.Plan(min(limits, default=None), None if config.pack else config.max_tokens)


def _key(config: DataConfig, source: str, tokenizer: str, plan: rows.Plan) -> str:
    unused = set() if config.source == "teacher" else {"seed", "generate"}
    parts = [CACHE_VERSION, source, tokenizer, config.model_dump(mode="json", exclude=unused), asdict(plan)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _encoded(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    teacher: nn.Module | None,
    plan: rows.Plan,
    step: Callable[[int], None],
) -> Generator[tokens.Tokens, None, None]:
    """Tokenised documents of the source, counted by `step` as they are made."""
    if teacher is not None and config.source == "teacher":
        needed = None if plan.rows is None else plan.rows * config.seq_len
        limits = {"wanted": needed} if config.pack else {"documents": plan.rows}
        settings: dict[str, Any] = {"seq_len": config.seq_len, "seed": config.seed, **limits}
        yield from selfwritten.write(teacher, tokenizer, config.generate, advance=step, **settings)
        return
    for document in tokens.encode(sources.documents(config), tokenizer):
        step(len(document.ids))
        yield document


def _read(folder: Path) -> Blocks:
    return Blocks(path=folder, **json.loads((folder / _META).read_text(encoding="utf-8")))


def _open(folder: Path) -> Blocks | None:
    """The rows cached in `folder`; None, with a warning if something is there, when they have to be
    made."""
    if not folder.exists():
        return None
    try:
        blocks = _read(folder)
        expected = blocks.num_rows * CHANNELS * blocks.seq_len * rows.STORED.itemsize
        if (folder / rows.ROWS).stat().st_size == expected:
            return blocks
        problem = f"{rows.ROWS} does not have {expected} bytes"
    except (OSError, ValueError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"the token cache {folder} is damaged ({problem}) and is made again", stacklevel=3)
    return None
