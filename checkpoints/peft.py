"""Adapters in peft's own file format: `adapter_config.json` and `adapter_model.safetensors`.

peft writes and defines the config; the tensors are those of training under peft's names. Beside a run's best student
they are relative to the weights as its initialisation left them (`checkpoints/base` where that moved any). Beside an
export, in its folder `adapter`, they are what is served: BF16, the scaling in B, next to packed weights that are not
changed; what is loaded here multiplies as peft does, each adapter with the input as it was before it is quantized.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from qat.adapters.experts import SECOND
from qat.checkpoints.hf import read_json
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.lora import LoraConfig, is_adapter
from qat.text import some
from qat.training.low_rank import beside_factors

FOLDER = "adapter"  # of an export
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_PREFIX = "base_model.model."
_MORE = ("use_dora", "modules_to_save", "target_parameters", "lora_bias", "fan_in_fan_out")  # than B A x


def check_package() -> None:
    """Raises a ConfigError where peft is missing."""
    if find_spec("peft") is None:
        raise ConfigError("the job asks for lora, whose files peft writes: pip install peft (or qat-native[lora])")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Write the adapter among `tensors` (of a student) into `folder`, so that `PeftModel.from_pretrained` loads it."""
    from peft import LoraConfig as PeftConfig
    from peft import TaskType

    own = {name.rpartition(".lora."): tensor for name, tensor in tensors.items() if is_adapter(name)}
    paths = sorted({layer for layer, _, part in own if "." not in part})
    stacks = sorted({f"{layer}.{part.partition('.')[0]}" for layer, _, part in own if "." in part})
    alpha: Any = config.alpha  # peft only divides it by the rank, but its annotation says int
    if not config.merge:
        alpha, scaling = config.rank, config.alpha / config.rank
        for layer in paths:
            a, b = ((layer, ".lora.", part) for part in "AB")
            own[a], own[b] = beside_factors(own[a], own[b], scaling)
    PeftConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=paths or None,
        target_parameters=stacks or None,
        use_dora=config.dora,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    ).save_pretrained(str(folder))
    named = dict(_named(layer, part, tensor, stacks) for (layer, _, part), tensor in own.items())
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in named.items()}, folder / ADAPTER, metadata={"format": "pt"}
    )


def _named(layer: str, part: str, tensor: Tensor, stacks: list[str]) -> tuple[str, Tensor]:
    """Name and shape that peft gives a factor. For experts it puts one wrapper into another, the last parameter's
    outermost, and lays A (experts, rank, columns) as (experts x rank, columns), B (experts, rows, rank) as
    (rows, rank x experts)."""
    slot, _, factor = part.rpartition(".")
    if not slot:
        return f"{_PREFIX}{layer}.{_NAMES[part]}", tensor
    inside = slot != SECOND and f"{layer}.{SECOND}" in stacks
    flat = tensor.flatten(0, 1) if factor == "A" else tensor.permute(1, 2, 0).flatten(1)
    return f"{_PREFIX}{layer}{'.base_layer' * inside}.{_NAMES[factor]}", flat


# --- beside a packed model ------------------------------------------------------------------------


def adapter_of(folder: Path) -> Path | None:
    """Where the adapter of an exported checkpoint lies, None where there is none."""
    return folder / FOLDER if (folder / FOLDER / CONFIG).is_file() else None


def rank_of(adapter: Path) -> int:
    """The rank of an adapter on disk."""
    return int(read_json(adapter / CONFIG)["r"])


def peft_reads(folder: Path) -> bool:
    """Whether an exported checkpoint has an adapter, and peft is here to load it."""
    return adapter_of(folder) is not None and find_spec("peft") is not None


def with_peft(model: Any, folder: Path) -> Any:
    """A model that plain transformers loaded, with its adapter as plain peft puts it there. Packed weights are unpacked
    first, when the model reads a token: peft asks for weights, and calls models past the hook that unpacks them."""
    from peft import PeftModel

    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return PeftModel.from_pretrained(model, str(folder / FOLDER))


class AdaptedLinear(nn.Module):
    """A layer of any kind with an adapter beside it, which sees its input as it was.

    Args:
        layer: the layer, with all that is hooked on it.
        A: (rank, columns).
        B: (rows, rank).
        scaling: of B A x.
    """

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = layer, scaling
        self.A, self.B = (nn.Parameter(factor.float(), requires_grad=False) for factor in (A, B))

    @property
    def weight(self) -> Any:
        """The layer's."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows), the adapter in float32, as peft computes it."""
        y: Tensor = self.base_layer(x)
        added = functional.linear(functional.linear(x.to(self.A.dtype), self.A), self.B) * self.scaling
        return (y + added).to(y.dtype)


def put_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of an exported checkpoint, if it has one, on the loaded model.

    Raises:
        CheckpointError: it does not fit the model, or is damaged.
        UnsupportedError: it is more than LoRA on linear layers.
    """
    adapter = adapter_of(folder)
    if adapter is None:
        return
    config = read_json(adapter / CONFIG)
    if more := [name for name in _MORE if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise UnsupportedError(f"{adapter}: {more[0]} is not served beside a packed model; merge it, or move it away")
    if not (adapter / ADAPTER).is_file():
        raise CheckpointError(f"{adapter} holds no {ADAPTER}")
    scaling = float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors, layers = load_file(adapter / ADAPTER), dict(model.named_modules())
    for path in sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors}):
        A, B = (tensors.pop(f"{_PREFIX}{path}.{_NAMES[part]}", None) for part in "AB")
        layer = layers.get(path)
        if layer is None or A is None or B is None:
            raise CheckpointError(f"{adapter}: {path} has no such layer in {type(model).__name__}, or lacks a factor")
        place = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
        model.set_submodule(path, AdaptedLinear(layer, A, B, scaling).to(place).train(layer.training))
    if tensors:
        raise CheckpointError(f"{adapter}: nothing reads {some(sorted(tensors))}")
