"""The types that are exchanged with other people's code: how msmodelslim is asked for each, and what engines need."""

from dataclasses import dataclass

from tests.ascend.places import ENGINES


@dataclass(frozen=True)
class Kind:
    """One type.

    Attributes:
        pair: our formats of weight and input.
        act, weight: scope and number type in msmodelslim's words.
        device: whose code the engine runs.
        symmetric: inputs.
        scheme: class of the engine that has to take it.
        derived: parameters that the engine computes, so that no file has them.
        operators: of torch_npu whose shape rules have to agree.
        produced: whether msmodelslim makes it by rounding alone (its 4-bit inputs come from another method).
    """

    pair: tuple[str, str | None]
    act: tuple[str, str]
    weight: tuple[str, str]
    device: str
    scheme: str
    operators: tuple[str, ...]
    symmetric: bool = True
    derived: tuple[str, ...] = ()
    produced: bool = True


_TOKEN, _CHANNEL = ("per_token", "int8"), ("per_channel", "int8")
_MXFP8, _MXFP4 = ("per_block", "mxfp8"), ("per_block", "mxfp4")
_INT8 = "int8_channel"
DECODES = ("npu_quant_matmul", "npu_quantize")
_DYNAMIC, _MX = ("npu_dynamic_quant", "npu_quant_matmul"), ("npu_dynamic_mx_quant", "npu_quant_matmul")
KINDS = {
    "W8A8_DYNAMIC": Kind(
        (_INT8, "int8_token"), _TOKEN, _CHANNEL, "A2", "AscendW8A8DynamicLinearMethod", _DYNAMIC
    ),
    "W8A8": Kind(
        (_INT8, "int8_tensor_asym"), ("per_tensor", "int8"), _CHANNEL, "A2", "AscendW8A8LinearMethod",
        DECODES, symmetric=False, derived=("weight_offset", "weight_scale"),
    ),
    "W8A8_MIX": Kind(
        (_INT8, "int8_mix"), ("pd_mix", "int8"), _CHANNEL, "A2", "AscendW8A8PDMixLinearMethod", _DYNAMIC,
        symmetric=False,
    ),
    "W8A16": Kind(
        (_INT8, None), ("per_tensor", "float"), _CHANNEL, "A2", "AscendW8A16LinearMethod",
        ("npu_weight_quant_batchmatmul",),
    ),
    "W4A4_DYNAMIC": Kind(
        ("int4_channel", "int4_token"), ("per_token", "int4"), ("per_channel", "int4"), "A2",
        "AscendW4A4LaosDynamicLinearMethod", _DYNAMIC, produced=False,
    ),
    "W8A8_MXFP8": Kind(
        ("mxfp8", "mxfp8"), _MXFP8, _MXFP8, "A5", "AscendW8A8MXFP8DynamicLinearMethod", _MX
    ),
    "W4A4_MXFP4": Kind(
        ("mxfp4", "mxfp4"), _MXFP4, _MXFP4, "A5", "AscendW4A4MXFP4DynamicLinearMethod", _MX
    ),
    "W4A8_MXFP": Kind(("mxfp4", "mxfp8"), _MXFP8, _MXFP4, "A5", "AscendW4A8MXFPDynamicLinearMethod", _MX),
}  # fmt: skip

STATIC = ("W8A8", "compressed-tensors", ("int8_channel", "int8_tensor"))
"""What that engine takes from compressed-tensors with a parameter that no such file has."""

PORTABLE = {"W8A8_DYNAMIC": ENGINES, "W8A8_MXFP8": ENGINES[1:], "W4A4_MXFP4": ENGINES[1:]}
"""Types that compressed-tensors has too, whose files engines for NVIDIA load; and the engines for Ascend that do."""
