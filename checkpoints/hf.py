"""Loading any Hugging Face causal language model so that training starts from exactly the published weights.

`resolve` turns what a config names (hub id, folder, GGUF file, packed checkpoint, the embedded model) into a local
folder of safetensors; `load_model` reads that folder after checking what transformers would only warn about: truncated
shards, missing or surplus tensors, wrong architecture, weights quantized already. Nothing is unpickled.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import field_validator

from qat.cache import cache_folder
from qat.checkpoints.architecture import check_config, loading_error, read_config
from qat.checkpoints.architecture import quiet as quiet
from qat.checkpoints.architecture import read_json as read_json
from qat.checkpoints.shards import INDEX, ShardReader
from qat.config import Strict
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.text import some

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = ("embedded:smollm2-135m",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
# Copies of the same weights in other layouts, and other programs' folders.
_DO_NOT_DOWNLOAD = ["consolidated*", "original/*", "metal/*", "onnx/*", "*/*.safetensors"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".npz",
    ".pkl",
    ".index.json",
)
_DTYPES = (torch.float32, torch.bfloat16)
_SHOW_BAR_ABOVE = 2_000_000_000  # bytes; less loads in seconds


class ModelConfig(Strict):
    """Which model: a hub id, a local folder, the path of a .gguf file, or `embedded:smollm2-135m`.

    `attn_implementation` is transformers' (sdpa, eager, flash_attention_2, ...); by default what it chooses for the
    architecture, and a run's job.yaml says which that was.
    `fingerprint` is what a run records of it (`origin.fingerprint`); where it is given, another model is refused.
    """

    id: str
    revision: str | None = None
    fingerprint: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    @field_validator("id")
    @classmethod
    def _known(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("give a hub id, a folder, a .gguf file or " + EMBEDDED[0])
        if value.startswith("embedded:") and value not in EMBEDDED:
            raise ValueError(f"no such embedded model; there is {', '.join(EMBEDDED)}")
        return value


# --- from a name to a folder ---------------------------------------------------------------------


def is_local(config: ModelConfig) -> bool:
    """Whether `config` names something that needs no hub."""
    path = Path(config.id).expanduser()
    return config.id.startswith("embedded:") or path.suffix == ".gguf" or path.exists()


def resolve(config: ModelConfig, weights: bool = True) -> Path:
    """A local folder of safetensors, config and tokenizer for what `config` names; downloads or converts.

    Without `weights`, those of a hub model are not downloaded.

    Raises:
        CheckpointError: nothing there, not reachable, or not convertible.
        ConfigError: `revision` given for something that has none.
    """
    path = Path(config.id).expanduser()
    if config.revision is not None and is_local(config):
        raise ConfigError(
            f"model revision {config.revision!r} has no meaning for {config.id}: only hub models have one"
        )
    if config.id.startswith("embedded:"):
        from qat.checkpoints import gguf

        return gguf.convert(gguf.embedded_file(), cache_folder("models"))
    if path.is_dir():
        return _unpacked(local_folder(path))
    if path.suffix == ".gguf":
        from qat.checkpoints import gguf

        return gguf.convert(path, cache_folder("models"))
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder of a Hugging Face model, or a .gguf file")
    if path.is_absolute():
        raise CheckpointError(f"there is no folder {path}; if the model moved, say where it is now (model.id=PATH)")
    if not _HUB_ID.fullmatch(config.id):
        raise CheckpointError(f"there is no folder {path}, and {config.id!r} is not a hub id (owner/name)")
    return _download(config, weights)


def _unpacked(folder: Path) -> Path:
    """`folder`, or the dense model that a packed checkpoint in it was unpacked to."""
    from qat.checkpoints import packed

    return packed.convert(folder, cache_folder("models")) if packed.is_packed(folder) else folder


def local_folder(folder: Path) -> Path:
    """`folder`, if it is a Hugging Face model.

    Raises:
        CheckpointError: it is something else; says what.
    """
    if (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UnsupportedError(f"{folder} holds a model and an adapter; merge the adapter into the weights first")
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} holds GGUF files; give one of them: {', '.join(map(str, ggufs))}")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter, not a model; merge it into its base model first")
    raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face model")


def _download(config: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    at = f" at revision {config.revision!r}" if config.revision else ""
    try:
        folder = snapshot_download(
            config.id,
            revision=config.revision,
            allow_patterns=[*_DOWNLOAD, *(["*.py"] if config.trust_remote_code else [])],
            ignore_patterns=[*_DO_NOT_DOWNLOAD, *([] if weights else ["*.safetensors"])],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # Offline, unknown, private and gated repositories all end here; the library's first line says which.
        first_line = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        reason = f"{type(error).__name__}: {first_line}"
        raise CheckpointError(
            f"cannot get {config.id!r}{at}: no such local folder, and the Hugging Face hub says {reason}. "
            "Check the name, the network and (for gated models) `hf auth login`; without a network use a "
            f"local folder or {EMBEDDED[0]}"
        ) from error
    if weights and not any(Path(folder).glob("*.safetensors")):
        raise CheckpointError(
            f"the hub model {config.id!r}{at} has no safetensors, and pickled weights are not read; look for "
            "a revision or a copy that has, or convert it where you trust it"
        )
    return local_folder(Path(folder))


def describe(config: ModelConfig) -> tuple[Path, "PretrainedConfig"]:
    """The folder of what `config` names, and its checked config.json; weights of a hub model are not downloaded.

    Raises:
        CheckpointError: nothing there, not reachable, or not readable.
        UnsupportedError: a model that cannot be trained here.
    """
    folder = resolve(config, weights=False)
    check_config(read_json(folder / "config.json"), folder, config.trust_remote_code)
    return folder, read_config(folder, config.trust_remote_code)


# --- from a folder to a model --------------------------------------------------------------------


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> "PreTrainedModel":
    """The causal language model in `folder`, every tensor accounted for and finite.

    In float32 the weights are the exact stored BF16 values. Train or eval mode is the caller's choice.

    Memory of the host: on a GPU a few tensors at a time. On a CPU one model in `dtype`; none where the file has that
    type, since the model then lies in the mapped file, which all processes of a machine share until one writes to it.

    Args:
        device: where tensors go one by one as they are read; by default the CPU.

    Raises:
        CheckpointError: missing, truncated, surplus, mis-shaped, inconsistent or non-finite tensors or files.
        UnsupportedError: not a causal language model, quantized already, or attention that cannot run here.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"models load as {' or '.join(map(str, _DTYPES))}, not {dtype}")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    check_config(read_json(local_folder(folder) / "config.json"), folder, trust_remote_code)
    check_weights(folder)
    check_generation(folder)
    from transformers import AutoModelForCausalLM

    large = sum(path.stat().st_size for path in ShardReader(folder).shards) > _SHOW_BAR_ABOVE
    try:
        with quiet(bars=large), _with_metadata(folder) as readable:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                readable,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                device_map=_placement(device),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            )
    except Exception as error:  # whatever a wrong value in config.json or a wrong tensor makes transformers raise
        raise loading_error(folder, attn_implementation, error) from error
    model: PreTrainedModel = loaded[0]
    model.config._name_or_path = model.name_or_path = str(folder)
    check_loading(model, loaded[1], folder)
    _check_finite(model, folder)
    return model


def _placement(device: torch.device | None) -> dict[str, torch.device] | None:
    """transformers' `device_map` for a whole model; "cuda" means the GPU of this process."""
    if device is None or device.type == "cpu":
        return None
    return {"": torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device}


def load_configured(
    config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> "PreTrainedModel":
    """`load_model` of what a config names, which lies in `folder`, as it says."""
    return load_model(folder, dtype, config.attn_implementation, config.trust_remote_code, device)


def check_loading(model: "PreTrainedModel", info: dict[str, Any], origin: Path) -> None:
    """Refuse a model of which transformers made up, dropped or left apart some weights.

    Args:
        model: what from_pretrained returned.
        info: its `output_loading_info`.
        origin: folder or file, for the message.
    """
    problems = [
        f"{len(info[key])} {what}: {some(sorted(map(str, info[key])))}"
        for key, what in (
            ("missing_keys", "tensors are missing (they would be random)"),
            ("unexpected_keys", "tensors belong to no module (they would be ignored)"),
            ("mismatched_keys", "tensors have another shape than config.json asks for (name, found, wanted)"),
            ("error_msgs", "errors"),
        )
        if info.get(key)
    ]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    own, other = (getattr(layer, "weight", None) for layer in (head, embedding))  # packed layers have none
    if tied and head is not None and own is not other:
        problems.append(
            "config.json ties the output layer to the embedding, but the weights hold two different ones: "
            "set tie_word_embeddings to false if both are meant"
        )
    if problems:
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))


def _check_finite(model: "PreTrainedModel", origin: Path) -> None:
    """NaN or infinity in a weight spoils every loss, so it is named before anything is computed."""
    bad = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all())
    ]
    if bad:
        raise CheckpointError(f"{origin} holds NaN or infinity in {some(bad)}: the files are damaged; get them again")


def check_weights(folder: Path) -> None:
    """Refuse files that are damaged, pickled or hold codes, by name."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds pickled weights only ({some(pickles)}). Unpickling can run any code, so they "
            "are not read. Convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder, "
            'dtype="auto").save_pretrained(new_folder)'
        )
    reader = ShardReader(folder)
    reader.verify_complete()
    codes = {name: reader.info(name).code for name in reader.names()}
    # Integers are fine for buffers such as masks, but as weights they are codes whose scales nobody would apply.
    coded = [n for n, code in codes.items() if code.startswith(("F8", "F6", "F4"))]
    coded += [n for n, code in codes.items() if code[0] in "IU" and n.endswith((".weight", "_proj"))]
    if coded:
        raise UnsupportedError(
            f"{folder} is quantized already, although config.json does not say so: {some(sorted(coded))} hold codes; "
            "give the original BF16, FP16 or FP32 weights"
        )


@contextlib.contextmanager
def _with_metadata(folder: Path) -> Iterator[Path]:
    """`folder`, or links to its files where transformers could not read its index, which must have `metadata`."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    if index is None or isinstance(index.get("metadata"), dict):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        links = Path(name)
        for path in folder.iterdir():
            if path.name != INDEX:
                (links / path.name).symlink_to(path.resolve())
        (links / INDEX).write_text(json.dumps({**index, "metadata": {}}), encoding="utf-8")
        yield links


def check_generation(folder: Path) -> None:
    """Refuse a generation config that cannot be used: exports carry it along, and servers would trip over it."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    read_json(path)
    try:
        with quiet():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a wrong value makes it raise
        reason = str(error).rstrip(".")
        raise CheckpointError(f"{path} cannot be used: {reason}. Correct it, or remove it") from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer; looked for {', '.join(_TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception for a broken tokenizer.json
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error


# --- what is in it -------------------------------------------------------------------------------


def source_files(folder: Path) -> list[Path]:
    """Files of a model to copy byte for byte into an export: tokenizer, templates, generation config, ...

    Not weights in any format, config.json (an exporter writes its own), params.json (it describes weights in
    another layout, which engines would then look for), hidden files, or folders other than the templates'.
    """
    own = [path for path in folder.iterdir() if path.is_file()]
    templates = [path for path in folder.glob("additional_chat_templates/*") if path.is_file()]
    return sorted(
        path
        for path in own + templates
        if path.name not in ("config.json", "params.json")
        and not path.name.startswith(".")
        and not path.name.endswith(tuple(_WEIGHT_SUFFIXES))
    )
