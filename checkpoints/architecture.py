"""What config.json says a model is, checked before a weight is read: a causal language model, whole, not quantized yet,
and the attention that it will run with."""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qat.errors import CheckpointError, UnsupportedError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_config(config: dict[str, Any], name: object, trust_remote_code: bool = False) -> None:
    """Refuse what cannot be trained here, by name.

    Args:
        config: what config.json holds.
        name: of the model, for messages.

    Raises:
        CheckpointError: config.json holds something else than its keys should.
        UnsupportedError: quantized weights, or no causal language model.
    """
    quantized = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in quantized:
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            named = isinstance(quantization, dict)
            method = quantization.get("quant_method", "an unnamed method") if named else quantization
            raise UnsupportedError(
                f"{name} is quantized already ({method}); give the original BF16, FP16 or FP32 weights"
                + (", or as model.id its folder on this machine to train it on" if method in _unpacked() else "")
            )
    _check_names(config, name, trust_remote_code)


def _unpacked() -> Collection[str]:
    """The `quant_method`s that `qat.checkpoints.packed` reads."""
    from qat.checkpoints.layouts import READERS

    return READERS


def _check_names(config: dict[str, Any], origin: object, trust_remote_code: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    remote = config.get("auto_map")
    if isinstance(remote, dict) and "AutoModelForCausalLM" in remote:
        if trust_remote_code:
            return
        if config.get("model_type") not in known:
            raise UnsupportedError(
                f"{origin} brings its own model code; read it, then set trust_remote_code: true to run it"
            )
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise CheckpointError(f"the config.json of {origin}: architectures must be a list of names, not {named!r}")
    if not named and config.get("model_type") in known:
        named = [known[config["model_type"]]]
    if not any(name in known.values() for name in named):
        given = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
        raise UnsupportedError(
            f"{origin} is not a causal language model that this transformers knows: {given}; "
            f"nearest: {nearest(given, known.values())}{_text_advice(config)}"
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{origin} ({', '.join(map(str, named))}) is an encoder-decoder model; only decoders can be trained here"
        )


def _text_advice(config: dict[str, Any]) -> str:
    """What to do with a model of several parts, one of which is a language model."""
    parts = sorted(key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))
    if not parts:
        return ""
    return (
        f". It is made of several parts ({', '.join(parts)}); save its language model as a checkpoint of its own "
        "and train that"
    )


def read_config(folder: Path, trust_remote_code: bool = False) -> "PretrainedConfig":
    """config.json as transformers understands it.

    Raises:
        CheckpointError: it has no such model type, or a value that it refuses.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            return config
    except Exception as error:  # whatever a wrong value makes the config's class raise
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'}: {error}") from error


def empty_model(
    config: "PretrainedConfig", name: object, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The architecture of `config` on the meta device; `name` is for messages.

    Raises:
        UnsupportedError: not a causal language model, the wrong values for one, or attention that cannot run here.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # whatever a wrong value makes the model's class raise
        raise loading_error(name, attn_implementation, error) from error
    if not isinstance(config, type(model.config)):
        parts = ", ".join(sorted(key for key in config.sub_configs if key != "text_config"))
        raise UnsupportedError(
            f"{name} is {type(config).__name__}, of which transformers would load only {type(model).__name__} and "
            f"drop the rest ({parts}); save its language model as a checkpoint of its own and train that"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedError(f"{name}: {type(model).__name__} has no output layer that can be told from its body")
    return model


def loading_error(
    name: object, attn_implementation: str | None, error: Exception
) -> UnsupportedError | CheckpointError:
    """What to tell a user whose model transformers refuses."""
    reason = str(error).strip() or type(error).__name__
    if attn_implementation is not None and ("attn" in reason or "attention" in reason.lower()):
        first = reason.split(". ")[0].split("\n")[0]
        return UnsupportedError(
            f"attn_implementation {attn_implementation!r} does not work here for {name}: {first}. Leave "
            "attn_implementation out to take what transformers chooses, or give another, such as eager"
        )
    return CheckpointError(f"transformers cannot load {name}: {reason}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence transformers' warnings, and its progress bars unless `bars`, for the block; then as before."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if had_bars and not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars and not bars:
            logging.enable_progress_bar()
