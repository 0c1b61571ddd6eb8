"""The few things of vLLM that vllm-ascend's linear layers compute with, as vLLM documents them; all else of it is a
stand-in. Put in place by `consume.py`."""

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

CURRENT = SimpleNamespace(
    quant_config=None,
    kv_transfer_config=None,
    additional_config={},
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    model_config=SimpleNamespace(architectures=(), hf_text_config=None, hf_config=None, dtype=torch.bfloat16),
)


class LinearBase(nn.Module):
    """A layer of which the engine sees the type only."""


class RowParallelLinear(LinearBase):
    """Not used: one device holds whole layers."""


class Parameter(nn.Parameter):
    """A parameter with a loader."""

    def __new__(cls, data: torch.Tensor, **named: Any) -> "Parameter":
        return super().__new__(cls, data, requires_grad=False)  # type: ignore[return-value]  # torch's stub says Tensor

    def __init__(self, *given: Any, **named: Any) -> None:
        pass


class Config:
    """Base of quantization configs."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def set_weight_attrs(weight: Any, attributes: dict[str, Any] | None) -> None:
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern


def should_ignore_layer(layer_name: str, ignore: list[str], fused_mapping: Any = None) -> bool:
    return any(_matches(layer_name, pattern) for pattern in ignore)


def find_matched_target(layer_name: str, module: Any, targets: Any, fused_mapping: Any = None) -> str | None:
    own = [target for target in targets if _matches(layer_name, target)]
    return own[0] if own else "Linear" if "Linear" in targets else None


def is_activation_quantization_format(format: str) -> bool:
    return format in ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized",
                      "mxfp4-pack-quantized", "mxfp8-quantized")  # fmt: skip


_OPERATORS = torch.library.Library("vllm", "FRAGMENT")


def direct_register_custom_op(op_name: str, op_func: Any, mutates_args: Any = None, **named: Any) -> None:
    """Under `torch.ops.vllm`, whatever the device."""
    if op_name in ("quantize", "unquantized_gemm"):  # those that linear layers call
        _OPERATORS.define(op_name + torch.library.infer_schema(op_func, mutates_args=mutates_args or []))
        _OPERATORS.impl(op_name, op_func, "CompositeExplicitAutograd")


_MODEL = "vllm.model_executor"
_CT = f"{_MODEL}.layers.quantization.compressed_tensors.utils"
PARTS: dict[str, dict[str, Any]] = {
    "vllm.config": {"get_current_vllm_config": lambda: CURRENT, "get_current_vllm_config_or_none": lambda: CURRENT},
    "vllm.utils.math_utils": {"cdiv": lambda a, b: -(-a // b)},
    "vllm.utils.torch_utils": {"direct_register_custom_op": direct_register_custom_op},
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    },
    f"{_MODEL}.utils": {"set_weight_attrs": set_weight_attrs},
    f"{_MODEL}.parameter": {"PerTensorScaleParameter": Parameter, "BlockQuantScaleParameter": Parameter},
    f"{_MODEL}.layers.linear": {"LinearBase": LinearBase, "RowParallelLinear": RowParallelLinear},
    f"{_MODEL}.layers.quantization.base_config": {"QuantizationConfig": Config},
    _CT: {
        "find_matched_target": find_matched_target,
        "should_ignore_layer": should_ignore_layer,
        "is_activation_quantization_format": is_activation_quantization_format,
    },
}
