"""Attention to bytes: what a step gives is what dense keys and values give, whoever asks for it; and nothing is
expanded where the kernel reads. The operator's reference stands in for the kernel where a process of Triton's is too
slow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.engines import attention
from qat.engines.attention import FEW, Held, attend, install, reads
from qat.engines.cache import QuantizedCache, Rows
from qat.init.calibration import observe
from qat.numbers.catalog import lookup
from qat.quantizer import InputQuantizer
from qat.surgery import apply
from tests.engines.test_cache import made
from tests.kernels.processes import in_a_process
from tests.qat.adapters.test_attention import IDS, caches, load
from tests.tiny import tiny_model

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def a_kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As if there were one here; the calls of the operator."""
    calls: list[tuple[Any, ...]] = []

    def operator(*given: Any) -> Tensor:
        calls.append(given)
        return torch.ops.qat.cached_attention.default(*given)

    monkeypatch.setattr(attention, "registered", lambda *_: True)
    monkeypatch.setattr(attention, "cached_attention", operator)
    return calls


def test_a_quantized_cache_is_never_expanded_where_the_kernel_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpret_attention.py")
    assert "never expanded" in in_a_process(script, str(tmp_path / "model"), TRITON_INTERPRET="1")


def model_of(kind: str, folder: Path, key: str, value: str, **more: Any) -> Any:
    return made(tiny_model(kind, folder, **more), key, value)


CASES = [
    ("llama", "fp8_tensor", "fp8_tensor"),
    ("llama", "nvfp4", "int8_token"),
    ("qwen3", "int4_token", "int4_token"),
    ("gemma", "fp8_token", "fp8_token"),
]


@pytest.mark.parametrize(("kind", "key", "value"), CASES)
def test_generation(kind: str, key: str, value: str, tmp_path: Path, a_kernel: list[Any]) -> None:
    """Two requests of different lengths, windows that slide: the masks of transformers."""
    model = model_of(kind, tmp_path, key, value, **({"sliding_window": 8} if kind == "gemma" else {}))
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    theirs = model.generate(input_ids=IDS, attention_mask=mask, **OPTIONS)
    ours = model.generate(input_ids=IDS, attention_mask=mask, past_key_values=QuantizedCache(model), **OPTIONS)
    assert len(a_kernel) == 2 * 7, "layers times steps"
    assert torch.equal(ours.sequences, theirs.sequences)
    for found, expected in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "gpt2"])
def test_attention_that_computes_otherwise_sees_numbers(kind: str, tmp_path: Path, a_kernel: list[Any]) -> None:
    """Soft caps, biases of positions, functions of its own: to the bit."""
    model = load(tiny_model(kind, tmp_path), attn_implementation="eager")
    observe(apply(model, caches("fp8_token", "int8_tensor", "re:.*(attn|attention)")), [{"input_ids": IDS}])
    theirs = model.generate(input_ids=IDS, **OPTIONS)
    ours = model.generate(input_ids=IDS, past_key_values=QuantizedCache(model), **OPTIONS)
    assert not a_kernel
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_several_tokens_and_prompts(tmp_path: Path, a_kernel: list[Any]) -> None:
    """Speculated tokens go to the kernel together, prompts do not."""
    model = model_of("llama", tmp_path, "int8_token", "int8_token")
    whole = model(input_ids=IDS.repeat(1, 2), use_cache=False).logits
    cache = QuantizedCache(model)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
        assert not a_kernel and IDS.shape[1] > FEW
        found = model(input_ids=IDS[:, :5], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, IDS.shape[1] : IDS.shape[1] + 5], rtol=1e-4, atol=1e-4)
    assert len(a_kernel) == 2


def held(name: str = "int8_token", tokens: int = 12, heads: int = 2) -> Held:
    quantizer = InputQuantizer(lookup(name), "vllm", "ste", "minmax")
    x = torch.randn(1, heads, tokens, 32, generator=torch.Generator().manual_seed(tokens))
    quantizer.amax.fill_(float(x.abs().max()))
    rows = Rows(quantizer, 32)
    return Held(rows.encode(x), rows, torch.float32)


def test_whoever_computes_with_it_sees_numbers() -> None:
    key = held()
    dense = key.dense()
    assert key.shape == dense.shape and key.dtype == dense.dtype and key.device == dense.device
    for found, expected in (
        (key + 1, dense + 1),
        (key.transpose(1, 2), dense.transpose(1, 2)),
        (torch.cat([key, key], dim=2), torch.cat([dense, dense], dim=2)),
        (key[:, :, -3:], dense[:, :, -3:]),
        (nn.functional.scaled_dot_product_attention(dense, key, key),
         nn.functional.scaled_dot_product_attention(dense, dense, dense)),
    ):  # fmt: skip
        assert type(found) is Tensor and torch.equal(found, expected)


class Attention(nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize(
    "unusual",
    [
        {"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1, 4, 1, 12)}, {"dropout": 0.5},
        {"attention_mask": torch.zeros(1, 1, 1, 12)}, {"attention_mask": torch.ones(1, 4, 1, 12, dtype=torch.bool)},
        {"query": torch.ones(1, 4, 1, 32, dtype=torch.float64)}, {"query": torch.ones(1, 4, 3, 32)},
        {"query": torch.ones(1, 4, 1, 32, requires_grad=True)},
    ],
    ids=lambda unusual: "-".join(unusual),
)  # fmt: skip
def test_what_the_operator_does_not_know_goes_to_transformers(
    unusual: dict[str, Any], a_kernel: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    key, value = held(), held("fp8_token")
    seen: list[Any] = []
    monkeypatch.setitem(attention._before, "sdpa", lambda _, *given, **more: seen.append((given, more)))
    given = {"query": torch.ones(1, 4, 1, 32), "attention_mask": None, **unusual}
    attend(Attention(), given.pop("query"), key, value, given.pop("attention_mask"), **given)
    ((_, found_key, found_value, _), more), = seen  # fmt: skip
    assert torch.equal(found_key, key.dense()) and torch.equal(found_value, value.dense())
    assert given.items() <= more.items() and not a_kernel


def test_the_operator_is_transformers_attention(a_kernel: list[Any]) -> None:
    install()
    key, value, query = held(tokens=7), held("fp8_token", tokens=7), torch.randn(1, 4, 7, 32)
    for tokens, mask in ((1, None), (7, None), (3, torch.ones(3, 7, dtype=torch.bool).tril(4)[None, None])):
        own = query[:, :, :tokens]
        with torch.no_grad():
            found, _ = attend(Attention(), own, key, value, mask, scaling=0.3)
            truth, _ = attend(Attention(), own, key.dense(), value.dense(), mask, scaling=0.3)
        torch.testing.assert_close(found, truth)
    assert len(a_kernel) == 3


def test_it_is_registered_once_and_leaves_others_alone() -> None:
    install()
    install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend and attention._before["sdpa"] is not attend
    query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 5, 32)
    found, _ = attend(Attention(), query, key, key, None)
    assert torch.equal(found, attention._before["sdpa"](Attention(), query, key, key, None)[0])


def test_what_is_read(a_kernel: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert reads(cpu, held().rows, held("nvfp4").rows)
    assert not reads(cpu, held().rows, held("int4_g32_asym").rows)
    monkeypatch.setattr(attention, "registered", lambda operator, device: device == "cuda")
    assert not reads(cpu, held().rows, held().rows) and reads(torch.device("cuda"), held().rows)
