"""The cache in bytes: the numbers of fake quantization, the operations of transformers, and what a token costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from qat.engines.cache import QuantizedCache, Rows, bytes_per_token, cost, quantized_cache
from qat.init.calibration import observe
from qat.modes import dense
from qat.numbers.catalog import CATALOG, lookup
from qat.quantizer import InputQuantizer
from qat.surgery import apply, report
from tests.qat.adapters.test_attention import IDS, caches
from tests.tiny import tiny_model

FORMATS = [
    name
    for name, fmt in CATALOG.items()
    if (fmt.block[0] == 1 and fmt.divides(64)) or (fmt.block == (0, 0) and not fmt.zero_point)
]


def made(folder: Path, key: str, value: str, dtype: torch.dtype = torch.float32) -> Any:
    model = apply(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), caches(key, value))
    observe(model, [{"input_ids": IDS}])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_fake_quantization_in_the_format_s_bytes(name: str, dtype: torch.dtype) -> None:
    fmt = lookup(name)
    quantizer = InputQuantizer(fmt, "vllm", "ste", "minmax")
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantizer.amax.fill_(float(x.abs().max()) / 2)
    rows = Rows(quantizer, 64)
    stored = rows.encode(x)
    assert stored.dtype == torch.uint8 and stored.shape == (2, 3, 5, rows.bytes)
    assert torch.equal(rows.decode(stored, dtype), quantizer.quantize(x))
    if 8 % fmt.element.bits == 0 and not fmt.zero_point and len(fmt.elements) == 1:
        assert rows.bytes == fmt.bits_per_row(64) / 8


PAIRS = [
    ("fp8_tensor", "fp8_tensor"),
    ("int8_tensor", "int4_token"),
    ("nvfp4", "nvfp4"),
    ("fp8_token", "int4_g32_asym"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_generation_is_that_of_the_fake_quantized_model(folder: Path, key: str, value: str, dtype: torch.dtype) -> None:
    model = made(folder, key, value, dtype)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0  # two requests of different lengths
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = model.generate(input_ids=IDS, attention_mask=mask, **options)
    cache = QuantizedCache(model)
    ours = model.generate(input_ids=IDS, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    tokens = cache.get_seq_length()
    assert tokens == IDS.shape[1] + 11
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == len(IDS) * tokens * bytes_per_token(model)[0]


def test_what_a_token_costs(folder: Path) -> None:
    model = made(folder, "fp8_tensor", "nvfp4")
    layers, heads, width = 2, 2, 32
    wanted = layers * heads * (width + width // 2 + width // 16)
    assert bytes_per_token(model) == (wanted, layers * heads * width * 4)
    ((_, _, _, *covered),) = report(model).by_cache()
    assert covered == [*bytes_per_token(model)]
    assert cost(model) == f"the cache takes {wanted} bytes per token (512 in BF16)"
    with dense(model, inputs=True):
        assert quantized_cache(model) is None and cost(model) == ""


def caches_of(model: Any, *change: Any) -> list[Tensor]:
    """Logits of a last token behind a cache that `change` was done to: ours, and transformers' own."""
    results = []
    for cache in (QuantizedCache(model), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(input_ids=IDS, past_key_values=cache, use_cache=True)
            getattr(cache, change[0])(*change[1:])
            last = model(input_ids=IDS[:, -1:].repeat(cache.layers[0].keys.shape[0] // 2, 1), past_key_values=cache)
        results.append(last.logits)
    return results


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize(
    "change",
    [("crop", -3), ("reorder_cache", torch.tensor([1, 0])), ("batch_repeat_interleave", 2),
     ("batch_select_indices", torch.tensor([1, 1]))],
)  # fmt: skip
def test_operations_of_transformers(kind: str, change: tuple[Any, ...], tmp_path: Path) -> None:
    model = made(tiny_model(kind, tmp_path, num_hidden_layers=2), "int8_token", "int4_token")
    ours, theirs = caches_of(model, *change)
    assert torch.equal(ours, theirs)


def test_sliding_windows_keep_their_last_tokens(tmp_path: Path) -> None:
    model = made(tiny_model("gemma", tmp_path, sliding_window=8), "fp8_token", "fp8_token")
    options = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = QuantizedCache(model)
    ours = model.generate(input_ids=IDS, past_key_values=cache, **options)
    theirs = model.generate(input_ids=IDS, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert sorted({layer.keys.shape[2] for layer in cache.layers}) == [7, IDS.shape[1] + 9]


def test_beams_and_an_untouched_model(folder: Path) -> None:
    model = made(folder, "int8_token", "int8_token")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=IDS, past_key_values=QuantizedCache(model), **options),
        model.generate(input_ids=IDS, **options),
    )
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert quantized_cache(plain) is None and cost(plain) == "" and bytes_per_token(plain) == (512, 512)
