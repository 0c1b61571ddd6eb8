"""`qat teacher`: what a job wants of its teacher, made before the run: the text that it writes, and its cache.

The teacher is loaded here as the run loads it, since its text is kept under the digest of its weights; the run then
finds the very rows and starts at once.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.checkpoints.hf import load_configured, load_tokenizer, resolve
from qat.errors import ConfigError
from qat.trainers import claim
from qat.trainers.cached import Filled, fill
from qat.trainers.data import Blocks, load_blocks
from qat.trainers.job import Job
from qat.trainers.machine import repeatable
from qat.trainers.remote_cache import fill_remote
from qat.trainers.teacher import settled

SAMPLES = 3  # documents of each text that are shown
SHOWN = 600  # characters of each


@dataclass(frozen=True)
class Written:
    """One text of a job.

    Attributes:
        key: of the job, `data` or `calibration`.
        blocks: its rows.
        seconds: it took; next to none where it had been written before.
        samples: documents as the tokenizer decodes them, special tokens included.
    """

    key: str
    blocks: Blocks
    seconds: float
    samples: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        blocks = self.blocks
        return {
            "text": self.key,
            "folder": str(blocks.path),
            "tokens": blocks.tokens,
            "learnt_tokens": blocks.loss_tokens,
            "documents": blocks.shapes,
            "seconds": round(self.seconds, 1),
            "sha256": blocks.digest,
            "samples": self.samples,
        }

    def lines(self) -> list[str]:
        """What the command prints."""
        blocks = self.blocks
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(blocks.shapes.items()))
        text = [
            f"{self.key}: {blocks.tokens:,} tokens in {len(blocks):,} rows of {blocks.seq_len} ({kinds}), "
            f"{blocks.loss_tokens:,} to learn, {self.seconds:,.1f} s",
            f"  {blocks.path}",
        ]
        for number, sample in enumerate(self.samples, 1):
            shown = sample if len(sample) <= SHOWN else sample[:SHOWN] + " [...]"
            text += [f"  --- document {number} of {len(self.samples)} shown"]
            text += [f"  {line}" for line in shown.splitlines()]
        return text


def device_and_mixed(job: Job) -> tuple[torch.device, bool]:
    """Where a run computes, and whether in BF16 beside float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, job.precision == "bf16-mixed" or (job.precision == "auto" and device.type == "cuda")


def teacher_dtype(job: Job) -> torch.dtype:
    """In which a run holds its teacher."""
    device, mixed = device_and_mixed(job)
    return torch.bfloat16 if mixed and device.type == "cuda" else torch.float32


def load_teacher(job: Job, reference: Path) -> nn.Module:
    """The teacher as a run has it: on the device at once, since it may write the text of `source: teacher`."""
    device, _ = device_and_mixed(job)
    teacher: nn.Module = load_configured(job.teacher or job.model, reference, teacher_dtype(job), device)
    return teacher.to(device)


def write(job: Job) -> list[Written | Filled]:
    """Write what the job's teacher has to write, and fill its cache; what lies there already is read.

    Raises:
        ConfigError: the job wants neither.
    """
    texts = {
        key: (config, tokens)
        for key, (config, tokens) in job.texts.items()
        if any(part.source == "teacher" for part in config.parts)
    }
    if not texts and job.teacher_cache is None:
        raise ConfigError(
            "no text of this job is written by its teacher; set data.source=teacher, or a mix with a part of it, as "
            "mix: [{share: 0.7, source: teacher, generate: {chats: 0.5}}, {share: 0.3, source: FILE}]; and no cache of "
            "it is asked for: teacher_cache={k: 64}"
        )
    claim.check_there(job)
    job, _ = settled(job)
    job, source, reference = claim.located(job)
    tokenizer = load_tokenizer(source, job.model.trust_remote_code)
    if job.teacher_cache is not None and job.teacher_cache.remote is not None:
        return [fill_remote(job, tokenizer)]
    device, mixed = device_and_mixed(job)
    repeatable(device)
    if job.teacher is not None:
        reference = resolve(job.teacher)  # whose weights nobody wanted so far, where its answers are to be cached
    teacher = load_teacher(job, reference)
    written: list[Written | Filled] = []
    for key, (config, tokens) in texts.items():
        begin = time.monotonic()
        blocks = load_blocks(config, tokenizer, num_tokens=tokens, teacher=teacher)
        written.append(Written(key, blocks, time.monotonic() - begin, samples(blocks, tokenizer)))
    if job.teacher_cache is not None:
        digests = [
            one.blocks.source.partition("teacher sha256:")[2][:64] for one in written if isinstance(one, Written)
        ]
        dtype = torch.bfloat16 if mixed else None
        written.append(fill(job, tokenizer, teacher, device, dtype, next(iter(digests), "")))
    return written


def samples(blocks: Blocks, tokenizer: Any) -> list[str]:
    """Documents from the beginning, the middle and the end of the rows: of each row the first one that begins in it."""
    places = sorted({round(place * (len(blocks) - 1) / (SAMPLES - 1)) for place in range(SAMPLES)})
    found = []
    for ids, documents in zip(*(blocks.rows(places)[name] for name in ("input_ids", "document_ids")), strict=True):
        number = min(1, int(documents.max()))
        found.append(tokenizer.decode(ids[documents == number].tolist()))
    return found


def lines(written: list[Written | Filled]) -> list[str]:
    """What the command prints."""
    return [line for one in written for line in one.lines()]
