"""A teacher that was asked once: `fill` asks it and keeps the answers, `opened` and `bound` find them for a run.

Training rows keep some columns per learned token (`qat.trainers.logitcache`). Of the texts that are evaluated on, the
final hidden states are kept, and the output layer once: they give the teacher's logits over the whole vocabulary, so a
run without its teacher reports the KL that it would report with it. Whatever does not fit is refused before the first
step: another teacher, tokenizer or chat template by the header, another text by the rows that are missing.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.cache import cache_folder
from qat.checkpoints.hf import describe
from qat.checkpoints.progress import counted, progress
from qat.errors import ConfigError, DataError, TrainingError, UnsupportedError
from qat.text import size
from qat.trainers import limits, packed, tokens
from qat.trainers.claim import differences
from qat.trainers.data import Blocks, load_blocks
from qat.trainers.evaluate import Evaluator
from qat.trainers.forward import Head, hidden_states, split
from qat.trainers.job import Job
from qat.trainers.logitcache import VERSION, Store, TeacherCache, row_key
from qat.trainers.packing import evaluating
from qat.training.known import Known, drawn, joined, likeliest, thinned
from qat.training.losses import IGNORE

CHUNK = 256  # tokens whose logits exist at once
TRAINED, EVALUATED = "data", ("eval.data", "eval.choose")
WORDS = {
    "teacher": "the teacher's weights or config.json",
    "template": "the chat template",
    "tokenizer": "the tokenizer",
    "kind": "teacher_cache.kind",
    "k": "teacher_cache.k",
    "seed": "teacher_cache.seed",
    "version": "the layout of the files",
}


# --- whose cache it is ----------------------------------------------------------------------------


def identity(job: Job, tokenizer: Any) -> dict[str, Any]:
    """What must not change; of a job whose models have fingerprints."""
    assert job.teacher_cache is not None
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    asked = job.teacher_cache.remote
    return {
        "version": VERSION,
        "teacher": f"{asked.model} on a server" if asked else (job.teacher or job.model).fingerprint,
        "tokenizer": tokens.fingerprint(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "kind": job.teacher_cache.kind,
        "k": job.teacher_cache.k,
        "seed": job.teacher_cache.seed if job.teacher_cache.kind != "topk" else None,
    }


def stored(job: Job, tokenizer: Any) -> Store:
    """The cache of a job.

    Raises:
        ConfigError: it is another teacher's, or was filled with other settings.
    """
    assert job.teacher_cache is not None
    now = identity(job, tokenizer)
    if (folder := job.teacher_cache.folder) is None:
        named = [now[name] for name in ("version", "teacher", "kind", "k", "seed")]
        folder = cache_folder("teachers") / hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    store = Store.read(folder)
    changed = [name for name in WORDS if store.header and store.header.get(name) != now[name]]
    for name, follows in (("template", "tokenizer"), ("kind", "seed")):  # the second holds the first, or hangs on it
        changed = [other for other in changed if other != follows or name not in changed]
    if changed:
        said = [_changed(name, store.header.get(name), now[name]) for name in changed]
        raise ConfigError(
            f"the teacher's cache {folder} was filled with something else: {'; '.join(said)}. Give back what it was "
            "filled with, or give another folder (teacher_cache.folder=...) and run `qat teacher` again"
        )
    return store


def _changed(name: str, before: Any, now: Any) -> str:
    return f"{WORDS[name]} changed" + (f" from {before} to {now}" if isinstance(before, int) or name == "kind" else "")


def opened(job: Job, tokenizer: Any) -> Store | None:
    """The cache of a job that trains without its teacher; None where it does not.

    Raises:
        DataError: nobody filled it.
        ConfigError: it does not fit the job.
    """
    if job.teacher_cache is None:
        return None
    store = stored(job, tokenizer)
    if not store.header:
        raise DataError(f"there is no cache of the teacher in {store.folder}; fill it first: qat teacher CONFIG")
    return store


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Taught:
    """A cache, and where in it the training rows of a run are.

    Attributes:
        keys: of the rows of the training text; empty where the loss needs no teacher.
    """

    store: Store
    keys: list[bytes]

    def columns(self, rows: Any) -> dict[str, Tensor]:
        """What the teacher said of these rows, as entries of a batch: of the learned tokens, in order."""
        return self.store.columns([self.keys[row] for row in rows]).named() if self.keys else {}

    def head(self, student: Head) -> Head:
        """The student's head, over the columns that the teacher was asked about."""
        return student.first(self.store.vocabulary)


def bound(job: Job, store: Store, texts: dict[str, Blocks], student: Any) -> Taught:
    """Find all that a run will read, before its first step.

    Args:
        texts: by the keys of the job.

    Raises:
        DataError: rows or a text are missing; says which, and which settings differ.
        ConfigError: the student has fewer columns than the teacher was asked about.
        UnsupportedError: the student comes from a packed checkpoint.
    """
    if packed.continues(student):
        raise UnsupportedError(
            f"{job.model.id} is quantized already, so the BF16 model it is compared with is the teacher, which a cache "
            "does not replace; leave teacher_cache out"
        )
    rows = len(student.get_output_embeddings().weight)
    if rows < store.vocabulary:
        raise ConfigError(
            f"the student has {rows} logits, and the cache {store.folder} was filled for one of {store.vocabulary}; "
            "fill another folder with this job: teacher_cache.folder=..."
        )
    lacks = []
    keys = keys_of(texts[TRAINED]) if job.objective.needs_teacher else []
    if lost := missing(store, keys):
        lacks.append(f"{len(lost):,} of the {len(keys):,} rows of data (the first is row {lost[0]})")
    lacks += [key for key in EVALUATED if key in job.texts and not _heard(job, store, texts[key])]
    if lacks:
        raise DataError(
            f"the teacher's cache {store.folder} lacks {' and '.join(lacks)}{_text_changes(job, store)}; "
            "what is missing is added by: qat teacher CONFIG, with the same file and keys"
        )
    return Taught(store, keys)


def _heard(job: Job, store: Store, blocks: Blocks) -> bool:
    """Whether the teacher was asked about a text that is evaluated on."""
    if remote(job):
        return not missing(store, keys_of(blocks))
    return store.has_heldout(blocks.digest)


def remote(job: Job) -> bool:
    """Whether a server says what the teacher thinks."""
    return job.teacher_cache is not None and job.teacher_cache.remote is not None


def _text_changes(job: Job, store: Store) -> str:
    """How the texts differ from those of the last filling."""
    changed = differences(store.header.get("texts", {}), settings(job))
    return f" (since it was filled, {'; '.join(changed)})" if changed else ""


def settings(job: Job) -> dict[str, Any]:
    """Of the texts, and how many tokens of them are read."""
    return {
        key: {**json.loads(config.model_dump_json()), "tokens wanted": wanted}
        for key, (config, wanted) in job.texts.items()
        if key == TRAINED or key in EVALUATED
    }


def keys_of(blocks: Blocks) -> list[bytes]:
    """What the rows of a text are found by."""
    return [row_key(row) for row in counted(blocks.array(), "looking rows up", len(blocks), "rows")]


def evaluators(job: Job, parts: Any) -> tuple[Evaluator, Evaluator]:
    """Of the text that is reported, and of the one that decides."""
    if parts.taught is not None:
        now, then = _computed(parts.device, parts.dtype), parts.taught.store.header.get("computed in")
        note = f"the teacher was asked in {then}, and this run computes in {now}: its KL includes that rounding"
        if job.teacher_cache is not None and job.teacher_cache.remote is not None:
            note = (
                f"KL and top-1 agreement are with {then}, over its {job.teacher_cache.k} likeliest tokens and all "
                "others as one: a lower bound"
            )
        limits.warn([note] * (now != then))
    reporting = _evaluator(job, parts, parts.heldout)
    if not parts.chosen_apart:
        return reporting, reporting
    choosing = _evaluator(job, parts, parts.choosing)
    choosing.teacher_head = reporting.teacher_head  # one copy
    return reporting, choosing


def _computed(device: torch.device, dtype: torch.dtype | None) -> str:
    return f"{str(dtype or torch.float32).removeprefix('torch.')} on {device.type}"


def _evaluator(job: Job, parts: Any, blocks: Blocks) -> Evaluator:
    made = Evaluator(parts.teacher, blocks, job.eval.batch, parts.device, parts.dtype, parts.ranks)
    if remote(job):
        store, keys = parts.taught.store, keys_of(blocks)
        made.teacher_says = lambda rows: store.columns([keys[row] for row in rows])
        made.columns = store.vocabulary
    elif parts.taught is not None:
        head, hidden = parts.taught.store.heldout(blocks.digest, parts.device)
        rows = hidden.view(len(blocks), blocks.seq_len, -1)
        made.teacher_head, made.teacher_hidden = head, [rows[part].flatten(0, 1) for part in made.own_rows()]
    return made


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """What `qat teacher` did for a cache.

    Attributes:
        rows, asked: that the job trains on, and how many of them the teacher read now.
        tokens: learned, of all rows of the folder.
        bytes_per_token: of a learned token.
        folder_bytes: of all files, what is evaluated on included.
    """

    folder: Path
    rows: int
    asked: int
    tokens: int
    bytes_per_token: float
    folder_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**vars(self), "folder": str(self.folder), "seconds": round(self.seconds, 1)}

    def lines(self) -> list[str]:
        """What the command prints."""
        return [
            f"the teacher's cache: {self.rows:,} rows to train on, {self.asked:,} of them asked now, "
            f"{self.seconds:,.1f} s",
            f"  {self.folder}: {size(self.folder_bytes)}, {self.bytes_per_token:.0f} bytes for each of "
            f"{self.tokens:,} learned tokens, the rest for evaluation",
        ]


def fill(
    job: Job, tokenizer: Any, teacher: Any, device: torch.device, dtype: torch.dtype | None, writer_of_text: str = ""
) -> Filled:
    """Ask the teacher about every row of the job that is not in its cache yet.

    Args:
        job: whose models have fingerprints.
        dtype: of autocast, as a run has it.
        writer_of_text: the digest of the teacher's weights, where it writes a text of the job.

    Raises:
        CheckpointError: another process fills the folder.
        ConfigError: the cache is another teacher's; positions that the teacher does not have.
        TrainingError: the teacher computes NaN.
    """
    begin = time.monotonic()
    store = stored(job, tokenizer)
    limits.warn(limits.check_lengths(job, teacher))
    limits.check_packing(job, teacher)
    wanted = {key: job.texts[key] for key in (TRAINED, *EVALUATED) if key in job.texts}
    texts = {key: load_blocks(c, tokenizer, num_tokens=n, teacher=teacher) for key, (c, n) in wanted.items()}
    limits.check_rows(tokenizer, texts, teacher)
    keys = keys_of(texts[TRAINED]) if job.objective.needs_teacher else []
    wanting = missing(store, keys)
    with store.writing() as writer:
        head = _head(job, teacher, store)
        now = {"vocabulary": head.vocabulary, "texts": settings(job), "computed in": _computed(device, dtype)}
        store.header |= {**identity(job, tokenizer), **now, "weights": writer_of_text or store.writer}
        store.keep_header()
        for key in EVALUATED:
            if key in texts and not store.has_heldout(texts[key].digest):
                read = Evaluator(teacher, texts[key], job.eval.batch, device, dtype)
                assert read.teacher_head is not None
                store.keep_heldout(texts[key].digest, torch.cat(read.teacher_hidden), read.teacher_head)
        with evaluating(teacher), progress("asking the teacher", len(wanting), "rows") as advance:
            for start in range(0, len(wanting), job.micro_rows):
                part = wanting[start : start + job.micro_rows]
                for row, known in zip(part, _said(job, teacher, head, texts[TRAINED], part, keys, dtype), strict=True):
                    writer.add(keys[row], known)
                advance(len(part))
    return filled(store, len(keys), len(wanting), time.monotonic() - begin)


def missing(store: Store, keys: list[bytes]) -> list[int]:
    """The rows that are not there."""
    return [row for row, key in enumerate(keys) if key not in store.places]


def filled(store: Store, rows: int, asked: int, seconds: float) -> Filled:
    """A folder as it is now."""
    learned = sum(int(columns["starts"][-1]) for columns in store.shards)
    stored = sum(array.nbytes for columns in store.shards for array in columns.values())
    return Filled(store.folder, rows, asked, learned, stored / max(1, learned), store.nbytes, seconds)


def _head(job: Job, teacher: Any, store: Store) -> Head:
    """The teacher's, over the columns that the student has too."""
    head = split(teacher)
    _, student = describe(job.model)
    columns = min(head.vocabulary, int(student.get_text_config().vocab_size))
    if store.header and columns != store.vocabulary:
        raise ConfigError(
            f"the teacher's cache {store.folder} was filled over {store.vocabulary} logits, and this student has "
            f"{columns}; give another folder: teacher_cache.folder=..."
        )
    return head.first(columns)


@torch.no_grad()
def _said(
    job: Job, teacher: nn.Module, head: Head, blocks: Blocks, rows: list[int], keys: list[bytes], dtype: Any
) -> list[Known]:
    """What the teacher says of each row, computed as a run computes it."""
    assert job.teacher_cache is not None
    device: Any = head.linear.weight.device
    batch = {name: tensor.to(device) for name, tensor in blocks.rows(rows).items()}
    found = []
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = hidden_states(teacher, batch)
        for row, states, targets in zip(rows, hidden, batch["targets"], strict=True):
            read = states[targets != IGNORE]
            generator = torch.Generator(device).manual_seed(_seed(job.teacher_cache, keys[row]))
            parts = [_columns(head(part), job.teacher_cache, generator) for part in read.split(CHUNK)]
            found.append(joined(parts))
            if bool(found[-1].log_p.isnan().any()):
                raise TrainingError(f"the teacher computes NaN for row {row} of data")
    return found


def _columns(logits: Tensor, config: TeacherCache, generator: torch.Generator) -> Known:
    if config.kind == "topk":
        return likeliest(logits, config.k)
    return (drawn if config.kind == "sample" else thinned)(logits, config.k, generator)


def _seed(config: TeacherCache, key: bytes) -> int:
    """Of the drawing in one row, whenever it is filled."""
    return int.from_bytes(hashlib.sha256(key + config.seed.to_bytes(8, "little")).digest()[:7], "little")
