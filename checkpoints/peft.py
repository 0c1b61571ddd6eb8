"""Adapters in peft's own file format, beside the best student: `adapter_config.json` and `adapter_model.safetensors`.

peft writes and defines the config; the tensors are those of training under peft's names. They are relative to the
weights as the run's initialisation left them (`checkpoints/base` where that moved any).
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qat.errors import ConfigError
from qat.lora import LoraConfig, is_adapter

ADAPTER = "adapter_model.safetensors"
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def check_package() -> None:
    """Raises a ConfigError where peft is missing."""
    if find_spec("peft") is None:
        raise ConfigError("the job asks for lora, whose files peft writes: pip install peft (or qat-native[lora])")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Write the adapter among `tensors` (of a student) into `folder`, so that `PeftModel.from_pretrained` loads it."""
    from peft import LoraConfig as PeftConfig
    from peft import TaskType

    own = {name.rpartition(".lora."): tensor for name, tensor in tensors.items() if is_adapter(name)}
    paths = sorted({layer for layer, _, _ in own})
    alpha: Any = config.alpha  # peft only divides it by the rank, but its annotation says int
    PeftConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=paths,
        use_dora=config.dora,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    ).save_pretrained(str(folder))
    named = {f"base_model.model.{layer}.{_NAMES[part]}": tensor for (layer, _, part), tensor in own.items()}
    save_file(named, folder / ADAPTER, metadata={"format": "pt"})
