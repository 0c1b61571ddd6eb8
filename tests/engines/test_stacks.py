"""Stacked layers: each gives what it gave by itself, and what is not alike stays apart."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.engines.stacks import Part, are_alike, stack_readers
from qat.engines.transformers import load_packed
from qat.families import find_family, fused_sets
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.serving.packed import PackedLinear, ordered, pack, unpack
from qat.surgery import apply
from tests.checkpoints.exports import export_pair, ids
from tests.qat.adapters.test_attention import caches
from tests.tiny import tiny_model

FORMATS = ["int4_g128", "int4_g32_asym", "int8_channel", "nvfp4", "mxfp4"]
ROWS = (128, 64, 192)


def layer(name: str, rows: int, seed: int, bias: bool = False, above: float | None = None) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(rows, 256, generator=generator), lookup(name))
    if above is not None and q.scales.global_scale is not None:
        scales = Scales(q.scales.stored, torch.tensor(above), q.scales.zero_point)
        q = QTensor(q.format, q.codes, scales)
    return PackedLinear(pack(q), torch.randn(rows, generator=generator) if bias else None).eval()


def tree(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_parts_give_what_the_layers_gave(name: str, bias: bool) -> None:
    layers = [layer(name, rows, rows, bias, above=2.0**-6) for rows in ROWS]
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    expected = [each(x) for each in layers]
    calls: list[None] = []
    layers[0].register_forward_pre_hook(hook := lambda _, args: (calls.append(None), args)[1])
    layers[1].register_forward_pre_hook(hook)
    layers[2].register_forward_pre_hook(hook)
    model = tree(*layers)
    assert stack_readers(model, [["0", "1", "2"]]) == 1
    parts: list[Any] = [model.get_submodule(str(index)) for index in range(3)]
    for again in (model, copy.deepcopy(model)):
        for index, y in enumerate(expected):
            torch.testing.assert_close(again.get_submodule(str(index))(x), y, rtol=1e-6, atol=1e-6)
    assert len(calls) == 6 and len([m for m in model.modules() if isinstance(m, PackedLinear)]) == 1
    other = torch.randn(1, 256)
    torch.testing.assert_close(parts[2](other), layers[2](other))
    torch.testing.assert_close(parts[0](x), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_panels_are_stacked_as_they_lie(name: str) -> None:
    """On a GPU a weight lies in another order, which a CPU may hold as well."""
    layers = [layer(name, rows, rows, above=2.0**-6) for rows in ROWS]
    dense = torch.cat([unpack(each.packed).dequantize() for each in layers])
    for each in layers:
        weight = ordered(each.packed, "cuda")
        each.words, each.scales, each.zeros = weight.words, weight.scales, weight.zeros
    from qat.engines import stacks

    found = stacks.stacked_layer(layers)
    assert torch.equal(unpack(found.packed).dequantize(), dense)
    assert found.words.is_contiguous() and found.out_features == sum(ROWS)


def test_what_is_not_alike_stays_apart() -> None:
    one, two = layer("nvfp4", 64, 1, above=0.5), layer("nvfp4", 64, 2, above=0.5)
    assert are_alike([one, two]) and not are_alike([one])
    hooked = layer("nvfp4", 64, 2, above=0.5)
    hooked.register_forward_pre_hook(lambda _, args: args)
    observed = [layer("nvfp4", 64, seed, above=0.5) for seed in (1, 2)]
    for each in observed:
        each.register_forward_hook(lambda *_: None)
    others = [layer("nvfp4", 64, 2, above=0.25), layer("mxfp4", 64, 2), layer("nvfp4", 64, 2, True, above=0.5), hooked]
    for other in [*others, nn.Linear(256, 64)]:
        model = tree(one, other)
        assert stack_readers(model, [["0", "1"]]) == 0 and model.get_submodule("0") is one
    assert not are_alike(observed)


def export(source: Path, out: Path, pair: Any = ("int4_g32", None)) -> Path:
    export_pair(source, out, pair)
    return out


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(40), use_cache=False).logits
    return found


@pytest.mark.parametrize("pair", [("int4_g32", None), ("nvfp4", "nvfp4")])
def test_a_stacked_model_computes_the_same(pair: Any, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=2)
    export(source, tmp_path / "out", pair)
    model, plain = load_packed(tmp_path / "out"), load_packed(tmp_path / "out")
    paths = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    sets = fused_sets(paths, find_family("llama").fused)
    assert stack_readers(model, sets) == len(sets) == 4
    assert sum(isinstance(module, Part) for module in model.modules()) == 10
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_a_stacked_model_keeps_its_quantized_cache(tmp_path: Path) -> None:
    from qat.engines.cache import quantized_cache

    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    model = apply(load_packed(export(source, tmp_path / "out")), caches("fp8_token", "int4_token"))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    texts = []
    for _ in range(2):
        texts.append(model.generate(input_ids=ids(8), past_key_values=quantized_cache(model), **options))
        stack_readers(model, fused_sets([path for path, _ in model.named_modules()], find_family("llama").fused))
    assert any(isinstance(module, Part) for module in model.modules()) and torch.equal(*texts)
