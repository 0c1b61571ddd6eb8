"""FP8 times FP8 of many tokens by the library (`torch._scaled_mm`), where scales are per token, per row or per tensor.

From some 512 tokens on nothing but the tensor cores counts, where our kernel reaches 944 TFLOP/s of an H100's 1,979.
Two limits:

* Sums are asked for as our kernel makes them, promoted to float32 on the way. The library's fast sums stay in
  accumulators of 14 bits: at 8192 columns of normal numbers that alone is an error of 5e-3 (simulated), more than a
  result in BF16 may have here.
* INT8 stays with our kernel. The library (`torch._int_mm`) leaves int32 sums, which are written and read again to be
  scaled: 270 MB at 4,096 tokens of 8192 x 8192, which takes a fifth of the time of the whole product.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qat.numbers.catalog import E4M3, lookup

MANY = 512  # tokens
HOPPER = 90  # the only chip with results of this product to compare
ALIGNED = 16  # rows and columns come in such numbers


@lru_cache(maxsize=4096)
def takes(
    input_format: str, weight_format: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, capability: int
) -> bool:
    """Whether the library multiplies."""
    x, w = lookup(input_format), lookup(weight_format)
    known = all(fmt.is_single and fmt.element == E4M3 and fmt.block[1] == 0 for fmt in (x, w)) and w.block[0] == 1
    fits = dtype == torch.bfloat16 and rows % ALIGNED == 0 and columns % ALIGNED == 0
    return known and fits and tokens >= MANY and capability == HOPPER


def multiply(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    global_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """(tokens, rows) of codes (tokens, columns) and a weight (rows, columns); scales as in `qat.serving.matmul`."""
    by_token = scales.reshape(-1, 1).expand(len(codes), 1)
    by_token = by_token * global_scale if global_scale != 1 else by_token.contiguous()
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=by_token,
        scale_b=weight_scales.reshape(1, -1).to(torch.float32),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=False,
    )
