"""Run by test_attention.py under TRITON_INTERPRET=1: tiny models decode from quantized caches the way a GPU does it, by
the Triton kernel, and make no tensor of the size of what they cached, neither of numbers nor of bytes."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat.engines.attention import Held
from qat.engines.cache import QuantizedCache
from qat.kernels.load import register
from tests.engines.test_cache import made
from tests.kernels.interpreted import mend
from tests.tiny import tiny_model

TOKENS, HEADS, WIDTH = 290, 2, 32  # two pieces
NOT_READ = ("int4_g32_asym", "fp8_tensor")
PAIRS = (("fp8_tensor", "fp8_tensor"), ("int8_token", "int4_token"), ("nvfp4", "nvfp4"), NOT_READ)


class Largest(TorchDispatchMode):
    """The most bytes that an operation brought into being, and the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.called = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor) and not isinstance(t, Held)}
        result = func(*args, **(kwargs or {}))
        self.called.add(str(func))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


def decode(model: Any, cache: Any, batch: int) -> tuple[Tensor, Largest]:
    """Logits of two steps behind a long prompt, and what the last of them made."""
    ids = torch.arange(batch * (TOKENS + 2)).mul(37).remainder(300).view(batch, -1) + 3
    with torch.inference_mode():
        model(input_ids=ids[:, :TOKENS], past_key_values=cache, use_cache=True)
        first = model(input_ids=ids[:, TOKENS : TOKENS + 1], past_key_values=cache).logits
        with Largest() as largest:
            last = model(input_ids=ids[:, TOKENS + 1 :], past_key_values=cache).logits
    return torch.cat((first, last)), largest


def main(folder: Path) -> None:
    mend()
    tiny_model("llama", folder, max_position_embeddings=1024)
    models = {pair: made(folder, *pair) for pair in PAIRS}
    dense = {pair: decode(model, QuantizedCache(model), 2) for pair, model in models.items()}
    register("cached_attention", "cpu", "cached_attention/triton")
    for pair, model in models.items():
        expected, before = dense[pair]
        found, after = decode(model, QuantizedCache(model), 2)
        cached = 2 * HEADS * TOKENS * WIDTH  # codes of one role of a layer; in bytes, less than any copy of 4 bits
        assert before.bytes >= 4 * cached, f"{pair}: dense keys are not seen"
        if pair == NOT_READ:
            assert torch.equal(found, expected) and "qat.cached_attention.default" not in after.called
            continue
        error = float((found - expected).norm() / expected.norm())
        assert 0 < error <= 1e-5, f"{pair}: off by {error}"
        assert "qat.cached_attention.default" in after.called
        assert after.bytes < cached / 4, f"{pair}: a tensor of {after.bytes} bytes was made"
        print(f"{pair}: off by {error:.1e}, at most {after.bytes} bytes made, {before.bytes} without")
    print("never expanded")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
