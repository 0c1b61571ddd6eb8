"""Exported folders as models of our own: which input formats are recognised, and that results are shared safely."""

import pytest
import torch

from qat.activations import dynamic_fake_quantize
from qat.catalog import lookup
from qat.checkpoints.exported import ServedInput, input_format
from qat.checkpoints.targets.compressed_tensors import input_args, pairs
from qat.errors import UnsupportedError


@pytest.mark.parametrize("name", sorted({name for _, name in pairs() if name}))
def test_input_formats_are_recognised(name: str) -> None:
    args = input_args(lookup(name))
    assert args is not None
    assert input_format(args).name == name
    assert input_format({**args, "actorder": None, "block_structure": None, "observer_kwargs": {}}).name == name


def test_unknown_input_formats_are_refused() -> None:
    args = {"num_bits": 5, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    with pytest.raises(UnsupportedError, match="not in the catalogue"):
        input_format(args)


def test_layers_that_read_one_tensor_share_its_quantization() -> None:
    fmt, module = lookup("int8_token"), torch.nn.Module()
    hook = ServedInput(fmt, "vllm", None, consumers=2)
    first, second = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    expected = [dynamic_fake_quantize(x, fmt, "vllm", "ste", torch.tensor(1.0)) for x in (first, second)]
    (a, extra), (b,) = hook(module, (first, "mask")), hook(module, (first,))
    assert a is b and extra == "mask" and torch.equal(a, expected[0])
    assert hook._output is None  # nothing is kept once every consumer had it
    (c,) = hook(module, (first,))
    (d,) = hook(module, (second,))  # another tensor before the first was used up
    assert torch.equal(c, expected[0]) and torch.equal(d, expected[1])
