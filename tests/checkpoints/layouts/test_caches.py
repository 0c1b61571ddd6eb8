"""What layouts say of caches, by format."""

import pytest

from qat.checkpoints.layouts import TARGETS
from qat.checkpoints.layouts.caches import cache_args, cache_format, engine_flag
from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG


def test_formats_of_caches() -> None:
    stored = [name for name, fmt in CATALOG.items() if cache_args(fmt)]
    assert stored == ["int8_tensor", "int8_column", "fp8_tensor"]
    for name in stored:
        args = cache_args(CATALOG[name])
        assert args is not None
        assert cache_format(args) is CATALOG[name]
        assert cache_format({**args, "group_size": None, "observer": "minmax", "actorder": None}) is CATALOG[name]
        for change in ({"num_bits": 4}, {"symmetric": False}, {"strategy": "attn_head"}, {"dynamic": True}):
            with pytest.raises(UnsupportedError, match="readable: int8_tensor, int8_column, fp8_tensor"):
                cache_format({**args, **change})
    flags = {name: flag for name, fmt in CATALOG.items() if (flag := engine_flag(fmt))}
    assert flags == {
        "int8_token": "int8_per_token_head",
        "int4_token": "int4_per_token_head",
        "fp8_token": "fp8_per_token_head",
        "nvfp4": "nvfp4",
    }


def test_what_targets_hold() -> None:
    held = {name: target.CACHES.holds() if target.CACHES else [] for name, target in TARGETS.items()}
    other: dict[str, list[str]] = {"fp8": [], "mxfp4": [], "ascend": ["int8_column"], "gguf": []}
    assert held == {"compressed-tensors": ["int8_tensor", "fp8_tensor"], "modelopt": ["fp8_tensor"], **other}
