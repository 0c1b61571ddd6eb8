"""W4A8_DYNAMIC, which only experts have: bytes by an arithmetic of their own, the trained model read back, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.arguments import weight_args
from qat.checkpoints.layouts.ascend import write as target
from qat.checkpoints.layouts.ascend.types import BY_NAME
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from tests.checkpoints.exports import Pair, ids, rewrite
from tests.checkpoints.layouts.test_ascend import DESCRIPTION
from tests.checkpoints.test_simulated_experts import EXPERTS, export_experts, tiny

PAIR: Pair = ("int4_channel", "int8_token")
KIND = BY_NAME["W4A8_DYNAMIC"]
ROWS, COLUMNS = 8, 32


def values(tensors: dict[str, Tensor]) -> Tensor:
    """float64 (n, k), a byte at a time."""
    rows = []
    for pair in tensors["weight"].tolist():
        nibbles = [[byte % 16 for byte in pair], [byte // 16 % 16 for byte in pair]]
        rows += [[code - 16 if code > 7 else code for code in row] for row in nibbles]
    return torch.tensor(rows).double() * tensors["weight_scale"].double()


@pytest.mark.parametrize("path", ["a.experts.3.gate_proj", "a.experts.3.down_proj", "a.experts.3.w1", "a.experts.3.w2"])
def test_bytes_and_sums(path: str) -> None:
    q = quantize(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)), lookup(PAIR[0]))
    tensors = target.placed(target.pack(q, lookup(PAIR[1] or "")), path)
    stored = {name: ({torch.int8: "I8"}.get(t.dtype, "F32"), tuple(t.shape)) for name, t in tensors.items()}
    assert stored == KIND.specs(ROWS, COLUMNS, path=path)
    truth = values(tensors)
    assert torch.equal(truth, q.dequantize().double()) and truth.min() < 0 and not tensors["weight_offset"].any()
    slices = 16 if path.endswith(("down_proj", "w2")) else 1
    sums = 8 * truth.unflatten(1, (slices, -1)).sum(dim=-1)
    assert tensors["scale_bias"].shape == sums.shape and torch.equal(tensors["scale_bias"].double(), sums)
    found = target.unpack(PackedModule(path, "int-quantized", weight_args(q.format) or {}, None), tensors)
    assert torch.equal(found.codes, q.codes) and torch.equal(found.scales.stored, q.scales.stored)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_an_export_is_the_trained_model(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = export_experts(tiny(kind, tmp_path), out, PAIR)
    report = verify(out)
    assert report.ok, report.checks
    with torch.no_grad(), served(trained):
        assert torch.equal(load_exported(out)(ids()).logits, trained(ids()).logits)
    described = json.loads((out / DESCRIPTION).read_text())
    assert described["group_size"] == 0 and described.keys() >= open_export(out).names
    assert {described[name] for name in open_export(out).names if ".experts." in name} == {"W4A8_DYNAMIC"}


def test_sums_of_other_weights_and_dense_layers_are_refused(tmp_path: Path) -> None:
    out, path = tmp_path / "out", f"{EXPERTS}.0.down_proj"
    export_experts(tiny("qwen3_moe", tmp_path), out, PAIR)
    rewrite(out, lambda tensors: tensors.update({f"{path}.scale_bias": tensors[f"{path}.scale_bias"].roll(1, dims=1)}))
    with pytest.raises(CheckpointError, match=r"0\.down_proj\.scale_bias is not 8 times the sums"):
        open_export(out).dense(path)

    def renamed(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{path}.")]:
            tensors[name.replace(EXPERTS, "model.layers.0.mlp.shared")] = tensors.pop(name)

    rewrite(out, renamed)
    text = (out / DESCRIPTION).read_text()
    (out / DESCRIPTION).write_text(text.replace(f"{EXPERTS}.0.down_proj", "model.layers.0.mlp.shared.0.down_proj"))
    with pytest.raises(UnsupportedError, match=r"shared\.0\.down_proj is W4A8_DYNAMIC, but is no expert: vllm-ascend"):
        _ = open_export(out).modules
