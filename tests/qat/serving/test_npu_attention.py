"""Attention over INT8 caches as NPUs are asked for it, against numbers by hand and torch's own attention."""

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import lookup
from qat.serving import npu_attention as attention
from qat.training.activations import fake_quantize_input

HEADS, WIDTH = 2, 64
TABLES = torch.tensor([[3, 0], [2, 1]])
LENGTHS = [13, 9]
SIZE = 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def scales(seed: int) -> Tensor:
    return (drawn(HEADS, WIDTH, seed=seed).float().abs() / 60 + 0.005).bfloat16()


def test_codes_are_those_of_training_and_saturate() -> None:
    """Two readings of one rule: fake quantization, and torch's BF16 operators one by one."""
    scale, x = scales(1), drawn(300, HEADS, WIDTH, seed=2) * 2
    codes = attention.rounded(x, scale)
    assert codes.min() == -128 and codes.max() == 127
    trained = fake_quantize_input(x.float().flatten(1), lookup("int8_column"), "ascend", "ste", scale.float().flatten())
    assert torch.equal(attention.read(codes, scale).float().flatten(1), trained)


def test_pages() -> None:
    """Token t of a sequence, channel 32 p + c of head h: page table[t / size], [h, p, t % size, c]."""
    tokens = torch.arange(13 * HEADS * WIDTH).remainder(251).sub(125).to(torch.int8).view(13, HEADS, WIDTH)
    pages = attention.empty_pages(4, SIZE, HEADS, WIDTH)
    slots = torch.tensor([int(TABLES[0, t // SIZE]) * SIZE + t % SIZE for t in range(13)])
    attention.scatter_pa_kv_cache(tokens, pages, slots)
    for t, h, d in ((0, 0, 0), (5, 1, 33), (12, 1, 63), (8, 0, 40)):
        assert pages[TABLES[0, t // SIZE], h, d // 32, t % SIZE, d % 32] == tokens[t, h, d]
    assert torch.equal(attention.gathered(pages, TABLES[0], 13), tokens)
    assert not pages[1].any() and not pages[2].any()


@pytest.mark.parametrize("group", [1, 3])
def test_one_token_of_each_sequence(group: int) -> None:
    key_scale, value_scale = scales(3), scales(4)
    pages = (attention.empty_pages(4, SIZE, HEADS, WIDTH), attention.empty_pages(4, SIZE, HEADS, WIDTH))
    query = drawn(2, HEADS * group, WIDTH, seed=5)
    expected = []
    for sequence, length in enumerate(LENGTHS):
        slots = torch.tensor([int(TABLES[sequence, t // SIZE]) * SIZE + t % SIZE for t in range(length)])
        sides = []
        for side, scale, seed in zip(pages, (key_scale, value_scale), (6, 7), strict=True):
            codes = attention.rounded(drawn(length, HEADS, WIDTH, seed=seed + 10 * sequence), scale)
            attention.scatter_pa_kv_cache(codes, side, slots)
            sides.append((codes.bfloat16() * scale).float().transpose(0, 1)[None])
        asked = query[sequence].float().view(1, HEADS * group, 1, WIDTH)
        y = torch.nn.functional.scaled_dot_product_attention(asked, *sides, scale=0.125, enable_gqa=True)
        expected.append(y[0, :, 0])
    found = attention.fused_infer_attention_score(query, pages, (key_scale, value_scale), TABLES, LENGTHS, 0.125)
    assert found.dtype == torch.bfloat16 and found.shape == query.shape
    assert torch.allclose(found.float(), torch.stack(expected), rtol=2**-8, atol=1e-5)
