"""Which engine loads what of compressed-tensors checkpoints: the pairs of formats that the layout holds, row by row."""

from qat.checkpoints.layouts.kinds import (
    FP8_BLOCK,
    GROUP,
    ROW,
    TENSOR,
    fp8_input,
    fp8_weight,
    int_input,
    int_weight,
    mx,
    nvfp4,
)
from qat.checkpoints.layouts.npu import A2_A3, A5, NPU_MX, on_npus
from qat.checkpoints.layouts.support import EXACT, NO, NV_OLD, SM89, UNKNOWN, YES, Row, cell
from qat.numbers.catalog import E2M1, E2M3, E4M3

_ASYMMETRIC = (
    "plain transformers (with compressed-tensors >= 0.18) cannot load asymmetric weights by default; pass "
    "quantization_config=CompressedTensorsConfig(dequantize=True)"
)
_STRADDLE = "compressed-tensors before 0.18 packs 3-bit weights differently and would misread these"
_NOT_48 = "SGLang unpacks 4- and 8-bit integers only"
_HUMMING = "vLLM quantizes the inputs only with its Humming kernels (--linear-backend humming), else runs weight-only"
_SM90 = "vLLM runs INT4 weights with FP8 inputs only on sm90"
_AS_FP8 = "TensorRT-LLM takes 8-bit integers with one scale per row for FP8 and computes garbage"
_BLOCKS = "vLLM quantizes the inputs of block-scaled FP8 in groups of 128 and needs widths that 128 divides"
_NV_PARSER = "TensorRT-LLM reads compressed-tensors NVFP4 in its newest versions only"
_MX_CEIL = "vLLM's dense MXFP4 kernel on sm100+ rounds input scales up (ceil); older GPUs run weight-only"
_MX_A4 = "vLLM quantizes the inputs of MXFP4 layers on sm100+ although this checkpoint does not ask for it"
_MX_A8 = "vLLM gives the FP8 inputs of MXFP4 layers float32 scales, and quantizes them on few GPUs"
_MX_AS_A16 = "TensorRT-LLM reads MXFP4 layers as weight-only"
_MX6 = "vLLM 0.33 and compressed-tensors before 0.20 have no MXFP6"
_MX8_A16 = "vLLM also quantizes the inputs of weight-only MXFP8 layers where its kernel does"
_IGNORES = (
    "plain transformers ignores `transform_config` and computes garbage; with compressed-tensors, "
    "`apply_transform_config` of its `input` parts makes up for it"
)
_HADACORE = (
    "vLLM rotates inputs in 16 bits on CUDA, on one rank, and where layers have no bias; with NVFP4 its QuTLASS "
    "kernels also give inputs scales of another rule"
)
_UNREAD = "SGLang and TensorRT-LLM are not known to read `transform_config`, and would compute garbage without"

ROWS: tuple[Row, ...] = (
    Row("4- and 8-bit integers", lambda w, a: a is None and int_weight(w, 4, 8), (EXACT, YES, YES, NO)),
    Row("2-bit integers", lambda w, a: a is None and int_weight(w, 2), (EXACT, YES, cell("no", _NOT_48), NO)),
    Row(
        "3-bit integers",
        lambda w, a: a is None and int_weight(w, 3),
        (cell("exact", _STRADDLE), YES, cell("no", _NOT_48), NO),
    ),
    Row(
        "4- and 8-bit integers with zero points",
        lambda w, a: a is None and int_weight(w, 4, 8, zero_point=True),
        (cell("yes", _ASYMMETRIC), YES, YES, NO),
    ),
    Row(
        "2-bit integers with zero points",
        lambda w, a: a is None and int_weight(w, 2, zero_point=True),
        (cell("yes", _ASYMMETRIC), YES, cell("no", _NOT_48), NO),
    ),
    Row(
        "3-bit integers with zero points",
        lambda w, a: a is None and int_weight(w, 3, zero_point=True),
        (cell("yes", _ASYMMETRIC, _STRADDLE), YES, cell("no", _NOT_48), NO),
    ),
    Row(
        "8-bit integers, 8-bit inputs",
        lambda w, a: int_weight(w, 8) and w.group is None and int_input(a, ROW, 8),
        (EXACT, YES, YES, cell("no", _AS_FP8)),
        on_npus(*A2_A3),
    ),
    Row(
        "8-bit integers, static 8-bit inputs",
        lambda w, a: int_weight(w, 8) and w.group is None and int_input(a, TENSOR, 8),
        (EXACT, YES, YES, cell("no", _AS_FP8)),  # vllm-ascend reads an `input_offset` that such files do not have
    ),
    Row(
        "4-bit integers, 8-bit inputs",
        lambda w, a: int_weight(w, 4) and int_input(a, ROW, 8),
        (EXACT, cell("yes", _HUMMING), NO, NO),
    ),
    Row(
        "other integers, integer inputs",
        lambda w, a: int_weight(w, 2, 4, 8) and int_input(a, ROW, 4, 8),
        (EXACT, cell("?", _HUMMING), NO, NO),
    ),
    Row(
        "3-bit integers, integer inputs",
        lambda w, a: int_weight(w, 3) and int_input(a, ROW, 4, 8),
        (cell("exact", _STRADDLE), cell("?", _HUMMING), NO, NO),
    ),
    Row(
        "4-bit integer groups, FP8 inputs",
        lambda w, a: int_weight(w, 4) and w.group is not None and fp8_input(a, ROW),
        (EXACT, cell("yes", _SM90), NO, NO),
    ),
    Row("FP8 weights", lambda w, a: fp8_weight(w, TENSOR, ROW) and a is None, (EXACT, YES, YES, UNKNOWN)),
    Row(
        "FP8",
        lambda w, a: fp8_weight(w, TENSOR, ROW) and fp8_input(a, ROW),
        (EXACT, cell("yes", SM89), YES, YES),
    ),
    Row(
        "FP8, static inputs",
        lambda w, a: fp8_weight(w, TENSOR, ROW) and fp8_input(a, TENSOR),
        (EXACT, cell("yes", SM89), YES, NO),
    ),
    Row(
        "FP8 in blocks",
        lambda w, a: fp8_weight(w, FP8_BLOCK) and fp8_input(a, GROUP),
        (EXACT, cell("yes", _BLOCKS), YES, YES),
    ),
    Row(
        "FP8 in blocks, other inputs",
        lambda w, a: fp8_weight(w, FP8_BLOCK) and (a is None or fp8_input(a, ROW)),
        (EXACT, cell("yes", _BLOCKS), UNKNOWN, UNKNOWN),
    ),
    Row("NVFP4", lambda w, a: nvfp4(w) and nvfp4(a), (EXACT, cell("yes", NV_OLD), YES, cell("yes", _NV_PARSER))),
    Row("NVFP4 weights", lambda w, a: nvfp4(w) and a is None, (EXACT, YES, YES, YES)),
    Row(
        "MXFP4",
        lambda w, a: mx(w, E2M1) and mx(a, E2M1),
        (EXACT, cell("yes", _MX_CEIL), NO, cell("yes", _MX_AS_A16)),
        on_npus(*A5, since=NPU_MX),
    ),
    Row("MXFP4 weights", lambda w, a: mx(w, E2M1) and a is None, (EXACT, cell("yes", _MX_A4), NO, YES)),
    Row(
        "MXFP4, FP8 inputs",
        lambda w, a: mx(w, E2M1) and (mx(a, E4M3) or fp8_input(a, ROW, GROUP)),
        (EXACT, cell("yes", _MX_A8), NO, UNKNOWN),
    ),
    Row(
        "MXFP6",
        lambda w, a: mx(w, E2M3) and (a is None or mx(a, E4M3)),
        (EXACT, cell("no", _MX6), UNKNOWN, UNKNOWN),
    ),
    Row("MXFP8", lambda w, a: mx(w, E4M3) and mx(a, E4M3), (EXACT, YES, NO, NO), on_npus(*A5, since=NPU_MX)),
    Row("MXFP8 weights", lambda w, a: mx(w, E4M3) and a is None, (EXACT, cell("yes", _MX8_A16), NO, NO)),
)

_ONE_FORMAT = (
    "plain transformers (with compressed-tensors 0.20) loads packed tables only where all layers have one format, "
    "with quantization_config=CompressedTensorsConfig(dequantize=True), and misreads or refuses others"
)
_NAMED = (
    "vLLM (0.32) reads packed tables of 2-, 4- and 8-bit integers without zero points in classes that give the table "
    "its name (Qwen2 and Qwen3; not Llama) and where no head is tied to it; it stops at others"
)
_UNFILLED = "SGLang skips the tensors of packed tables with a warning and computes garbage"

ROTATED = Row(
    "inputs rotated by a block Hadamard (`init: [hadamard, ...]`)",
    lambda w, a: a is not None,
    (cell("no", _IGNORES), cell("yes", _HADACORE), cell("?", _UNREAD), cell("?", _UNREAD)),
)

TABLES = Row(
    "packed tables (`--pack-tables`)",
    lambda w, a: a is None,
    (cell("yes", _ONE_FORMAT), cell("yes", _NAMED), cell("no", _UNFILLED), UNKNOWN),
)
