"""Exported folders as models of our own: which input formats are recognised, and that results are shared safely."""

import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.checkpoints.exported import ServedInput, hook_inputs
from qat.checkpoints.layouts.arguments import input_args, input_format
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.support import pairs
from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.training.activations import dynamic_fake_quantize, fake_quantize_input


@pytest.mark.parametrize("name", sorted({name for _, name in pairs(ROWS) if name}))
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
    assert hook.same._state is None  # nothing is kept once every consumer had it
    (c,) = hook(module, (first,))
    (d,) = hook(module, (second,))  # another tensor before the first was used up
    assert torch.equal(c, expected[0]) and torch.equal(d, expected[1])


def test_another_thread_in_between_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's whole call comes between two steps of this one: the result is that of this one's input."""
    fmt, module = lookup("int8_token"), nn.Module()
    hook = ServedInput(fmt, "vllm", None, consumers=3)
    mine, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    expected = [dynamic_fake_quantize(x, fmt, "vllm", "ste", torch.tensor(1.0)) for x in (mine, other)]
    theirs: list[Any] = []

    def ref(x: Tensor) -> Any:
        if x is mine and not theirs:
            theirs.append(None)
            theirs[0] = hook(module, (other,))[0]
        return weakref.ref(x)

    monkeypatch.setattr("qat.same_tensor.weakref", SimpleNamespace(ref=ref))
    found = [hook(module, (mine,))[0] for _ in range(2)]
    assert all(torch.equal(y, expected[0]) for y in found) and torch.equal(theirs[0], expected[1])


def test_the_static_part_moves_to_the_device_once() -> None:
    """A copy at every call would wait for the device and break the capture of a graph."""
    hook = ServedInput(lookup("nvfp4"), "vllm", torch.ones(1), codes=True)
    moved = []
    for _ in range(2):
        hook(nn.Module(), (torch.empty(1, 3, 32, device="meta"),))
        moved.append(hook.static)
    assert moved[0] is moved[1] and moved[0] is not None and moved[0].device.type == "meta"


@dataclass
class Folder:
    """What `hook_inputs` asks of an exported folder."""

    modules: dict[str, PackedModule]
    statics: dict[str, float]

    @property
    def fused(self) -> list[list[str]]:
        return [[*self.modules]]

    def static_input(self, path: str) -> Tensor | None:
        return torch.tensor([self.statics[path]]) if path in self.statics else None


def hooked(inputs: dict[str, str], statics: dict[str, float]) -> tuple[nn.Module, dict[str, ServedInput]]:
    """An attention block without arithmetic, and the hook of each layer."""
    names = {name: f"model.layers.0.self_attn.{name}" for name in inputs}
    args = {path: input_args(lookup(inputs[name])) for name, path in names.items()}
    modules = {path: PackedModule(path, "", {}, given) for path, given in args.items()}
    model = nn.ModuleDict({name: nn.Identity() for name in names})
    folder: Any = Folder(modules, {names[name]: value for name, value in statics.items()})
    hook_inputs(model, folder, "vllm", {path: name for name, path in names.items()})
    found: Any = {name: next(iter(model[name]._forward_pre_hooks.values())) for name in names}
    return model, found


@pytest.mark.parametrize(
    ("inputs", "statics"),
    [
        (("fp8_tensor", "fp8_tensor", "fp8_tensor"), (0.5, 0.25, 0.5)),
        (("nvfp4", "nvfp4", "nvfp4"), (64.0, 512.0, 64.0)),
        (("int8_token", "fp8_token", "int8_token"), ()),
    ],
)
def test_fused_layers_share_only_what_is_equal(inputs: tuple[str, ...], statics: tuple[float, ...]) -> None:
    """Other tools calibrate query, key and value apart; each gets its own, and equal ones are computed once."""
    names = ("q_proj", "k_proj", "v_proj")
    given = dict(zip(names, statics, strict=False))
    model, hooks = hooked(dict(zip(names, inputs, strict=True)), given)
    assert hooks["q_proj"] is hooks["v_proj"] is not hooks["k_proj"]
    assert [hooks[name].same.readers for name in names] == [2, 1, 2]
    x = torch.randn(1, 3, 64)
    for name, format in zip(names, inputs, strict=True):
        static = torch.tensor([given[name]]) if given else None
        expected = fake_quantize_input(x, lookup(format), "vllm", "ste", static)
        assert torch.equal(model.get_submodule(name)(x), expected), name
    assert all(hook.same._state is None for hook in hooks.values())
