"""The step `progressive`: it learns in wider formats, and leaves an ordinary model of the scheme's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qat.checkpoints.exported import load_exported
from qat.checkpoints.verify import verify
from qat.errors import ConfigError
from qat.init.calibration import calibrate, initialise, observe
from qat.init.scales import initial_scales
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize, find_scales, to_blocks
from qat.scheme import Rule, Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.checkpoints.exports import ids as text_ids
from tests.checkpoints.exports import quiet_export
from tests.qat.init.test_kept import Shelf
from tests.qat.test_surgery import MOE, batches, build, ids, logits, usual
from tests.tiny import tiny_model

STEP: dict[str, Any] = {"kind": "progressive", "steps": 6, "lr": 5e-4}


def scheme_of(*init: Any, weight: str = "int2_g64_asym", **fields: Any) -> Scheme:
    return usual(weight).model_copy(update={"init": Scheme(rules=(), init=init).init, **fields})


def small() -> nn.Module:
    return build(num_hidden_layers=1)


def divergence(model: nn.Module, exact: Tensor) -> float:
    wanted, got = exact.log_softmax(-1), logits(model).log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def watched(model: nn.Module, scheme: Scheme, text: int = 4) -> tuple[list[str], list[tuple[str, str, bool]]]:
    """What was said, and at each step of training: its name, the format of a weight, whether its scales are those of
    the format's siblings for the weight as it is."""
    seen: list[tuple[str, str, bool]] = []
    site = weights(model)["model.layers.0.mlp.down_proj"]

    def track(items: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, item in items.items():
            if "step" in name:
                start = find_scales(site.weight, site.format).effective()
                ratio = site.quantizer.scales().effective() / start  # a search clips, and moves no further
                seen.append((name, site.format.name, bool(((ratio > 0.25) & (ratio < 1.1)).all())))
            yield name, item

    given = list(batches(text))
    return initialise(model, given, scheme, observe(model, given), track), seen


@pytest.mark.parametrize(("weight", "learn"), [("int2_g64_asym", "dual_lsq"), ("ternary_g64", "refit")])
def test_stages_have_their_widths_and_the_end_is_a_plain_model(weight: str, learn: Any) -> None:
    scheme = scheme_of({**STEP, "bits": [4, 3], "steps": 3, "lr": 2e-4}, "scales", weight=weight, learn=learn)
    model = apply(small(), scheme, defer_init=True)
    said, seen = watched(model, scheme)
    wide = "int{}_g64" + ("_asym" if weight.endswith("asym") else "")
    stages = [(f"{bits} bits, step {step}", wide.format(bits), True) for bits in (4, 3) for step in (1, 2, 3)]
    assert seen == stages
    assert said[0].startswith("progressive: 7 layers in 4 bits from") and "; then 7 layers in 3 bits from" in said[0]
    plain = scheme_of("scales", weight=weight, learn=learn)
    other = small()
    values = {n: p for n, p in model.named_parameters() if "quantizer" not in n}
    assert not all(torch.equal(values[n], p) for n, p in other.named_parameters())
    other.load_state_dict({**other.state_dict(), **values})
    calibrate(apply(other, plain, defer_init=True), batches(4), plain)
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for path, site in weights(model).items():
        assert site.format is lookup(weight) and site.quantizer.mode == "quantized"
        codes = [weights(m)[path].quantizer.quantize(site.weight).codes for m in (model, other)]
        assert torch.equal(*codes)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_stage_learns_to_live_with_its_rounding(autocast: bool) -> None:
    """What it says of itself against the weights before and after, rounded here with the scales of its beginning."""
    exact, scheme = logits(small()), scheme_of({**STEP, "bits": [3], "steps": 20}, learn="none")
    text = [{"input_ids": ids()}, {"input_ids": ids()}]  # one is kept back
    model, wide = apply(small(), scheme, defer_init=True), lookup("int3_g64_asym")
    squares = observe(model, text)
    scales = {
        path: initial_scales(site.weight.detach(), wide, importance=squares[path])
        for path, site in weights(model).items()
    }

    def rounded() -> float:
        plain = small()
        values = dict(plain.named_parameters())
        now = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                path = name.removesuffix(".weight")
                value.copy_(fake_quantize(now[name], wide, scales[path]) if path in scales else now[name])
        return divergence(plain, exact)

    before = rounded()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sentence = calibrate(model, text, scheme)[-1]
    after = rounded()
    first, last = (float(word) for word in sentence.split("KL of ")[1].split(" to "))
    assert after < 0.8 * before and "undone" not in sentence
    assert first == pytest.approx(before, rel=0.1 if autocast else 0.02)
    assert last == pytest.approx(after, rel=0.1 if autocast else 0.02)


def test_what_is_no_better_leaves_the_weights_bit_for_bit() -> None:
    scheme = scheme_of({**STEP, "lr": 3.0, "bits": [8, 4]})
    model = apply(small(), scheme, defer_init=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said, seen = watched(model, scheme)
    assert said[0].count("no better on the text kept back, so this is undone") == 2
    assert {name for _, name, _ in seen} == {"int8_g64_asym", "int4_g64_asym"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_weights_stay_and_experts_learn() -> None:
    scheme = scheme_of({**STEP, "steps": 2}, weight="int2_channel")
    rules = (Rule(match="*.experts.*", weight="int2_channel"), *scheme.rules)
    model = apply(build("qwen3_moe", **MOE), scheme.model_copy(update={"rules": rules}), defer_init=True)
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibrate(model, [{"input_ids": ids()}] * 2, scheme.model_copy(update={"rules": rules}))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "model.embed_tokens.weight" not in moved and "model.norm.weight" in moved
    assert any("experts" in name for name in moved)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="optim leaves them all frozen"):
        calibrate(model, batches(4), scheme)


class Stopped(Exception):
    pass


def test_a_run_that_is_killed_after_the_last_width_does_not_train_again() -> None:
    init = ({"kind": "hadamard", "size": 16}, {**STEP, "steps": 2}, {"kind": "gptq", "sequential": True})
    rules = (Rule(match="*_proj", weight="int2_g64", input="int8_tensor"), Rule(match="*", skip="rest"))
    scheme = Scheme(rules=rules, init=init)

    def started(store: Any, stop: bool) -> tuple[nn.Module, list[str], int]:
        model, given, steps = apply(small(), scheme, defer_init=True), list(batches(4)), 0

        def track(items: dict[str, Any]) -> Iterator[tuple[str, Any]]:
            nonlocal steps
            for name, item in items.items():
                steps += "step" in name
                if stop and name == "model.layers.0":
                    raise Stopped
                yield name, item

        return model, initialise(model, given, scheme, observe(model, given), track, store), steps

    whole, said, steps = started(None, False)
    shelf = Shelf()
    with pytest.raises(Stopped):
        started(shelf, True)
    model, told, again = started(shelf, False)
    assert (steps, again) == (2, 0) and told == said and len(said) == 2
    one, two = whole.state_dict(), model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(logits(model), logits(whole))


def test_what_is_exported_is_the_last_format_alone(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model")
    from transformers import AutoModelForCausalLM

    rules = (Rule(match="*_proj", weight="int2_g64"), Rule(match="*", skip="rest"))
    scheme = Scheme(rules=rules, init=({**STEP, "steps": 2}, "gptq"))
    text = [{"input_ids": text_ids()}] * 3
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    calibrate(apply(model, scheme, defer_init=True), text, scheme)
    folder = quiet_export(model, source, tmp_path / "out")
    assert '"num_bits": 2' in (folder / "config.json").read_text() and verify(folder).ok
    with torch.no_grad(), served(model):
        expected = model(input_ids=text_ids()).logits
    with torch.no_grad():
        assert torch.equal(load_exported(folder)(input_ids=text_ids()).logits, expected)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"bits": []}, "from the widest to the narrowest"),
        ({"bits": [4, 8]}, "from the widest to the narrowest"),
        ({"bits": [4, 4]}, "from the widest to the narrowest"),
        ({"bits": [5]}, "8, 4 or 3"),
    ],
)
def test_widths_that_do_not_narrow_are_refused(step: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Scheme(rules=(), init=({"kind": "progressive", **step},))


@pytest.mark.parametrize("weight", ["int4_g64", "nvfp4"])
def test_a_scheme_without_narrower_integers_is_refused(weight: str) -> None:
    rules = (Rule(match="*_proj", weight=weight), Rule(match="*", skip="rest"))
    with pytest.raises(ValidationError, match=f"fewer than 4 bits, but {weight}; leave the step out"):
        Scheme(rules=rules, init=("progressive", "gptq"))
    with pytest.raises(ValidationError, match=r"progressive in scheme\.init comes after gptq"):
        Scheme(rules=(Rule(match="*", weight="int2_g64"),), init=("gptq", "progressive"))


def test_wide_values_lie_on_the_wide_grid() -> None:
    """What a forward pass multiplies with inside a stage."""
    scheme = scheme_of({**STEP, "steps": 1}, weight="int2_g64")
    model, counts = apply(small(), scheme, defer_init=True), []
    site = weights(model)["model.layers.0.self_attn.q_proj"]

    def track(items: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, item in items.items():
            if "step" in name:
                values = to_blocks(site.value(), site.format)
                counts.append(max(len(values[row, 0, block].unique()) for row in range(32) for block in range(2)))
            yield name, item

    given = list(batches(2))
    initialise(model, given, scheme, observe(model, given), track)
    assert 3 < counts[0] <= 15
