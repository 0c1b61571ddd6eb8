"""A walk that goes on where it stopped: to the same bits, and only with blocks that are its own."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qat.init.blocks import Block
from qat.init.calibration import initialise, observe
from qat.init.gptq import Gptq
from qat.init.hadamard import Hadamard
from qat.init.kept import Store
from qat.init.rotate import Rotate
from qat.init.smooth import Smooth
from qat.init.step import Calibration
from qat.numbers.hadamard import BlockHadamard
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import MOE, batches, build, usual


class Shelf(dict[str, Any]):
    """A store in memory."""

    def read(self, name: str, key: str) -> tuple[dict[str, Tensor], list[dict[str, int]]] | None:
        found = self.get(name)
        return found[1:] if found is not None and found[0] == key else None

    def write(self, name: str, key: str, tensors: dict[str, Tensor], sums: list[dict[str, int]]) -> None:
        self[name] = (key, {n: t.clone() for n, t in tensors.items()}, sums)


class Counted(Gptq):
    """Notes which blocks it works on."""

    seen: ClassVar[list[str]] = []

    def run_block(self, block: Block) -> Counter[str]:
        self.seen.append(block.path)
        return super().run_block(block)


class Stopped(Exception):
    pass


def started(
    store: Store | None, stop: int = 99, kind: str = "llama", text: int = 3, weight: str = "nvfp4", **step: Any
) -> tuple[nn.Module, list[str]]:
    scheme = usual(weight, "nvfp4").model_copy(update={"init": (Counted(sequential=True, **step),)})
    more = MOE if kind == "qwen3_moe" else {}
    return on_the_way(build(kind, **{**more, "num_hidden_layers": 3}), scheme, store, stop, text)


def on_the_way(
    model: nn.Module, scheme: Scheme, store: Store | None, stop: int, text: int
) -> tuple[nn.Module, list[str]]:
    apply(model, scheme, defer_init=True)

    def track(blocks: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for number, (path, block) in enumerate(blocks.items()):
            if number == stop and "." in path and isinstance(block, nn.Module):
                raise Stopped
            yield path, block

    Counted.seen.clear()
    given = list(batches(text))
    return model, initialise(model, given, scheme, observe(model, given), track, store)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("weight", ["nvfp4", "int4_g32_asym", "if4"])
def test_an_interrupted_walk_goes_on_to_the_same_bits(kind: str, weight: str) -> None:
    whole, said = started(None, kind=kind, weight=weight, refit=1)
    shelf = Shelf()
    with pytest.raises(Stopped):
        started(shelf, stop=2, kind=kind, weight=weight, refit=1)
    assert list(shelf) == ["model.layers.0", "model.layers.1"] == Counted.seen
    model, told = started(shelf, kind=kind, weight=weight, refit=1)
    assert Counted.seen == ["model.layers.2"] and told == said and len(said) == 1
    assert same(model, whole)


def test_what_another_walk_left_is_not_taken() -> None:
    shelf = Shelf()
    started(shelf)
    started(shelf)
    assert Counted.seen == []
    for other in ({"text": 2}, {"refit": 1}, {"correction": 0.5}):
        started(Shelf(shelf), **other)
        assert len(Counted.seen) == 3, other
    model = build("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    scheme = usual("nvfp4", "nvfp4").model_copy(update={"init": (Counted(sequential=True),)})
    on_the_way(model, scheme, Shelf(shelf), 99, 3)
    assert Counted.seen == ["model.layers.1", "model.layers.2"]


# --- steps on the whole model ---------------------------------------------------------------------


class Folded(Smooth):
    """Notes that it ran."""

    runs: ClassVar[list[str]] = []

    def run(self, calibration: Calibration) -> str | None:
        self.runs.append("smooth")
        return super().run(calibration)


class Turned(Rotate):
    """Notes that it ran, or ends the process instead."""

    stop: ClassVar[bool] = False

    def run(self, calibration: Calibration) -> str | None:
        if self.stop:
            raise Stopped
        Folded.runs.append("rotate")
        return super().run(calibration)


ROTATION: dict[str, Any] = {"steps": 2, "start": "random"}


def folded(store: Store | None, stop: bool = False, text: int = 3, **changes: Any) -> tuple[nn.Module, list[str]]:
    smooth = Folded(strength=changes.pop("strength", 0.5))
    steps = (smooth, Turned(**ROTATION), Hadamard(size=16), Gptq(sequential=True))
    scheme = usual("nvfp4", changes.pop("input", "nvfp4")).model_copy(update={"init": steps, **changes})
    Turned.stop = stop
    Folded.runs.clear()
    return on_the_way(build(num_hidden_layers=3), scheme, store, 99, text)


def test_steps_on_the_whole_model_are_not_done_again() -> None:
    whole, said = folded(None)
    assert Folded.runs == ["smooth", "rotate"]
    shelf = Shelf()
    with pytest.raises(Stopped):
        folded(shelf, stop=True)
    assert list(shelf) == ["model"] and Folded.runs == ["smooth"]
    model, told = folded(shelf)
    assert Folded.runs == ["rotate"] and told == said and same(model, whole)
    assert sum("model.layers" in name for name in shelf) == 3 and len(shelf) == 4
    model, told = folded(shelf)
    assert Folded.runs == [] and told == said and same(model, whole)
    for one, other in zip(weights(model).values(), weights(whole).values(), strict=True):
        assert one.input.transforms == other.input.transforms == (BlockHadamard(16),)


def test_what_was_made_of_another_model_is_not_taken() -> None:
    shelf = Shelf()
    folded(shelf)
    others: list[dict[str, Any]] = [
        {"text": 2},
        {"strength": 0.4},
        {"input": "mxfp4"},
        {"estimator": "ste"},
        {"round_bf16": False},
    ]
    for other in others:
        folded(Shelf(shelf), **other)
        assert Folded.runs == ["smooth", "rotate"], other
    with torch.autocast("cpu", torch.bfloat16):
        folded(Shelf(shelf))
    assert Folded.runs == ["smooth", "rotate"]


def test_a_walk_alone_keeps_no_model() -> None:
    shelf = Shelf()
    started(shelf)
    assert all(name.startswith("model.layers.") for name in shelf) and len(shelf) == 3
