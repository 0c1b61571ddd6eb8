"""auto-round: rounding, and the ranges of the weights, tuned block by block with signed gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from worker import load

SCHEMES = {"int4_g64": "W4A16G64", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def quantize(cell: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The model with the tuned weights on their grid; where inputs have four bits, its own layers round them."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = rows[cell["text"]]["input_ids"]
    rounds = AutoRound(
        load(cell["model"], torch.bfloat16),
        AutoTokenizer.from_pretrained(cell["model"]),
        scheme=SCHEMES[cell["format"]],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        seed=cell.get("seed", 0),
        **cell["settings"],
    )
    return rounds.quantize()[0]
