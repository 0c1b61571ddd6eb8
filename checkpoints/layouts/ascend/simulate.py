"""A layer of an Ascend checkpoint as vllm-ascend runs it: what its scheme class makes of the stored tensors when it has
loaded them, and the operators that it then calls, simulated (`qat.serving.npu`). W4A16, which it does not load, follows
MindIE (`W4A16LinearStatic` of its atb_llm, read in its commit 8b4871a).

Inputs and outputs are of the model's type, whatever the model around it computes in: BF16, or FP16 on a 310P.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.checkpoints.layouts.ascend.types import Type
from qat.serving import npu
from qat.serving.npu_experts import grouped_matmul
from qat.training import phases


class SimulatedLinear(nn.Module):
    """In place of a linear layer.

    Args:
        kind: its type.
        tensors: what is stored of it, by name below its path, on any device.
        bias: that it adds, which static types have folded.
        model: the model's type.
        experts: whether it is a matrix of experts, for which the engine leaves ties of MXFP4 to the operator.
    """

    def __init__(
        self,
        kind: Type,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        model: torch.dtype = torch.bfloat16,
        experts: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.model = kind, model
        self.round_mode: Literal["round", "rint"] = "rint" if experts else "round"
        held = _held(kind, tensors, model)
        held |= _static(tensors, model) if kind.is_static else {}
        self.out_features, self.in_features = held["weight"].shape[1], held["weight"].shape[0]
        for name, tensor in held.items():
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("added", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) of any float type; the same type comes out."""
        rows = x.reshape(-1, x.shape[-1]).to(self.model)
        y = (self._answers(rows) if self.kind.is_static else self._product(rows)).to(x.dtype).view(*x.shape[:-1], -1)
        if not self.mixes:
            return y
        return phases.either(y, y, lambda: self._product(rows).to(x.dtype).view_as(y))

    @property
    def mixes(self) -> bool:
        """Whether it computes tokens of prompts otherwise than those of answers."""
        return self.kind.input == "mix"

    def _answers(self, x: Tensor) -> Tensor:
        """With static inputs; the bias is in `quant_bias`."""
        get = self.get_buffer
        codes = npu.quantize(x, get("reciprocal"), get("input_offset"))
        return npu.quant_matmul(codes, get("weight"), get("deq_scale"), bias=get("quant_bias"), output_dtype=self.model)

    def _product(self, x: Tensor) -> Tensor:
        get, kind = self.get_buffer, self.kind
        bias = self.added.float() if isinstance(self.added, Tensor) else None
        bits = kind.input_element.bits
        if kind.is_mx:
            codes, scales = npu.dynamic_mx_quant(x, bits, self.round_mode)
            return npu.mx_matmul(codes, get("weight"), None, pertoken_scale=scales, bias=bias)
        if not kind.input:
            return npu.weight_quant_matmul(x, get("weight"), get("scale"), get("offset"), bias)
        codes, scales = npu.dynamic_quant(x, bits)
        if kind.pairs_rows:
            weight, scale, assist = (get(name)[None] for name in ("weight", "scale", "assist"))
            return grouped_matmul(codes, weight, scale, [len(codes)], pertoken_scale=scales, assist=assist)
        if bits == 8:
            how: dict[str, Any] = {"pertoken_scale": scales, "bias": bias, "output_dtype": self.model}
            return npu.quant_matmul(codes, get("weight"), get("scale"), **how)
        wide = npu.quant_matmul(codes, get("weight"), get("scale"), pertoken_scale=scales, output_dtype=torch.float16)
        return wide.to(self.model) if bias is None else wide.to(self.model) + bias.to(self.model)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.kind.name}"


def _held(kind: Type, tensors: Mapping[str, Tensor], model: torch.dtype) -> dict[str, Tensor]:
    """What is not static of a layer, as it lies on a device."""
    if kind.is_mx:
        return _mx(tensors)
    if kind.pairs_rows and kind.group:
        return _groups(tensors, model)
    return {} if kind.input == "tensor" else _rows(tensors, model)


def _groups(tensors: Mapping[str, Tensor], model: torch.dtype) -> dict[str, Tensor]:
    """As MindIE holds them: scales and offsets are cast to the model's type, and the offset, which a loader subtracts,
    is added by the operator with the opposite sign."""
    scale, offset = (tensors[name].to(model).t() for name in ("weight_scale", "weight_offset"))
    return {"weight": rows_apart(tensors["weight"]).t().float(), "scale": scale, "offset": -offset}


def rows_apart(pairs: Tensor) -> Tensor:
    """int8 codes (n, k) of the bytes (n / 2, k) that two rows share: the low four bits are the even row of two."""
    low, high = (pairs & 15 ^ 8) - 8, pairs >> 4
    return torch.stack((low, high), dim=1).flatten(0, 1)


def _rows(tensors: Mapping[str, Tensor], model: torch.dtype) -> dict[str, Tensor]:
    """Scales and offsets are cast to the model's type; on a 310P they stay float32."""
    held = torch.float32 if model is torch.float16 else model
    scale, offset = (tensors[name].to(held).flatten() for name in ("weight_scale", "weight_offset"))
    if "scale_bias" in tensors:
        assist = tensors["scale_bias"].sum(dim=1)
        return {"weight": rows_apart(tensors["weight"]).t().float(), "scale": scale, "assist": assist}
    return {"weight": tensors["weight"].t().float(), "scale": scale, "offset": offset}


def _static(tensors: Mapping[str, Tensor], model: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": tensors["weight"].t().float(),
        "deq_scale": tensors["deq_scale"],
        "quant_bias": tensors["quant_bias"],
        "reciprocal": 1 / tensors["input_scale"].to(model),
        "input_offset": tensors["input_offset"].to(torch.int8).to(model),
    }


def _mx(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": npu.mx_values(tensors["weight"], npu.pair_scales(tensors["weight_scale"])).t()}
