"""Tiny models of Phi-3's kind, by what is special about each: a window (as Phi-3-mini-4k has one), frequencies for long
texts (128k), a part of each head that is rotated (Phi-4-mini)."""

from typing import Any


def longrope(rotated: int = 32, **more: Any) -> dict[str, Any]:
    """Settings of LongRoPE for so many rotated channels of a head of 32."""
    kinds = {"long_factor": 0.31, "short_factor": 0.07}
    factors = {kind: [1.0 + step * i for i in range(rotated // 2)] for kind, step in kinds.items()}
    part = {"partial_rotary_factor": rotated / 32} if rotated != 32 else {}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **part, **more}}


PHI3S: dict[str, dict[str, Any]] = {
    "4k": {"sliding_window": 500, "original_max_position_embeddings": 512},
    "128k": {**longrope(), "original_max_position_embeddings": 32, "sliding_window": 4096},
    "128k, short text": {**longrope(), "original_max_position_embeddings": 256},
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}},
    "4 mini": {**longrope(24), "original_max_position_embeddings": 256, "tie_word_embeddings": True},
}
"""By name, what tiny_model("phi3") is given."""
