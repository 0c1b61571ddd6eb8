"""Looking at what exists: judge or sample a run, an exported checkpoint, or a plain model, on this machine."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, read_json, resolve
from qat.checkpoints.resume import load_student
from qat.config import load_yaml, validate
from qat.errors import CheckpointError, ConfigError
from qat.surgery import served
from qat.trainers import limits
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.evaluate import Judge


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer folder, and the name of what it was made from, if known."""

    model: Any
    tokenizer_folder: Path
    made_from: ModelConfig | None
    kind: str


def load(folder: Path, load_export: Callable[[Path], Any] | None = None) -> Loaded:
    """Find out what `folder` is and load it.

    Args:
        folder: a run, an exported checkpoint or a model.
        load_export: how to load an export; None unpacks its weights into a dense model.

    Raises:
        CheckpointError: it is none of a run, an exported checkpoint and a model.
    """
    if (folder / "job.yaml").is_file():
        job = load_yaml(folder / "job.yaml")
        model, source, _ = load_student(folder)
        made_from = validate(ModelConfig, job.get("teacher") or job["model"], str(folder / "job.yaml"))
        return Loaded(model.eval(), source, made_from, "run")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is neither a run (job.yaml) nor a model or an export (config.json)")
    if "quantization_config" in read_json(folder / "config.json"):
        from qat.checkpoints.exported import load_exported

        record = read_json(folder / "qat.json") if (folder / "qat.json").is_file() else {}
        origin = record.get("run", {}).get("model")
        return Loaded(
            (load_export or load_exported)(folder).eval(), folder, ModelConfig(id=origin) if origin else None, "export"
        )
    return Loaded(load_model(folder).eval(), folder, None, "model")


def evaluate_folder(
    folder: Path, teacher: str | None, texts: list[str], tokens: int, tasks: list[str]
) -> dict[str, Any]:
    """Scores of `folder` (and of its teacher) on held-out text; `--json` of `qat eval`."""
    loaded = load(folder)
    reference = ModelConfig(id=teacher) if teacher else loaded.made_from
    teacher_model = load_model(resolve(reference)).eval() if reference is not None else None
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    rows: list[dict[str, Any]] = []
    hashes = []
    both = [model for model in (loaded.model, teacher_model) if model is not None]
    length = limits.fitting(DataConfig().seq_len, *both)
    for source in texts or ["heldout"]:
        config = validate(DataConfig, {"source": source, "seq_len": length}, "--text")
        blocks = load_blocks(config, tokenizer, num_tokens=tokens)
        limits.check_rows(tokenizer, {"--text": blocks}, *both)
        judge = Judge(teacher_model, blocks)
        label = "" if not texts else f" on {source}"
        if teacher_model is not None:
            rows.append(_plain(judge.score(teacher_model, "the teacher reads").row(f"teacher{label}")))
        rows.append(_plain(judge.score(loaded.model, "the model reads").row(f"{loaded.kind}{label}")))
        hashes.append(blocks.digest)
    result: dict[str, Any] = {"rows": rows, "eval_hash": hashes, "teacher": reference.id if reference else None}
    if tasks:
        result["tasks"] = _tasks(loaded.model, tokenizer, tasks)
    return result


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """NaN (no teacher) as None, which JSON can say."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _tasks(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, dict[str, float]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs lm-eval: pip install 'qat-native[eval]' ({error})") from error
    with served(model):
        found = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


@torch.no_grad()
def generate(
    folder: Path,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    load_export: Callable[[Path], Any] | None = None,
) -> None:
    """Stream a continuation of `prompt` to stdout and the speed to stderr; `load_export` as in `load`."""
    from transformers import TextStreamer

    loaded = load(folder, load_export)
    tokenizer: Any = load_tokenizer(loaded.tokenizer_folder)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"{folder} has no chat template, so --chat cannot wrap the prompt; leave it out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    limits.check_ids(loaded.model, tokenizer, max(inputs["input_ids"].flatten().tolist(), default=0), "the prompt")
    length = inputs["input_ids"].shape[1] + tokens
    limits.warn(limits.check_positions(loaded.model, {"the length of the prompt and --tokens together,": length}))
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with served(loaded.model):
        began = time.monotonic()
        output = loaded.model.generate(
            **inputs, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    made = output.shape[1] - inputs["input_ids"].shape[1]
    seconds = time.monotonic() - began
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)
