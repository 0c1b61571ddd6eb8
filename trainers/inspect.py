"""Looking at what exists: evaluate or sample a run, an exported checkpoint, or a plain model, on this machine."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from qat.checkpoints.architecture import empty_model
from qat.checkpoints.decoding import TextStream
from qat.checkpoints.hf import (
    ModelConfig,
    describe,
    load_configured,
    load_model,
    load_tokenizer,
    read_json,
    resolve,
)
from qat.checkpoints.layouts import described_by
from qat.checkpoints.origin import locate
from qat.checkpoints.positions import most_positions
from qat.checkpoints.resume import load_student
from qat.config import load_yaml, validate
from qat.errors import CheckpointError, ConfigError
from qat.modes import served
from qat.trainers import limits
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.device import torch_device
from qat.trainers.evaluate import Evaluator
from qat.trainers.packing import LEAKS, leakage
from qat.trainers.teacher import compare
from qat.training.phases import Phase, answering, mixes


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer folder, the name of what it was made from, if known, and whether its own
    code may run."""

    model: Any
    tokenizer_folder: Path
    made_from: ModelConfig | None
    kind: str
    trust_remote_code: bool = False


def load(
    folder: Path,
    load_export: Callable[..., Any] | None = None,
    device: torch.device | str = "cpu",
    moved: str | None = None,
    rule: str | None = None,
) -> Loaded:
    """Find out what `folder` is and load it.

    Args:
        folder: a run, an exported checkpoint (a folder, or a GGUF file) or a model.
        load_export: how to load an export, called with the folder and `device`; None unpacks its weights into a dense
            model.
        device: where to put it.
        moved: where the model that a run was made from is now, if its path changed.
        rule: of an export, whose arithmetic its inputs follow, on its dense weights.

    Raises:
        CheckpointError: it is none of a run, an exported checkpoint and a model.
        ConfigError: `moved` is given for something that is complete by itself.
    """
    if (folder / "job.yaml").is_file():
        job = load_yaml(folder / "job.yaml")
        own, teacher = (_named(job, key, folder) for key in ("model", "teacher"))
        student, source, _ = load_student(folder, moved=moved)
        model: Any = student
        if own is not None and moved is not None:
            own = own.model_copy(update={"id": moved, "revision": None})
        trusted = own is not None and own.trust_remote_code
        return Loaded(model.to(device).eval(), source, teacher or own, "run", trusted)
    if moved is not None:
        raise ConfigError(f"--model says where the model of a run is; {folder} is no run")
    if folder.suffix == ".gguf":
        from qat.checkpoints.layouts.gguf.load import load_file

        read: torch.nn.Module = load_file(folder)
        return Loaded(read.to(device), resolve(ModelConfig(id=str(folder))), None, "export")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is neither a run (job.yaml) nor a model or an export (config.json)")
    if described_by(folder)[0] is not None:
        from qat.checkpoints.exported import load_exported
        from qat.checkpoints.simulated import is_simulated, load_simulated

        record = read_json(folder / "qat.json") if (folder / "qat.json").is_file() else {}
        origin = record.get("run", {}).get("model")
        exported: Any
        if rule is not None:
            exported = load_exported(folder, rule)
        elif is_simulated(folder):
            exported = load_simulated(folder)
        else:
            exported = load_export(folder, device=str(device)) if load_export else load_exported(folder)
        return Loaded(exported.to(device).eval(), folder, ModelConfig(id=origin) if origin else None, "export")
    plain: torch.nn.Module = load_model(folder)
    return Loaded(plain.to(device).eval(), folder, None, "model")


def _named(job: dict[str, Any], key: str, folder: Path) -> ModelConfig | None:
    return validate(ModelConfig, job[key], str(folder / "job.yaml")) if job.get(key) else None


def evaluate_folder(
    folder: Path,
    teacher: str | None,
    texts: list[str],
    tokens: int,
    tasks: list[str],
    moved: str | None = None,
    device: str = "auto",
    rule: str | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Scores of `folder` (and of its teacher) on held-out text; `--json` of `qat eval`. `moved` and `rule` as
    in `load`; `prepare` changes how the loaded model (not the teacher) computes.

    Raises:
        ConfigError: no such device, no tokens, or a teacher that does not fit.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens} must be positive")
    place = torch_device(device)
    loaded = load(folder, device=place, moved=moved, rule=rule)
    if rule is not None and loaded.kind != "export":
        raise ConfigError(f"--activation-rule goes with an export; {folder} is a {loaded.kind}")
    if prepare is not None:
        prepare(loaded.model)
    reference = ModelConfig(id=teacher) if teacher else loaded.made_from
    if reference is None and loaded.kind == "export":
        warnings.warn(
            f"{folder} does not say where its BF16 model is, so KL and agreement are left out: give it with --teacher",
            stacklevel=2,
        )
    hint = f"say where the teacher of {folder} is now: --teacher DIR"
    teacher_model = _teacher(loaded, reference, place, hint) if reference is not None else None
    tokenizer = load_tokenizer(loaded.tokenizer_folder, loaded.trust_remote_code)
    rows: list[dict[str, Any]] = []
    hashes = []
    both = [model for model in (loaded.model, teacher_model) if model is not None]
    length = limits.fitting(DataConfig().seq_len, *both)
    packed = all(leakage(model) <= LEAKS for model in both)
    for source in texts or ["heldout"]:
        config = validate(DataConfig, {"source": source, "seq_len": length, "pack": packed}, "--text")
        blocks = load_blocks(config, tokenizer, num_tokens=tokens)
        limits.check_rows(tokenizer, {"--text": blocks}, *both)
        evaluator = Evaluator(teacher_model, blocks, device=place)
        label = "" if not texts else f" on {source}"
        if teacher_model is not None:
            rows.append(_plain(evaluator.score(teacher_model, "the teacher reads").row(f"teacher{label}")))
        rows.append(_plain(evaluator.score(loaded.model, "the model reads").row(f"{loaded.kind}{label}")))
        for phase in get_args(Phase) if mixes(loaded.model) else ():
            with answering(phase):
                scores = evaluator.score(loaded.model, f"the model reads all tokens as of a {phase}")
            rows.append(_plain(scores.row(f"{loaded.kind}{label} as {phase}")))
        hashes.append(blocks.digest)
    result: dict[str, Any] = {"rows": rows, "eval_hash": hashes, "teacher": reference.id if reference else None}
    if tasks:
        result["tasks"] = _tasks(loaded.model, tokenizer, tasks)
    return result


def _teacher(loaded: Loaded, reference: ModelConfig, device: torch.device, hint: str) -> Any:
    """The teacher, after seeing from its config and tokenizer that it fits."""
    folder = locate(reference, hint=hint)
    source, description = describe(reference)
    empty = empty_model(description, reference.id, reference.attn_implementation, reference.trust_remote_code)
    trusted = (loaded.trust_remote_code, reference.trust_remote_code)
    for note in compare(loaded.tokenizer_folder, source, loaded.model, empty, *trusted):
        warnings.warn(note, UserWarning, stacklevel=2)
    return load_configured(reference, folder).eval().to(device)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """NaN (no teacher) and infinity (a perplexity beyond floats) as None, which JSON can say."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _tasks(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, dict[str, float]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs lm-eval: pip install 'qat-native[eval]' ({error})") from error
    with served(model):
        evaluated = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in evaluated["results"].items()
    }


# --- text ---------------------------------------------------------------------------------------------


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
    device: str = "cpu",
    load_export: Callable[..., Any] | None = None,
    make_cache: Callable[[Any, int], Any] | None = None,
    moved: str | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> None:
    """Stream a continuation of `prompt` to stdout and the speed to stderr; `load_export` and `moved` as in `load`,
    `prepare` as in `evaluate_folder`.

    Args:
        make_cache: gives the engine's cache for a model and so many positions, or None for transformers' own.

    Raises:
        ConfigError: no such device, or a prompt that this model cannot read.
    """
    loaded = load(folder, load_export, torch_device(device), moved)
    if prepare is not None:
        prepare(loaded.model)
    tokenizer: Any = load_tokenizer(loaded.tokenizer_folder, loaded.trust_remote_code)
    inputs = _prompt(loaded.model, tokenizer, prompt, chat)
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(seed)
    room = _room(loaded.model, length, tokens)
    loaded.model.generation_config = _generation(loaded.model, tokenizer, room, temperature)
    streamer = _Printer(tokenizer, skip_prompt=chat)
    with served(loaded.model):
        cache = None if make_cache is None else make_cache(loaded.model, length + room)
        given = {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}
        began = time.monotonic()
        output = loaded.model.generate(**given, streamer=streamer, past_key_values=cache)
    count = output.shape[1] - length
    seconds = time.monotonic() - began
    print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)
    if (cost := getattr(cache, "cost", None)) is not None:
        print(cost, file=sys.stderr)


def _prompt(model: Any, tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Ids and mask, both (1, tokens)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not Unicode text ({error.reason} at character {error.start})") from error
    if chat:
        prompt = _as_chat(tokenizer, prompt)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ConfigError(f"the prompt {prompt!r} holds no token for this model's tokenizer; give a text to continue")
    limits.check_ids(model, tokenizer, max(ids), "the prompt")
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("the model has no chat template, so --chat cannot wrap the prompt; leave it out")
    messages = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
        raise ConfigError(f"the model's chat template cannot wrap the prompt: {error}") from error
    return text


def _room(model: Any, used: int, tokens: int) -> int:
    """How many of `tokens` fit behind the prompt."""
    positions = most_positions(model)
    if positions is None or used + tokens <= positions:
        return tokens
    if used >= positions:
        raise ConfigError(f"the prompt has {used} tokens, but the model knows only {positions} positions; shorten it")
    print(f"note: the model knows {positions} positions, so at most {positions - used} tokens follow", file=sys.stderr)
    return positions - used


def _generation(model: Any, tokenizer: Any, tokens: int, temperature: float) -> Any:
    """Plain sampling or greedy search; of the checkpoint's own settings only what ends a text or limits the choice, as
    in `qat serve`.

    The rest (beams, stored lengths, ...) would change what is measured, and a file with a mistake need not stop us.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens, "use_cache": True}
    settings["disable_compile"] = True  # an engine records steps instead
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(own, name, None)
        ids = value if isinstance(value, list) else [value]
        usable = bool(ids) and all(type(i) is int for i in ids)
        settings[name] = value if usable else getattr(tokenizer, name, None)
    if settings["pad_token_id"] is None:
        end = settings["eos_token_id"]
        settings["pad_token_id"] = end[0] if isinstance(end, list) and end else end
    penalty = getattr(own, "repetition_penalty", None)
    if isinstance(penalty, int | float) and penalty > 0:
        settings["repetition_penalty"] = penalty
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0}  # none: left out, `generate` would fill in 50
        checks = {"top_k": _is_count, "top_p": _is_share, "min_p": _is_share}
        settings |= {name: value for name, fits in checks.items() if fits(value := getattr(own, name, None))}
    return GenerationConfig(**settings)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
