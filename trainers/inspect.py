"""Looking at what exists: judge or sample a run, an exported checkpoint, or a plain model, on this machine."""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.decoding import TextStream
from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, read_json
from qat.checkpoints.origin import locate
from qat.checkpoints.resume import load_student
from qat.config import load_yaml, validate
from qat.errors import CheckpointError, ConfigError
from qat.surgery import served
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.evaluate import Judge


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer folder, and the name of what it was made from, if known."""

    model: Any
    tokenizer_folder: Path
    made_from: ModelConfig | None
    kind: str


def load(folder: Path, load_export: Callable[[Path], Any] | None = None, moved: str | None = None) -> Loaded:
    """Find out what `folder` is and load it.

    Args:
        folder: a run, an exported checkpoint or a model.
        load_export: how to load an export; None unpacks its weights into a dense model.
        moved: where the model that a run was made from is now, if its path changed.

    Raises:
        CheckpointError: it is none of a run, an exported checkpoint and a model.
        ConfigError: `moved` is given for something that is complete by itself.
    """
    if (folder / "job.yaml").is_file():
        job = load_yaml(folder / "job.yaml")
        model, source, _ = load_student(folder, moved=moved)
        made_from = validate(ModelConfig, job.get("teacher") or job["model"], str(folder / "job.yaml"))
        if moved is not None and not job.get("teacher"):
            made_from = made_from.model_copy(update={"id": moved, "revision": None})
        return Loaded(model.eval(), source, made_from, "run")
    if moved is not None:
        raise ConfigError(f"--model says where the model of a run is; {folder} is no run")
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
    folder: Path, teacher: str | None, texts: list[str], tokens: int, tasks: list[str], moved: str | None = None
) -> dict[str, Any]:
    """Scores of `folder` (and of its teacher) on held-out text; `--json` of `qat eval`. `moved` as in `load`."""
    loaded = load(folder, moved=moved)
    reference = ModelConfig(id=teacher) if teacher else loaded.made_from
    if reference is None and loaded.kind == "export":
        warnings.warn(
            f"{folder} does not say where its BF16 model is, so KL and agreement are left out: give it with --teacher",
            stacklevel=2,
        )
    hint = f"say where the teacher of {folder} is now: --teacher DIR"
    teacher_model = load_model(locate(reference, hint=hint)).eval() if reference is not None else None
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    rows: list[dict[str, Any]] = []
    hashes = []
    for source in texts or ["heldout"]:
        blocks = load_blocks(DataConfig(source=source), tokenizer, num_tokens=tokens)
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


class _Printer:
    """Prints tokens as `generate` makes them, first those of the prompt."""

    def __init__(self, tokenizer: Any, skip_prompt: bool) -> None:
        self._stream, self._skip = TextStream(tokenizer), skip_prompt

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token at a time."""
        if not self._skip:
            print("".join(map(self._stream.push, value.flatten().tolist())), end="", flush=True)
        self._skip = False

    def end(self) -> None:
        """No more tokens."""
        print(self._stream.rest(), flush=True)


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
    moved: str | None = None,
) -> None:
    """Stream a continuation of `prompt` to stdout and the speed to stderr; `load_export` and `moved` as in `load`."""
    loaded = load(folder, load_export, moved)
    tokenizer: Any = load_tokenizer(loaded.tokenizer_folder)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"{folder} has no chat template, so --chat cannot wrap the prompt; leave it out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    streamer = _Printer(tokenizer, skip_prompt=chat)
    with served(loaded.model):
        began = time.monotonic()
        output = loaded.model.generate(
            **inputs, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    made = output.shape[1] - inputs["input_ids"].shape[1]
    seconds = time.monotonic() - began
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)
