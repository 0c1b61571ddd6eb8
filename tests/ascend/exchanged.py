"""The types that are exchanged with other people's code: how msmodelslim is asked for each, and what engines need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One type.

    Attributes:
        act, weight: scope and number type in msmodelslim's words.
        device: whose code the engine runs.
        symmetric: inputs.
        scheme: class of the engine that has to take it.
        derived: parameters that the engine computes, so that no file has them.
        operators: of torch_npu whose shape rules have to agree.
        produced: whether msmodelslim makes it by rounding alone (its 4-bit inputs come from another method).
    """

    act: tuple[str, str]
    weight: tuple[str, str]
    device: str
    scheme: str
    operators: tuple[str, ...]
    symmetric: bool = True
    derived: tuple[str, ...] = ()
    produced: bool = True


_TOKEN, _CHANNEL = ("per_token", "int8"), ("per_channel", "int8")
KINDS = {
    "W8A8_DYNAMIC": Kind(
        _TOKEN, _CHANNEL, "A2", "AscendW8A8DynamicLinearMethod", ("npu_dynamic_quant", "npu_quant_matmul")
    ),
    "W8A8": Kind(
        ("per_tensor", "int8"), _CHANNEL, "A2", "AscendW8A8LinearMethod", ("npu_quant_matmul", "npu_quantize"),
        symmetric=False, derived=("weight_offset", "weight_scale"),
    ),
    "W8A16": Kind(
        ("per_tensor", "float"), _CHANNEL, "A2", "AscendW8A16LinearMethod", ("npu_weight_quant_batchmatmul",)
    ),
    "W4A4_DYNAMIC": Kind(
        ("per_token", "int4"), ("per_channel", "int4"), "A2", "AscendW4A4LaosDynamicLinearMethod",
        ("npu_dynamic_quant", "npu_quant_matmul"), produced=False,
    ),
    "W8A8_MXFP8": Kind(
        ("per_block", "mxfp8"), ("per_block", "mxfp8"), "A5", "AscendW8A8MXFP8DynamicLinearMethod",
        ("npu_dynamic_mx_quant", "npu_quant_matmul"),
    ),
    "W4A4_MXFP4": Kind(
        ("per_block", "mxfp4"), ("per_block", "mxfp4"), "A5", "AscendW4A4MXFP4DynamicLinearMethod",
        ("npu_dynamic_mx_quant", "npu_quant_matmul"),
    ),
    "W4A8_MXFP": Kind(
        ("per_block", "mxfp8"), ("per_block", "mxfp4"), "A5", "AscendW4A8MXFPDynamicLinearMethod",
        ("npu_dynamic_mx_quant", "npu_quant_matmul"),
    ),
}  # fmt: skip
