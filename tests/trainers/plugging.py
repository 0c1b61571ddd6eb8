"""A tiny model prepared for other trainers, and the comparison of its export with its own forward pass."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qat
from qat.checkpoints.exported import load_exported

PRESET = "nvfp4+nvfp4"


def calibration() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 384, (2, 32), generator=generator)} for _ in range(2)]


def rows(count: int = 16, length: int = 24) -> list[dict[str, Tensor]]:
    drawn = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in drawn]


def loaded(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def made(source: Path, scheme: Any = PRESET, **options: Any) -> Any:
    return qat.prepare(loaded(source), scheme, calibration(), **options)


def states_differ(a: Any, b: Any) -> list[str]:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor.cpu(), theirs[name].cpu())]


def check_export(model: Any, out: Path, target: str = "compressed-tensors") -> None:
    """Export it, and compare what our reader computes with what the trained model computes, bit for bit."""
    qat.export(model, out, target)
    ids = (torch.arange(48) * 31 + 5).remainder(384)[None]
    mode = model.training
    model.eval()
    with torch.no_grad(), qat.served(model):
        expected = model(ids.to(model.device), use_cache=False).logits.float().cpu()
    model.train(mode)
    with torch.no_grad():
        found = load_exported(out)(ids, use_cache=False).logits
    assert torch.equal(found, expected)
