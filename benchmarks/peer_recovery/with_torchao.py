"""torchao: quantization-aware training, `prepare` with fake quantization and a training loop that is the user's."""

from typing import Any

import torch
from distil import cross_entropy, forward_kl, train
from torch import Tensor, nn
from worker import load


def base(name: str) -> Any:
    """The post-training configuration that QAT prepares for."""
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    if name == "int4_g64":
        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))
    if name == "nvfp4":
        return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    four = torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=four, weight_dtype=four, kernel_preference=KernelPreference.EMULATED
    )


def in_float32(module: nn.Module) -> None:
    """Take a layer out of autocast: the MX and NVFP4 layers refuse outputs of another type than their inputs."""
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return inner(x.float())

    module.forward = forward  # type: ignore[method-assign] # of this one layer


def quantize(cell: dict[str, Any], rows: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The prepared model after training: its layers round weights and inputs as the converted ones will."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    model = load(cell["model"], torch.float32)
    quantize_(
        model,
        QATConfig(base(cell["format"]), step="prepare"),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head",
    )
    for module in model.modules():
        if type(module).__name__ in ("MXFakeQuantizedLinear", "NVFP4FakeQuantizedLinear"):
            in_float32(module)
    if cell["method"] != "prepared":
        loss = {"qat": cross_entropy, "qad": forward_kl}[cell["method"]]
        train(model, load(cell["model"], torch.float32), rows["train"], cell["settings"]["lr"], loss)
    return model
