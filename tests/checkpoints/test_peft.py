"""peft itself as the second implementation: it loads the adapter of a student, and merges to the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.hf import ModelConfig, load_configured
from qat.checkpoints.peft import write_adapter
from qat.checkpoints.resume import student_tensors
from qat.lora import LoraConfig, adapters
from tests.qat.test_lora import student

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("base_is", ["dense", "packed"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_merges_to_the_same_weights(dora: bool, base_is: Any, tmp_path: Path) -> None:
    config = LoraConfig(rank=4, alpha=8, dora=dora, targets=("*.self_attn.*_proj", "*down_proj"), base=base_is)
    model = student(tmp_path, config, learn="none")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", student_tensors(model), config)
    base = load_configured(ModelConfig(id=str(tmp_path / "model")), tmp_path / "model")
    with torch.no_grad():
        for path, layer in adapters(model).items():
            base.get_submodule(path).weight.copy_(layer.weight if layer.held is None else layer.held.dequantize())
    base_weights = {path: base.get_submodule(path).weight.clone() for path in adapters(model)}
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    assert len(adapters(model)) == 10
    for path, layer in adapters(model).items():
        merged = layer.matrix("weight")
        assert torch.allclose(theirs.get_submodule(path).weight, merged, rtol=1e-6, atol=1e-7), path
        assert not torch.allclose(merged, base_weights[path], atol=1e-3)
