"""llm-compressor: GPTQ, AWQ, SmoothQuant and plain rounding, layer by layer on inputs from the quantized prefix."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from worker import load


def modifiers(method: str, scheme: Any) -> list[Any]:
    """What llm-compressor calls a recipe. Methods are named after its modifiers, joined by +."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    where = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    known = {
        "rtn": lambda: QuantizationModifier(**where),
        "gptq": lambda: GPTQModifier(**where),
        "awq": lambda: AWQModifier(duo_scaling="both"),
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.5),
    }
    return [known[name]() for name in method.split("+")]


def scheme_of(name: str) -> Any:
    """A preset, INT4 with our groups; symmetric, as everything in the table."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = copy.deepcopy(preset_name_to_scheme({"int4_g64": "W4A16"}.get(name, name.upper()), ["Linear"]))
    if name == "int4_g64":
        scheme.weights.group_size = 64
    return scheme


def quantize(cell: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The model as `oneshot` leaves it: its layers round weights and inputs in every forward pass."""
    from llmcompressor import oneshot

    ids = rows[cell["text"]]["input_ids"]
    model = load(cell["model"], torch.bfloat16)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=None),
        recipe=modifiers(cell["method"], scheme_of(cell["format"])),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
        **cell["settings"],
    )
    return model
