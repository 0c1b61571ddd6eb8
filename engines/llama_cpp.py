"""llama.cpp on a GGUF file, through llama-cpp-python where that is installed: its own server for `qat serve`, and its
own speed for `qat generate`. Nothing here computes."""

import codecs
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.layouts.gguf.read import check_file
from qat.errors import CheckpointError, ConfigError

NAME = "llama.cpp"
_SEEDS = (1 << 32) - 1  # llama.cpp takes the last one for "any"


def installed(*more: str) -> bool:
    """Whether llama-cpp-python is, and `more` packages."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", *more))


# --- server -----------------------------------------------------------------------------------------


def serve(file: Path, names: Sequence[str], host: str, port: int) -> None:
    """Becomes llama.cpp's own OpenAI server, as llama-cpp-python brings it along.

    Raises:
        CheckpointError: no whole GGUF file.
        ConfigError: the server is not installed, or more than one name.
    """
    if not installed("uvicorn", "fastapi"):
        raise ConfigError("--engine llama.cpp needs its server: pip install 'llama-cpp-python[server]'")
    if len(names) > 1:
        raise ConfigError("llama.cpp's server gives a model one name; give --served-model-name once")
    note_of_context(check_file(file), None)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", names[0]]
    command += ["--host", host, "--port", str(port), "--n_ctx", "0", "--verbose", "false"]
    print(f"qat serve: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    os.execv(sys.executable, command)


# --- text -------------------------------------------------------------------------------------------


def chosen(file: Path, engine: str, others: Sequence[str]) -> bool:
    """Whether llama.cpp writes for `qat generate`: where it is asked to, or reads the file and is installed.

    Args:
        file: what is given to it.
        engine: "auto", "llama.cpp", or "qat" for our own reader.
        others: options that were given and that only our own reader has.

    Raises:
        ConfigError: it is asked for with what it does not take.
    """
    readable = file.suffix == ".gguf"
    if engine == NAME and not readable:
        raise ConfigError(f"--engine llama.cpp reads .gguf files, but {file} is none; leave it out")
    if engine == NAME and others:
        raise ConfigError(f"{' and '.join(others)} cannot be given with --engine llama.cpp; leave one out")
    return engine == NAME or (engine == "auto" and readable and not others and installed())


def generate(
    file: Path, prompt: str, tokens: int, *, temperature: float = 0.0, seed: int = 0, chat: bool = False
) -> None:
    """Stream a continuation of `prompt` to stdout, and the engine and its speed to stderr.

    Raises:
        CheckpointError: no whole GGUF file, or one that llama.cpp does not load.
        ConfigError: llama.cpp is not installed, or a prompt that the model cannot read.
    """
    if not installed():
        raise ConfigError("--engine llama.cpp needs it: pip install llama-cpp-python (compiles it), or --engine qat")
    facts = check_file(file)
    threads = torch.get_num_threads()
    print(f"llama.cpp writes (llama-cpp-python {version('llama-cpp-python')}, {threads} threads)", file=sys.stderr)
    words = _load(file, vocab_only=True)
    text = _as_chat(words, prompt) if chat else prompt
    try:
        ids = words.tokenize(text.encode(), add_bos=not chat, special=True)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not Unicode text ({error.reason} at character {error.start})") from error
    if not ids:
        raise ConfigError(f"the prompt {prompt!r} holds no token for this model's tokenizer; give a text to continue")
    positions = int(words.metadata.get(f"{words.metadata.get('general.architecture')}.context_length", 0))
    if positions and len(ids) >= positions:
        raise ConfigError(f"the prompt has {len(ids)} tokens, but the model knows only {positions} positions")
    room = len(ids) + tokens if not positions else min(len(ids) + tokens, positions)
    if room < len(ids) + tokens:
        print(f"note: the model knows {positions} positions, so at most {room - len(ids)} follow", file=sys.stderr)
    note_of_context(facts, room)
    model = _load(file, n_ctx=room, n_threads=threads, n_threads_batch=threads, seed=seed % _SEEDS)
    if not chat:
        print(prompt, end="", flush=True)
    began, decoder, count = time.monotonic(), codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token in _written(model, ids, room - len(ids), temperature):
        print(decoder.decode(model.detokenize([token], prev_tokens=ids)), end="", flush=True)
        ids, count = [*ids, token], count + 1
    print(decoder.decode(b"", True), flush=True)
    seconds = time.monotonic() - began
    print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)


def note_of_context(facts: dict[str, Any], positions: int | None) -> None:
    """Say it where llama.cpp takes LongRoPE's factors of long texts for all of them, since it has so many `positions`
    (None: all that the model knows)."""
    arch = facts.get("general.architecture")
    known, old = (facts.get(f"{arch}.{key}") for key in ("context_length", "rope.scaling.original_context_length"))
    stretched = facts.get(f"{arch}.rope.scaling.attn_factor") is not None
    if stretched and old is not None and (positions or known or 0) > old:
        print(
            f"note: llama.cpp rotates every text as one of more than {old} tokens, since its context has more",
            file=sys.stderr,
        )


def _load(file: Path, **how: Any) -> Any:
    from llama_cpp import Llama  # type: ignore[import-not-found]  # compiled by whoever wants it

    try:
        return Llama(str(file), verbose=False, **how)
    except ValueError as error:
        raise CheckpointError(f"llama.cpp does not load {file}: {error}") from error


def _written(model: Any, ids: list[int], most: int, temperature: float) -> Iterator[int]:
    """Plain sampling or greedy search, as from our own reader, up to what ends a text."""
    import llama_cpp

    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    for _, token in zip(range(most), model.generate(ids, temp=temperature, **plain), strict=False):
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            return
        yield token


def _as_chat(words: Any, prompt: str) -> str:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # type: ignore[import-not-found]  # see above

    template = words.metadata.get("tokenizer.chat_template")
    if not template:
        raise ConfigError("the model has no chat template, so --chat cannot wrap the prompt; leave it out")
    ends = [
        words._model.token_get_text(number) if number >= 0 else "" for number in (words.token_eos(), words.token_bos())
    ]
    try:
        formatter = Jinja2ChatFormatter(template, *ends)
        text: str = formatter(messages=[{"role": "user", "content": prompt}]).prompt
    except Exception as error:  # a template is a program of the file's: it may fail in any way
        raise ConfigError(f"the model's chat template cannot wrap the prompt: {error}") from error
    return text
