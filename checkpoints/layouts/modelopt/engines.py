"""Which engine loads what of modelopt checkpoints. A row's scheme is the `quant_algo` that is written."""

from qat.checkpoints.layouts.kinds import ROW, TENSOR, fp8_input, fp8_weight, mx, nvfp4
from qat.checkpoints.layouts.npu import A5, NPU_MX, on_npus
from qat.checkpoints.layouts.support import NV_OLD, SM89, YES, Row, cell
from qat.numbers.catalog import E4M3

NO_PLAIN = "plain transformers fails on modelopt checkpoints (shapes do not fit); export compressed-tensors for it"
_REROUND = "SGLang rounds fused FP8 layers once more through FP16 while loading, which moves weights below about 1e-6"
_NO_CHANNEL = "SGLang knows modelopt's FP8 with one scale per tensor only"
_MX8_100 = "SGLang runs MXFP8 on sm100+ only, and its Llama class skips the scales"

ROWS: tuple[Row, ...] = (
    Row("NVFP4", lambda w, a: nvfp4(w) and nvfp4(a), (cell("no", NO_PLAIN), cell("yes", NV_OLD), YES, YES)),
    Row("W4A16_NVFP4", lambda w, a: nvfp4(w) and a is None, (cell("no", NO_PLAIN), YES, YES, YES)),
    Row(
        "FP8",
        lambda w, a: fp8_weight(w, TENSOR) and fp8_input(a, TENSOR),
        (cell("no", NO_PLAIN), cell("yes", SM89), cell("yes", _REROUND), YES),
    ),
    Row(
        "FP8_PER_CHANNEL_PER_TOKEN",
        lambda w, a: fp8_weight(w, ROW) and fp8_input(a, ROW),
        (cell("no", NO_PLAIN), cell("yes", SM89), cell("no", _NO_CHANNEL), YES),
    ),
    Row(
        "MXFP8",
        lambda w, a: mx(w, E4M3) and mx(a, E4M3),
        (cell("no", NO_PLAIN), YES, cell("yes", _MX8_100), YES),
        on_npus(*A5, since=NPU_MX),
    ),
)
