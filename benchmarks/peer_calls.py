"""How each peer of benchmarks/peers.py is called: from our quantized weight to a call of its kernel.

Each function takes a `QTensor` (or nothing, for losses and norms) and returns the call, so that a peer multiplies the
codes and scales that our kernel multiplies. Imports of peers stand inside the functions: none is a dependency. Names
and layouts are those of gemlite 0.6.0, vLLM 0.32.0, humming-kernels 0.1.19, liger-kernel 0.8.5 and triton_kernels of
Triton 3.5 to 3.8.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat.numbers.numerics import QTensor
from qat.numbers.scale import BF16, E8M0

Product = Callable[..., Any]


class RefusedError(Exception):
    """A peer does not take this format, shape or device; the message says why."""


# --- weights as peers want them ---


def _plain(weight: QTensor) -> Tensor:
    """One code per byte, in the dtype that says what it means; 4-bit integers count from their lowest."""
    element = weight.format.element
    if element.kind == "integer":
        return weight.codes.view(torch.int8) if element.bits == 8 else _offset(weight)
    return weight.codes.view(torch.float8_e4m3fn) if element.bits == 8 else weight.codes


def _offset(weight: QTensor) -> Tensor:
    """Codes of signed integers counted from the lowest one, as unsigned integers."""
    bits = weight.format.element.bits
    return weight.codes ^ (1 << (bits - 1)) if weight.format.element.kind == "integer" else weight.codes


def _words(weight: QTensor) -> Tensor:
    """int32 (rows, words): codes side by side, the first in the lowest bits; integers count from their lowest."""
    bits = weight.format.element.bits
    rows, columns = weight.shape
    per_word = 32 // bits
    if columns % per_word:
        raise RefusedError(f"{columns} columns do not fill words of {per_word} codes")
    codes = _offset(weight).view(rows, columns // per_word, per_word)
    words = torch.zeros(rows, columns // per_word, dtype=torch.int32, device=codes.device)
    for index in range(per_word):
        words |= codes[..., index].to(torch.int32) << (bits * index)
    return words


def _scales(weight: QTensor) -> Tensor:
    """(rows, groups) in the stored dtype, without the global scale."""
    stored = weight.scales.stored
    return stored.view(torch.float8_e8m0fnu) if weight.format.scale is E8M0 else stored


def gemlite(processor: str) -> Callable[[QTensor], Product]:
    """gemlite's layer of that name in `gemlite.helper`; it rounds 8-bit inputs itself. Autotunes at the first call.

    MX scales arrive as float8_e8m0fnu: as bytes they would be converted as numbers.
    """

    def build(weight: QTensor) -> Product:
        fmt, device = weight.format, weight.codes.device
        made = getattr(importlib.import_module("gemlite.helper"), processor)(device=str(device), dtype=torch.bfloat16)
        scales = _scales(weight)
        options: dict[str, Any] = {"scales": scales if fmt.group else scales.float()}
        if fmt.element.kind == "integer" and fmt.element.bits < 8:
            options["zeros"] = torch.full_like(scales, 1 << (fmt.element.bits - 1))
        if weight.scales.global_scale is not None:
            options["meta_scale"] = weight.scales.global_scale.reciprocal()  # gemlite divides by it
        layer = made.from_weights(_plain(weight), **options)
        return lambda x, *_: layer.forward(x)

    return build


def _marlin_shape(weight: QTensor) -> tuple[int, int]:
    """Rows and columns, if Marlin takes them as they are."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    rows, columns = weight.shape
    padded = marlin_utils.marlin_padded_nk(rows, columns, weight.format.group or -1)
    if padded != (rows, columns):
        raise RefusedError(f"vLLM would pad it to {padded[0]} x {padded[1]}, a larger product than ours")
    return rows, columns


def marlin_int4(weight: QTensor) -> Product:
    """Marlin for symmetric 4-bit integers, repacked from GPTQ's order as vLLM does."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    rows, columns = _marlin_shape(weight)
    group, device = weight.format.group or -1, weight.codes.device
    words = ops.gptq_marlin_repack(_words(weight).t().contiguous(), size_k=columns, size_n=rows, num_bits=4)
    scales = _scales(weight).t().contiguous()
    options = {
        "weight": words,
        "weight_scale": marlin_utils.marlin_permute_scales(scales, size_k=columns, size_n=rows, group_size=group),
        "weight_zp": marlin_utils.marlin_make_empty(device),
        "workspace": marlin_utils.marlin_make_workspace_new(device, marlin_utils.MARLIN_MAX_BLOCKS_PER_SM),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": rows,
        "input_size_per_partition": columns,
        "input_global_scale": None,
    }
    return lambda x, *_: marlin_utils.apply_gptq_marlin_linear(x, **options)


def marlin_fp4(weight: QTensor) -> Product:
    """Marlin for E2M1 codes in groups of 16 or 32, prepared by vLLM's own function."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4

    rows, columns = _marlin_shape(weight)
    layer = SimpleNamespace(
        output_size_per_partition=rows,
        input_size_per_partition=columns,
        params_dtype=torch.bfloat16,
        weight=_words(weight).view(torch.uint8),
        weight_scale=_scales(weight),
    )
    if weight.scales.global_scale is not None:
        layer.weight_global_scale = weight.scales.global_scale  # multiplies
    marlin_utils_fp4.prepare_fp4_layer_for_marlin(layer)
    options = {
        "weight": layer.weight,
        "weight_scale": layer.weight_scale,
        "weight_global_scale": getattr(layer, "weight_global_scale", None),
        "workspace": marlin_utils.marlin_make_workspace_new(weight.codes.device, marlin_utils.MARLIN_MAX_BLOCKS_PER_SM),
        "size_n": rows,
        "size_k": columns,
    }
    return lambda x, *_: marlin_utils_fp4.apply_fp4_marlin_linear(x, **options)


def cutlass(weight: QTensor) -> Product:
    """vLLM's CUTLASS product of 8-bit codes, scales per token and channel."""
    from vllm import _custom_ops as ops

    codes, scales = _plain(weight).contiguous().t(), weight.scales.effective()
    return lambda _, x, x_scales: ops.cutlass_scaled_mm(x, codes, x_scales, scales, torch.bfloat16)


def triton_kernels(weight: QTensor) -> Product:
    """Two generations: `matmul_ogs` with layouts as (class, options), and `matmul` with layouts as objects."""
    if importlib.util.find_spec("triton_kernels") is None:
        from vllm.utils.import_utils import import_triton_kernels  # the copy inside vLLM's CUDA wheels

        import_triton_kernels()
    try:
        from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
        from triton_kernels.tensor_details import layout
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error}: PyPI's package of that name is another project's") from error
    old = importlib.util.find_spec("triton_kernels.matmul_ogs") is not None
    module = importlib.import_module("triton_kernels.matmul_ogs" if old else "triton_kernels.matmul")
    multiply = module.matmul_ogs if old else module.matmul
    if old and torch.cuda.get_device_capability(weight.codes.device)[0] == 9:  # vLLM forbids split-K there, too
        flags = importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
        flags.update_opt_flags_constraints({"split_k": 1})

    def laid_out(tensor: Tensor, made: Any, dtype: Any = None) -> Any:
        """(1, K, N), with K next to each other in memory, in the order that the GPU wants."""
        target, options = made if isinstance(made, tuple) else (made, {})
        return convert_layout(wrap_torch_tensor(tensor[None].transpose(-2, -1), dtype=dtype), target, **options)

    axis, rows = (1 if old else -2), weight.shape[0]
    packed = laid_out(_words(weight).view(torch.uint8), layout.make_default_matmul_mxfp4_w_layout(mx_axis=axis), FP4)
    order = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=axis, num_warps=8)
    scale = laid_out(weight.scales.stored, order)
    names = {f.name for f in fields(module.PrecisionConfig)}
    options = {"b_mx_scale" if "b_mx_scale" in names else "weight_scale": scale}
    if "b_microblock_size" in names:
        options["b_microblock_size"] = weight.format.group
    config = module.PrecisionConfig(**options)
    return lambda x, *_: multiply(x, packed, None, precision_config=config).view(len(x), rows)


def humming(input_dtype: str | None) -> Callable[[QTensor], Product]:
    """Humming's layer, loaded with our codes; `input_dtype` is Humming's name of 8-bit inputs, which come as codes."""

    def build(weight: QTensor) -> Product:
        from humming.layer import HummingLayer

        fmt, (rows, columns) = weight.format, weight.shape
        element = fmt.element
        named = f"uint{element.bits}" if element.kind == "integer" else f"float{element.bits}{element.name}"
        config: dict[str, Any] = {"dtype": named, "group_size": fmt.group or 0}
        tensors = {"weight": _words(weight), "weight_scale": _scales(weight)}
        if fmt.scale is not BF16:
            config["scale_dtype"] = f"float8{fmt.scale}"
        if weight.scales.global_scale is not None:
            config["scale_2_type"] = "tensor"
            tensors["weight_scale_2"] = weight.scales.global_scale.reshape(1)
        inputs = None if input_dtype is None else {"dtype": input_dtype}
        layer = HummingLayer(rows, columns, weight_config=config, input_config=inputs, torch_dtype=torch.bfloat16)
        layer = layer.to(weight.codes.device)
        lacking = tensors.keys() - dict(layer.named_parameters()).keys()
        if lacking:
            raise RefusedError(f"its layer has no parameter called {', '.join(sorted(lacking))}")
        layer.load_from_tensors(tensors)
        layer.transform()
        if input_dtype is None:
            return lambda x, *_: layer(x)
        return lambda _, x, x_scales: layer(x, input_scale=x_scales)

    return build


# --- rows ---


def liger_norm(_: None) -> Product:
    """RMSNorm by Liger, its output to codes by our operator; returns both."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: Tensor, gain: Tensor, static: Tensor | None, name: str) -> Any:
        y = LigerRMSNormFunction.apply(x, gain, 1e-5, 0.0, "llama", False)
        return y, torch.ops.qat.quantize_input(y, static, name)

    return run


def liger_loss(kind: str) -> Callable[[None], Product]:
    """Loss and gradient of the student's logits; the mean over tokens, as Liger's fused path has it."""

    def build(_: None) -> Product:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.jsd import LigerJSDFunction
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction

        def run(student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
            logits = student.clone().requires_grad_()
            if kind == "cross_entropy":
                loss = LigerCrossEntropyFunction.apply(logits, targets, None)[0]
            else:
                log_q, log_p = (functional.log_softmax(t, dim=-1, dtype=torch.float32) for t in (logits, teacher))
                if kind == "forward_kl":
                    loss = LigerKLDivLossFunction.apply(log_q, log_p, "batchmean", True)
                else:
                    loss = LigerJSDFunction.apply(log_q, log_p, None, 0.5)
            loss.backward()
            assert logits.grad is not None
            return logits.grad

        return run

    return build


def summed(mean_gradient: Tensor) -> Tensor:
    """The gradient of the sum over tokens, which `qat::distill_rows` returns, from that of the mean."""
    return mean_gradient.float() * len(mean_gradient)
