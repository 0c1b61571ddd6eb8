"""Scores against definitions computed directly, and the sets that are treated as one."""

import math

import pytest
import torch

from qat.init.calibration import calibrate
from qat.modes import dense
from qat.scheme import Scheme
from qat.sensitivity import Scores, of_set, scores, sets
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import build, usual

BATCHES = [{"input_ids": torch.arange(24).view(2, 12) % 96}, {"input_ids": torch.arange(50, 74).view(2, 12) % 96}]


def test_scores_of_several_batches_are_those_of_all_inputs_at_once() -> None:
    scheme = usual("int4_g32", "int8_token")
    model = apply(build(), scheme)
    calibrate(model, BATCHES, scheme)
    site = weights(model)["model.layers.1.mlp.down_proj"]
    seen: list[torch.Tensor] = []
    handle = site.watch(seen.append)
    with dense(model, inputs=True), torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    found = scores(model, BATCHES)[site.path]
    x = torch.cat([batch.flatten(0, 1) for batch in seen]).double()
    flat, ordered = x.flatten(), x.flatten().float().sort().values
    quarter = len(ordered) // 4
    assert found.quartile == pytest.approx(
        2 * float(flat.abs().max()) / 254 / float(ordered[-quarter] - ordered[quarter]), rel=0.02
    )
    assert found.std == pytest.approx(float(flat.abs().max() / flat.std(correction=0)), rel=1e-6)
    centred = flat - flat.mean()
    assert found.kurtosis == pytest.approx(float((centred**4).mean() / (centred**2).mean() ** 2) - 3, rel=1e-6)
    assert site.input is not None
    output = x @ site.weight.double().t()
    error = site.input.quantize(x.float()).double() @ site.value().double().t() - output
    assert found.mse == pytest.approx(float((error.square().sum() / output.square().sum()).detach()), rel=1e-3)


def test_an_outlier_raises_the_scores_of_its_own_layer() -> None:
    plain, spiked = apply(build(), usual("int4_g32")), apply(build(), usual("int4_g32"))
    with torch.no_grad():
        weights(spiked)["model.layers.0.mlp.up_proj"].weight[3] *= 40.0
    before, after = scores(plain, BATCHES), scores(spiked, BATCHES)
    path = "model.layers.0.mlp.down_proj"  # what it multiplies has one large channel
    assert all(getattr(after[path], name) > 2 * getattr(before[path], name) for name in ("quartile", "std", "kurtosis"))
    assert after["model.layers.0.self_attn.q_proj"] == before["model.layers.0.self_attn.q_proj"]


def test_sets_are_fused_layers_and_shared_tensors() -> None:
    found = sets(apply(build(), usual("int4_g32")))
    assert [len(members) for members in found] == [3, 1, 2, 1] * 2
    assert found[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    shared = Scheme.model_validate({"rules": [{"match": "*", "weight": "int8_channel"}], "tied": "share"})
    tied = sets(apply(build(tie_word_embeddings=True), shared))
    assert ("model.embed_tokens", "lm_head") in tied and sum(map(len, tied)) == 16


def test_a_set_counts_as_the_largest_of_its_members() -> None:
    each = {"a": Scores(1.0, 2.0, 3.0, math.nan), "b": Scores(4.0, 1.0, 3.0, 0.5)}
    assert of_set(("a", "b"), each, "quartile") == 4.0 and of_set(("a", "b", "table"), each, "mse") == 0.5
    assert math.isnan(of_set(("table",), each, "std"))
