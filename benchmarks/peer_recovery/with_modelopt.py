"""NVIDIA ModelOpt: calibrated fake quantization, and QAD, which distils the BF16 model into it."""

import copy
from typing import Any

import torch
from distil import IGNORE, train
from torch import Tensor, nn
from worker import load

CONFIGS = {  # method -> format -> name of ModelOpt's configuration
    "max": {"int4_g64": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "nvfp4": "NVFP4_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG"},
    "awq_lite": {"int4_g64": "INT4_AWQ_CFG", "nvfp4": "NVFP4_AWQ_LITE_CFG"},
    "local_hessian": {"nvfp4": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"},
    "four_over_six": {"nvfp4": "NVFP4_FOUR_OVER_SIX_CFG"},
}


def configuration(method: str, name: str) -> dict[str, Any]:
    """ModelOpt's own, with our group size where it is INT4."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, CONFIGS[method][name]))
    if name == "int4_g64":
        for entry in config["quant_cfg"]:
            sizes = (entry.get("cfg") or {}).get("block_sizes")
            if sizes:
                sizes[-1] = 64
    return config


def quantize(cell: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The model with ModelOpt's quantizers, after QAD if the method ends in +qad."""
    import modelopt.torch.quantization as mtq

    method, _, then = cell["method"].partition("+")
    model = load(cell["model"], torch.float32)

    @torch.no_grad()
    def calibrate(model: nn.Module) -> None:
        for row in rows[cell["text"]]["input_ids"]:
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=row[None], use_cache=False)

    model = mtq.quantize(model, configuration(method, cell["format"]), calibrate)
    if then == "qad":
        from modelopt.torch.distill import LogitsDistillationLoss

        own = LogitsDistillationLoss(reduction="none")

        def loss(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
            return own(student.float(), teacher.float())[targets != IGNORE].mean()

        train(model, load(cell["model"], torch.float32), rows["train"], cell["settings"]["lr"], loss)
    return model
