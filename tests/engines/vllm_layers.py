"""Run inside vLLM's interpreter by test_vllm_engine.py: `python vllm_layers.py TASKS.json FOUND.json`.

One process loads several folders (starting vLLM is what takes the time). For each it writes down which scheme serves
every quantized layer and how far the layer's outputs are from an independent truth, or vLLM's error.
"""

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.arguments import input_format, weight_format
from qat.checkpoints.layouts.reader import ExportedFolder
from qat.kernels.packed_linear import cpu
from qat.training.activations import fake_quantize_input

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FEW, MANY = 5, 48  # tokens: codes decoded in registers, and slices of dense weights
ROUNDING = 2.0**-8  # relative error of rounding to BF16: half of the last of its 7 bits


def compare(model: nn.Module, folder: str) -> list[dict[str, Any]]:
    """One row per quantized layer of a model inside vLLM."""
    exported = open_export(Path(folder))
    return [
        row(layer, [f"{path.rpartition('.')[0]}.{name}".lstrip(".") for name in FUSED.get(leaf, (leaf,))], exported)
        for path, layer in model.named_modules()
        if (leaf := path.rpartition(".")[2]).endswith(("_proj", "lm_head")) and hasattr(layer, "scheme")
    ]


def row(layer: Any, members: list[str], exported: ExportedFolder) -> dict[str, Any]:
    module = exported.modules[members[0]]
    weight = torch.cat([exported.dense(member) for member in members])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MANY, weight.shape[1], generator=generator).mul(3).to(torch.bfloat16)
    x[1, 3] = 1e4
    quantized = x
    if module.input is not None:
        format = input_format(module.input)
        quantized = fake_quantize_input(x, format, "vllm", "ste", exported.static_input(members[0]))
    few = layer.quant_method.apply(layer, x[:FEW])[:, : weight.shape[0]]
    with patch.object(cpu, "_avx2_library", lambda: None):  # which rounds no weight to BF16; slices do
        many = layer.quant_method.apply(layer, x)[:, : weight.shape[0]]
    return {
        "members": members,
        "weight": weight_format(module.weights).name,
        "input": None if module.input is None else input_format(module.input).name,
        "scheme": type(layer.scheme).__name__,
        "equal": torch.equal(many, functional.linear(quantized, weight)),
        "excess": excess(few, quantized[:FEW].double(), weight.double()),
        "distance": float((many.float() - quantized.float() @ weight.float().t()).abs().max() / many.abs().max()),
        "held": sorted(name for name, _ in layer.named_parameters()),
    }


def excess(found: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    """Largest error over what is allowed, (for weights exact in BF16, for weights that the truth rounds to BF16).

    The result is rounded to BF16 once and summed in float32. The truth rounds every weight to BF16 besides, which moves
    every product by `ROUNDING` of its size; the kernel does not.
    """
    truth, size = x @ weight.t(), x.abs() @ weight.abs().t()
    once = ROUNDING * truth.abs() + 2.0**-20 * size + torch.finfo(torch.float32).tiny
    error = (found.double() - truth).abs()
    return float((error / once).max()), float((error / (once + ROUNDING * (1 + ROUNDING) * size)).max())


def main(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    found: list[dict[str, Any]] = []
    for task in tasks:
        llm = None
        options = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 2}
        try:
            llm = LLM(task["folder"], kv_cache_memory_bytes=64 << 20, **options, **task["options"])
            rows = llm.apply_model(partial(compare, folder=task["folder"]))[0]
            text = llm.generate(["The fox"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0]
            found.append({"rows": rows, "tokens": len(text.outputs[0].token_ids)})
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
        del llm
        gc.collect()
    return found


if __name__ == "__main__":
    tasks, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(main(json.loads(tasks.read_text()))))
