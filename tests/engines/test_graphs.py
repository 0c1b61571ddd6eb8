"""Recorded steps: the tokens of `generate` without them, whatever is asked one after the other. A CPU has no graphs: a
recorded step is there one that is taken again, from the inputs that were recorded."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.engines import graphs
from qat.engines.cache import QuantizedCache
from qat.engines.graphs import LEAST, MOST, Decoding
from qat.engines.transformers import load_packed
from qat.errors import UnsupportedError
from tests.checkpoints.exports import export_pair
from tests.qat.adapters.test_attention import caches
from tests.tiny import tiny_model

ASKED: list[tuple[list[list[int]], dict[str, Any]]] = [
    ([[5, 6, 7, 8, 9]], {}),
    ([[9, 8, 7]], {}),
    ([[9]], {}),
    ([[9], [5], [9]], {}),  # a prompt of one token meets a new cache
    ([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]], {}),  # a batch, the first padded
    ([[5, 6, 7, 8, 9]], {"do_sample": True, "temperature": 2.0}),
    ([[11] * 300], {}),  # longer than the cache that is there
    ([[5, 6, 7, 8, 9]], {"repetition_penalty": 1.3}),
]


class Again:
    """Records a step as itself."""

    def __init__(self, breaks: bool = False) -> None:
        self.recorded, self.replayed, self.breaks = 0, 0, breaks

    def __call__(self, run: Callable[[], Any], undo: Callable[[], None]) -> Callable[[], Any]:
        self.recorded += 1
        run()
        if self.breaks:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay() -> Any:
            self.replayed += 1
            return run()

        return replay


def generated(model: Any, ids: list[list[int]], options: dict[str, Any], cache: Any) -> Tensor:
    torch.manual_seed(3)
    given = torch.tensor(ids, device=model.device)
    mask = torch.ones_like(given)
    mask[given == 0] = 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1, **options}
    tokens: Tensor = model.generate(
        input_ids=given, attention_mask=mask, past_key_values=cache, disable_compile=True, **settings
    )
    return tokens


def size(ids: list[list[int]]) -> tuple[int, int]:
    return len(ids[0]) + 12, len(ids)


@pytest.fixture(scope="module", params=["llama", "qwen3", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_model(request.param, tmp_path_factory.mktemp(request.param) / "model")
    export_pair(source, source.parent / "out", ("int4_g32", None))
    return source.parent / "out"


def test_recorded_steps_give_the_same_tokens(folder: Path) -> None:
    model, plain, again = load_packed(folder), load_packed(folder), Again()
    decoding = Decoding(model, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for ids, options in [*ASKED, *ASKED]:
            expected = generated(plain, ids, options, None)
            assert torch.equal(generated(model, ids, options, decoding.cache(*size(ids))), expected), ids
    assert again.replayed == 2 * 11 * len(ASKED), "the first token comes from the prompt"
    assert again.recorded == 4, "three sizes of batch, and one that needs more room: others replay what is there"


def test_what_cannot_be_recorded_is_decoded_as_ever(folder: Path) -> None:
    model, plain, again = load_packed(folder), load_packed(folder), Again(breaks=True)
    decoding = Decoding(model, again)
    ids, options = ASKED[0]
    expected = generated(plain, ids, options, None)
    with pytest.warns(UserWarning, match="without CUDA graphs.*RuntimeError: operation not permitted[^\n]*$"):
        assert torch.equal(generated(model, ids, options, decoding.cache(*size(ids))), expected)
    with pytest.warns(UserWarning, match="not permitted"):
        assert decoding.cache(17) is None
    assert torch.equal(generated(model, ids, options, None), expected) and again.recorded == 1


def test_caches_hold_what_is_asked(folder: Path) -> None:
    model: Any = load_packed(folder)
    decoding = Decoding(model, Again())
    small: Any = decoding.cache(20)
    assert decoding.cache(LEAST) is small and decoding.cache(20, 2) is not small
    large: Any = decoding.cache(LEAST + 1)
    assert large is not small and [layer.max_cache_len for layer in large.layers] == [2 * LEAST] * len(large.layers)
    assert decoding.cache(20) is large
    with pytest.warns(UserWarning, match=f"{MOST + 1} positions are asked for"):
        assert decoding.cache(MOST + 1) is None


def test_cpus_and_other_layers_have_no_graphs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qat.surgery import apply

    def read(kind: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model(kind, tmp_path / kind)).eval()

    model = read("llama")
    forward = model.forward
    assert Decoding(model).cache(20) is None and model.forward == forward
    quantized = apply(model, caches("fp8_token", "int4_token"))
    assert isinstance(Decoding(quantized).cache(20), QuantizedCache)
    with pytest.warns(UserWarning, match="quantized keys and values grow"):
        assert isinstance(Decoding(quantized, Again()).cache(20), QuantizedCache)
    with pytest.warns(UserWarning, match="StaticSlidingWindowLayer"):
        assert Decoding(read("gemma3"), Again()).cache(20) is None


@pytest.mark.gpu
def test_graphs_give_the_same_tokens_on_a_gpu(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model")
    export_pair(source, tmp_path / "out", ("int4_g32", None))
    model, plain = load_packed(tmp_path / "out", device="cuda"), load_packed(tmp_path / "out", device="cuda")
    decoding = Decoding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for ids, options in [*ASKED, *ASKED]:
            apart = Decoding(plain)
            plain.forward = apart._forward  # the same cache, no graph
            expected = generated(plain, ids, options, apart.cache(*size(ids)))
            assert torch.equal(generated(model, ids, options, decoding.cache(*size(ids))), expected), ids


@pytest.mark.parametrize(("apart", "good"), [(0.0, True), (0.005, True), (0.02, False), (float("nan"), False)])
def test_a_recorded_step_that_gives_other_logits_is_refused(apart: float, good: bool) -> None:
    run = SimpleNamespace(logits=torch.tensor([[1.0, -2.0]]))
    replayed = SimpleNamespace(logits=run.logits + torch.tensor([[0.0, 2 * apart]]))
    with contextlib.nullcontext() if good else pytest.raises(UnsupportedError, match="a replayed step gives logits"):
        graphs.check(run, replayed)
