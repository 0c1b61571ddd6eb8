"""Which engine loads what of block-scaled FP8 checkpoints as transformers stores them."""

from qat.checkpoints.layouts.kinds import FP8_BLOCK, GROUP, fp8_input, fp8_weight
from qat.checkpoints.layouts.npu import A2_A3, A5, NPU_MX, on_npus
from qat.checkpoints.layouts.support import YES, Row, cell

_ROWS = "vLLM refuses block-scaled FP8 where 128 does not divide the rows of a fused layer other than the last one"
_LLAMA = (
    "SGLang's Llama class renames weight_scale_inv and then skips the scales with a warning: serve Llama models "
    "elsewhere; its Qwen and DeepSeek classes keep the name"
)
_NPU = (
    "vllm-ascend dequantizes block-scaled FP8 to BF16 on a2 and a3, without quantized inputs, and makes MXFP8 of it on "
    "950, which rounds the weights once more"
)
_DENSE = "plain transformers on a CPU multiplies with the dequantized weights and does not quantize the inputs"

ROWS: tuple[Row, ...] = (
    Row(
        "FP8 in blocks",
        lambda w, a: fp8_weight(w, FP8_BLOCK) and fp8_input(a, GROUP),
        (cell("exact", _DENSE), cell("yes", _ROWS), cell("yes", _LLAMA), YES),
        on_npus(*A2_A3, *A5, since=NPU_MX, remark=_NPU),
    ),
)
