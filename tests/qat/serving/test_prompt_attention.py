"""Attention of a prompt in INT8: how near two ways to quantize come to attention in float64, and what they refuse."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import UnsupportedError
from qat.serving.prompt_attention import KEYS, MAX, QUERIES, Codes, by_blocks, by_heads


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(tokens: int = 300, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads of queries, two of keys, which have outliers in the channels that models put them in."""
    keys = normal(2, 2, tokens, width, seed=1)
    keys[..., ::16] += 20 * normal(1, 2, 1, width // 16, seed=2)
    return normal(2, 4, tokens, width), keys, normal(2, 2, tokens, width, seed=3)


def exact(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """torch's own attention, in float64."""
    wide = (x.double() for x in (query, keys, values))
    return functional.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("causal", [False, True])
def test_by_blocks_comes_near_attention(causal: bool) -> None:
    x = prompt()
    found = by_blocks(*x).attend(64**-0.5, causal=causal, dtype=torch.float32)
    assert error(found, exact(*x, causal)) < 0.015


def test_without_their_mean_keys_have_no_outliers() -> None:
    """What smoothing gains: rounded with their mean left in, keys alone do four times the harm of all of it."""
    query, keys, values = prompt()
    truth = exact(query, keys, values, False)
    smooth = by_blocks(query, keys, values)
    scales = keys.unflatten(2, (-1, 60)).abs().amax(dim=(-2, -1)) / MAX  # five blocks of 60 tokens
    rough = (keys / scales.repeat_interleave(60, dim=-1)[..., None]).round() * scales.repeat_interleave(60, -1)[
        ..., None
    ]
    plain = error(exact(query, rough, values, False), truth)
    assert error(smooth.attend(64**-0.5, causal=False, dtype=torch.float32), truth) < plain / 4


def test_scales_are_those_of_blocks() -> None:
    query, keys, values = prompt()
    codes = by_blocks(query, keys, values)
    assert codes.query_scales.shape == (2, 4, -(-300 // QUERIES)) and codes.key_scales.shape == (2, 2, -(-300 // KEYS))
    last = query[1, 3, 2 * QUERIES :].abs().max() / MAX
    torch.testing.assert_close(codes.query_scales[1, 3, 2], last)
    assert codes.query[1, 3, 2 * QUERIES :].abs().max() == MAX and codes.query.abs().amax() == MAX
    held = codes.values.double() * codes.value_scales[..., None, None]
    torch.testing.assert_close(held, values.double(), rtol=2.0**-11, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_by_heads_is_attention_to_what_its_codes_stand_for(causal: bool) -> None:
    x = prompt()
    scales = [each.abs().amax(dim=(0, 2, 3)) / MAX * 0.8 for each in x]
    found = by_heads(*x, *scales).attend(64**-0.5, causal=causal, dtype=torch.float32)
    rounded = [
        (each / s[:, None, None]).round().clamp(-MAX, MAX) * s[:, None, None] for each, s in zip(x, scales, strict=True)
    ]
    assert error(found, exact(rounded[0], rounded[1], rounded[2], causal)) < 1e-5


def test_large_values_stay_finite() -> None:
    query, keys, values = prompt(70)
    codes = by_blocks(query, keys, values * 1e6)
    found = codes.attend(64**-0.5, causal=True, dtype=torch.float32)
    assert error(found, 1e6 * exact(query, keys, values, True)) < 0.015 and codes.values.abs().max() < 512


def test_one_scale_per_head_is_asked_for() -> None:
    query, keys, values = prompt(8)
    with pytest.raises(UnsupportedError, match="4 heads"):
        by_heads(query, keys, values, torch.ones(2), torch.ones(2), torch.ones(2))


def test_the_operator_checks() -> None:
    codes: Codes = by_blocks(*prompt(70))
    given = (codes.query, codes.keys, codes.values, codes.query_scales, codes.key_scales, codes.value_scales)
    torch.library.opcheck(
        torch.ops.qat.prompt_attention.default, (*given, 0.125, True, torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
