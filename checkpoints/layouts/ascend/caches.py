"""C8, the INT8 caches of Ascend checkpoints: a scale and an offset for each channel of each head of keys and values,
below the projections; who reads them, and what of them is refused.

The facts are those of vllm-ascend's `AscendC8KVCacheAttentionMethod` and `AscendC8AttentionBackendImpl` (0.23.0.post1,
0.30.0rc2): codes are round(x / scale + offset), but the attention operator and the gathering of pages multiply codes
with the scale alone. So an offset that is not zero shifts every key and value, and ours are zeros, as those of
msmodelslim's own recipes (symmetric: True).
"""

from typing import Any

import torch

from qat.checkpoints.layouts.caches import CacheLayout, TargetCache
from qat.checkpoints.layouts.kinds import int_columns
from qat.checkpoints.layouts.npu import A2_A3, ENGINES, Npu
from qat.errors import UnsupportedError
from qat.numbers.catalog import INT8
from qat.numbers.format import Format
from qat.serving.npu_attention import PAGE_COLUMNS

C8 = "C8"
KEYS = ("kv_cache_type", "kv_quant_type")
"""What the description says of caches: vllm-ascend asks for the first, MindIE for the second."""
SCALES = ("k_proj.kv_cache_scale", "v_proj.kv_cache_scale")
OFFSETS = ("k_proj.kv_cache_offset", "v_proj.kv_cache_offset")
_REMARK = (
    "vllm-ascend attends to the unrounded keys and values of a prompt that it reads in one piece, and to its C8 cache "
    "afterwards; 0.30.0rc2 hands the scales to captured graphs only with --kv-cache-dtype int8, and 0.23.0.post1 "
    "loads them by patches of its own for Qwen3, GLM-4-MoE and MiniMax-M2 alone"
)
OFFSET_REFUSED = (
    "vllm-ascend adds the offset when it writes the cache and does not subtract it when it reads it; readable: zeros"
)


def _config(fmt: Format) -> dict[str, Any] | None:
    return dict.fromkeys(KEYS, C8) if int_columns(fmt, INT8.bits) else None


def _note(fmt: Format) -> str:
    return f"of the engines known here vllm-ascend alone reads them: {_REMARK}"


def _scales(cache: TargetCache) -> tuple[str, str]:
    """Their names.

    Raises:
        UnsupportedError: engines would find no such scales, cannot lay out heads of this width, or attend otherwise.
    """
    if cache.projections is None:
        raise UnsupportedError(f"{cache.path}: {C8} stores scales of caches at k_proj and v_proj, which it lacks")
    if wrong := [width for width in cache.widths if width % PAGE_COLUMNS]:
        raise UnsupportedError(
            f"{cache.path}: heads of {wrong[0]} columns, but vllm-ascend lays {C8} caches out in pieces of "
            f"{PAGE_COLUMNS}; leave `key` and `value` out of its rule"
        )
    if cache.special:
        raise UnsupportedError(
            f"{cache.path}: its attention has {cache.special}, which vllm-ascend forgets where caches are {C8}; leave "
            "`key` and `value` out of its rule"
        )
    key, value = (f"{path}.kv_cache_scale" for path in cache.projections)
    return key, value


def _offsets(cache: TargetCache) -> tuple[str, ...]:
    return tuple(name.replace("kv_cache_scale", "kv_cache_offset") for name in _scales(cache))


CACHES = CacheLayout(
    _config,
    _note,
    _scales,
    lambda scale: scale.to(torch.float32),
    _offsets,
    C8,
    (Npu(ENGINES[0], A2_A3, remark=_REMARK),),
)


def is_of_cache(name: str) -> bool:
    """Whether a stored tensor belongs to a cache."""
    return name.endswith((*SCALES, *OFFSETS))
