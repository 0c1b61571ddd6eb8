"""Walking through a model block by block: both streams against the whole model, whatever its blocks are called with."""

import contextlib
import weakref
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qat.errors import UnsupportedError
from qat.init.blocks import Block, BlockStep, walk
from qat.init.calibration import calibrate, initialise, observe
from qat.init.gptq import Gptq
from qat.init.scales import ScaleSearch
from qat.init.step import Calibration
from qat.modes import dense
from qat.sites import weights
from qat.surgery import apply
from tests.qat.init.test_calibration import inputs_of
from tests.qat.test_surgery import LAYERS, MOE, batches, build, rules, usual

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "sliding_window": 8},  # masks and positions differ by block
    "bloom": {"n_layer": 2, "n_head": 4},  # not named as others do
    "qwen3_moe": MOE | {"num_hidden_layers": 2},
}  # fmt: skip


class Noted(BlockStep):
    """Changes weights a little, and notes what it was given."""

    kind: str = "noted"
    seen: ClassVar[list[Block]] = []

    def run_block(self, block: Block) -> Counter[str]:
        assert {site.path for group in block.groups() for site in group} == set(block.sites)
        for site in block.sites.values():
            site.weight.mul_(1.25)
        self.seen.append(block)
        return Counter(blocks=1)

    def sentence(self, counts: Counter[str]) -> str | None:
        return f"{counts['blocks']} blocks"


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    Noted.seen.clear()


def entering(model: nn.Module, paths: list[str]) -> dict[str, list[Tensor]]:
    """The hidden states that enter each block in whole forward passes."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def see(path: str) -> Any:
        return lambda _, args, kwargs: found[path].append(kwargs.get("hidden_states", args[0] if args else None))

    handles = [model.get_submodule(p).register_forward_pre_hook(see(p), with_kwargs=True) for p in paths]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_streams_are_those_of_the_whole_model(kind: str, mixed: bool) -> None:
    scheme = rules(("*.h.*" if kind == "bloom" else "*_proj", "int4_g64", "int8_token"), ("*", None))
    model = apply(build(kind, **KINDS[kind]), scheme)
    observe(model, batches())
    step = Noted()
    context = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    with context:
        with dense(model, inputs=True):
            paths = [n for n, _ in model.named_modules() if n.rpartition(".")[2].isdecimal() and n.count(".") == 2]
            before = entering(model, paths)
        said = walk(Calibration(model, list(batches()), weights(model), {}), [step])
        torch.clear_autocast_cache()
        after = entering(model, paths)
    assert said == [f"{len(paths)} blocks"] and [block.path for block in step.seen] == paths
    for block, following in zip(step.seen, [*step.seen[1:], None], strict=True):
        assert all(map(torch.equal, block.dense, before[block.path])), block.path
        assert all(map(torch.equal, block.served, after[block.path])), block.path
        assert following is None or following.dense is block.target
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_sites_that_read_one_tensor_stand_together_in_the_order_in_which_they_read() -> None:
    model = apply(build(), usual("int4_g64"))
    step = Noted()
    walk(Calibration(model, list(batches()), weights(model), {}), [step])
    leaves = [[site.path.rpartition(".")[2] for site in group] for group in step.seen[1].groups()]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_layer_is_shown_what_it_reads_in_the_dense_model_and_after_the_quantized_layers_before_it() -> None:
    model, original = apply(build(), usual("int4_g64", "int8_token")), build()
    path = "model.layers.1.mlp.down_proj"
    found: list[tuple[Tensor | None, Tensor | None]] = []

    class Reads(BlockStep):
        kind: str = "reads"

        def run_block(self, block: Block) -> Counter[str]:
            for site in block.sites.values():
                site.weight.mul_(1.25)
            if path in block.sites:
                found.extend(block.reads(block.sites[path]))
                for (_, served), (none, alone) in zip(found, block.reads(block.sites[path], dense=False), strict=True):
                    assert none is None and served is not None and alone is not None and torch.equal(served, alone)
            return Counter()

    walk(Calibration(model, list(batches()), weights(model), {}), [Reads()])
    for index, whole in enumerate((original, model)):
        expected = torch.cat([pair[index] for pair in found if pair[index] is not None])
        torch.testing.assert_close(inputs_of(whole, path), expected)


def test_weights_outside_of_blocks_are_initialised_before_the_walk() -> None:
    scheme = rules((LAYERS, "int4_g64"), ("lm_head", "int4_g64"), ("*", None))
    step = {"kind": "gptq", "sequential": True}
    scheme = type(scheme)(**{**scheme.model_dump(), "init": (step,)})
    plain = type(scheme)(**{**scheme.model_dump(), "init": ("gptq",)})
    heads = []
    for each in (scheme, plain):
        model = apply(build(), each)
        calibrate(model, batches(), each)
        heads.append(weights(model)["lm_head"].weight.detach())
    assert torch.equal(*heads)


def test_blocks_that_are_not_quantized_are_passed_through() -> None:
    model = apply(build(num_hidden_layers=3), rules(("*.layers.1.*", None), (LAYERS, "int4_g64"), ("*", None)))
    walk(Calibration(model, list(batches()), weights(model), {}), [Noted()])
    after = entering(model, ["model.layers.2"])["model.layers.2"]
    assert [block.path for block in Noted.seen] == ["model.layers.0", "model.layers.2"]
    assert all(map(torch.equal, Noted.seen[1].served, after))


def test_steps_of_other_rules_come_before_the_walk() -> None:
    """A block is walked into when those of its weights that have other steps are where they begin."""
    scheme = rules(("*.mlp.*", "int4_g64"), (LAYERS, "int4_g64"), ("*", None))
    first = scheme.rules[0].model_copy(update={"init": (Noted(),)})
    scheme = scheme.model_copy(update={"rules": (first, *scheme.rules[1:]), "init": (ScaleSearch(search="mse"),)})
    model = apply(build(), scheme, defer_init=True)
    initialise(model, list(batches()), scheme, observe(model, batches()))
    step = first.init[0]
    after = entering(model, ["model.layers.1"])
    assert all(map(torch.equal, step.seen[1].served, after["model.layers.1"]))


def test_models_whose_blocks_do_not_simply_follow_each_other_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self, repeat: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
            self.repeat = repeat

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.layers, *self.layers[: self.repeat]):
                x = layer(x) if self.repeat else layer(x) + x
            return x

    for repeat, message in ((False, "does not read what layers.0 gives"), (True, "layers.0 is called twice")):
        model = apply(Odd(repeat), rules(("*", "int4_g64")))
        calibration = Calibration(model, [{"x": torch.randn(2, 4, 64)}], weights(model), {})
        with pytest.raises(UnsupportedError, match=message):
            walk(calibration, [Noted()])
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(UnsupportedError, match="calls no numbered blocks"):
        walk(Calibration(nn.Identity(), [], {}, {}), [Noted()])


class Alive(TorchDispatchMode):
    """Bytes of tensors that came to be in this context: now, and the most at a time; not those of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.before = [t.untyped_storage() for t in model.state_dict().values()]
        self.known = {id(storage) for storage in self.before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def test_memory_is_the_model_one_block_and_its_streams() -> None:
    """However many blocks there are."""
    peaks, scheme = {}, usual("int4_g64", "int8_token")
    for layers in (2, 6):
        model = apply(build(num_hidden_layers=layers), scheme)
        block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
        calibration = Calibration(model, list(batches()), weights(model), {})
        with Alive(model) as alive:
            walk(calibration, [Gptq(sequential=True)])
        peaks[layers] = alive.peak
    assert peaks[6] == pytest.approx(peaks[2], rel=0.03)
    factorising = 5 * 8 * 256**2  # copies in float64 of the widest layer's second moments
    assert peaks[6] < block + factorising
