"""Run by test_prompt_attention.py under TRITON_INTERPRET=1: the kernel's source, executed on the CPU, against float64
arithmetic on the same codes. Probabilities become FP16, which is all that it may be off by."""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from qat.kernels.prompt_attention import triton as kernel
from qat.serving.attention import attention
from qat.serving.prompt_attention import KEYS, QUERIES, Codes, by_blocks, by_heads
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def exact(codes: Codes, scaling: float, causal: bool) -> Tensor:
    """By another road: every code times its scale, then attention in float64."""

    def dequantized(x: Tensor, scales: Tensor, size: int) -> Tensor:
        tokens = torch.arange(x.shape[-2])
        which = torch.zeros_like(tokens) if scales.shape[-1] == 1 else tokens // size
        return x.double() * scales.double()[..., which, None]

    query, keys = dequantized(codes.query, codes.query_scales, QUERIES), dequantized(codes.keys, codes.key_scales, KEYS)
    values = codes.values.double() * codes.value_scales.double()[..., None, None]
    return attention(query, keys, values, None, scaling, causal)


def run(codes: Codes, scaling: float, causal: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    given = (codes.query, codes.keys, codes.values, codes.query_scales, codes.key_scales, codes.value_scales)
    return kernel.prompt_attention(*given, scaling, causal, dtype)


def check(what: str, codes: Codes, causal: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    scaling = codes.query.shape[-1] ** -0.5
    found, truth = run(codes, scaling, causal, dtype), exact(codes, scaling, causal)
    assert found.shape == truth.shape and found.dtype == dtype, what
    error = float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    assert error <= (4e-4 if dtype == torch.float32 else 8e-4), f"{what}: {error}"
    return found


def both(batch: int, heads: int, groups: int, queries: int, tokens: int, width: int, value_width: int) -> list[Codes]:
    query, keys = normal(batch, heads * groups, queries, width), normal(batch, heads, tokens, width)
    keys += 3 * normal(1, heads, 1, width)
    values = normal(batch, heads, tokens, value_width)
    scales = [x.abs().amax(dim=(0, 2, 3)) / 127 * 0.9 for x in (query, keys, values)]  # some are clamped
    return [by_blocks(query, keys, values), by_heads(query, keys, values, *scales)]


EMPTY = torch.Tensor.new_empty


def poisoned(*given: Any, **more: Any) -> Tensor:
    made = EMPTY(*given, **more)
    return made.fill_(torch.nan) if made.is_floating_point() else made


def main() -> None:
    mend()
    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]  # what nothing writes is seen
    for sizes in ((1, 1, 1, 1, 1, 16, 16), (1, 2, 2, 5, 70, 32, 48), (2, 1, 3, 129, 200, 64, 64),
                  (1, 1, 1, 64, 64, 80, 96), (1, 1, 2, 130, 130, 128, 128)):  # fmt: skip
        for codes, causal in itertools.product(both(*sizes), (False, True)):
            check(f"{sizes} {causal}", codes, causal)
    codes = both(1, 2, 1, 130, 190, 64, 64)[0]
    check("half", codes, True, torch.float16)
    first, second = run(codes, 0.125, True), None
    for head in (0, 1):  # alone as in company, to the bit
        parts = (getattr(codes, name)[:, head : head + 1] for name in Codes.__dataclass_fields__)
        second = run(Codes(*parts), 0.125, True)
        assert torch.equal(second, first[:, head : head + 1])
    more = both(1, 1, 1, 10, 4, 32, 32)[0]  # the first six queries see nothing
    assert not check("more queries than keys", more, True)[:, :, :6].any()
    none = Codes(more.query, more.keys[:, :, :0], more.values[:, :, :0], more.query_scales, more.key_scales[..., :0],
                 more.value_scales)  # fmt: skip
    assert not run(none, 1.0, False).any()
    large = by_blocks(normal(1, 1, 3, 32) * 1e4, normal(1, 1, 70, 32) * 1e-6, normal(1, 1, 70, 32) * 1e6)
    check("values beyond FP16", large, True)
    query, keys, values = normal(1, 1, 3, 32), normal(1, 1, 70, 32), normal(1, 1, 70, 32)
    query[0, 0, 1, 4] = torch.nan
    assert run(by_blocks(query, keys, values), 1.0, False).isnan().all(), "a NaN vanished"
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
