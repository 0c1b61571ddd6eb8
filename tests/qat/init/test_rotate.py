"""The step `rotate`: what the model computes stays, what is learned is orthogonal and loses less, or is not kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from qat.checkpoints.exported import load_exported
from qat.checkpoints.verify import verify
from qat.errors import ConfigError, UnsupportedError
from qat.init import rotations
from qat.init.calibration import calibrate
from qat.init.rotations import Folding
from qat.modes import dense, served
from qat.scheme import Rule, Scheme
from qat.surgery import apply, report
from tests.checkpoints.exports import ids as text_ids
from tests.checkpoints.exports import pair_rules, quantized, quiet_export
from tests.qat.init.test_hadamard import outlying
from tests.qat.init.test_smooth import MOE_RULES, uneven
from tests.qat.test_surgery import MOE, batches, build, ids, logits, refused, usual
from tests.tiny import tiny_model

REST = Rule(match="*", skip="the rest")
BOTH: dict[str, Any] = {"kind": "rotate", "sites": ["residual", "values"], "start": "random", "steps": 0}
UNTIED = {**BOTH, "untie": True}
EXPERTS = (Rule(match="*.experts.*", weight="nvfp4", input="nvfp4"), *MOE_RULES)
FAMILIES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("llama", {}, None, BOTH),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, None, UNTIED),
    ("llama", {"num_key_value_heads": 1}, None, BOTH),
    ("qwen2", {}, None, BOTH),
    ("qwen3", {}, None, BOTH),
    ("mistral", {}, None, BOTH),
    ("gemma", {"tie_word_embeddings": True}, None, UNTIED),
    ("qwen3_moe", MOE, EXPERTS, BOTH),
    ("phi3", {"pad_token_id": 0}, None, {**BOTH, "sites": ["residual"]}),
    ("gemma2", {"query_pre_attn_scalar": 32}, None, {**BOTH, "sites": ["values"]}),
    ("gemma3_text", {"query_pre_attn_scalar": 32}, None, {**BOTH, "sites": ["values"]}),
    ("olmo2", {}, None, {**BOTH, "sites": ["values"]}),
    ("cohere", {}, None, {**BOTH, "sites": ["values"]}),
]


def scheme_of(*init: Any, given: Any = None, **fields: Any) -> Scheme:
    scheme = usual("nvfp4", "nvfp4").model_copy(update=fields)
    steps = Scheme(rules=(REST,), init=init).init
    return scheme.model_copy(update={"init": steps} | ({} if given is None else {"rules": given}))


@pytest.mark.parametrize(("kind", "config", "given", "step"), FAMILIES)
def test_what_the_unquantized_model_computes_stays(kind: str, config: Any, given: Any, step: Any) -> None:
    model = uneven(kind, **config)
    before, weights_before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    scheme = scheme_of(step, given=given)
    calibrate(apply(model, scheme, defer_init=True), batches(), scheme)
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=4e-5 * float(before.abs().max()))
    changed = {n for n, p in model.named_parameters() if n in weights_before and not torch.equal(p, weights_before[n])}
    assert any("o_proj" in name for name in changed)
    if "residual" in step["sites"]:
        norms = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight") or n == "model.norm.weight"]
        assert {float(p.detach().unique()) for p in norms} == {0.0 if kind == "gemma" else 1.0}
        assert "model.embed_tokens.weight" in changed
    else:
        assert all("v_proj" in name or "o_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "post_attention_layernorm multiplies what is added"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "post_attention_layernorm multiplies what is added"),
        ("olmo2", {}, "post_attention_layernorm multiplies what is added"),
        ("cohere", {}, "does not commute with rotations"),
        ("gpt_neox", {}, "does not commute with rotations"),
    ],
)
def test_streams_that_cannot_be_rotated_are_refused(kind: str, config: Any, says: str) -> None:
    given = (Rule(match="re:.*(q_proj|query_key_value)", weight="nvfp4", input="nvfp4"), REST)
    scheme = scheme_of({**BOTH, "sites": ["residual"]}, given=given, fused=())
    model = build(kind, **config)
    with pytest.raises(UnsupportedError, match=says):
        calibrate(apply(model, scheme, defer_init=True), batches(), scheme)


def test_values_need_heads_that_are_known() -> None:
    given = (Rule(match="*.qkv_proj", weight="nvfp4", input="nvfp4"), REST)
    scheme = scheme_of({**BOTH, "sites": ["values"]}, given=given)
    with pytest.raises(UnsupportedError, match="no v_proj and o_proj"):
        calibrate(apply(build("phi3", pad_token_id=0), scheme), batches(), scheme)


def error(model: nn.Module, exact: torch.Tensor) -> float:
    wanted, got = exact.log_softmax(-1), logits(model).log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize(
    ("sites", "share", "autocast"),
    [
        (["values"], 0.95, False),
        (["values"], 0.99, True),  # learned and judged in BF16, measured here in float32
        (["residual"], 0.999, False),
        (["residual", "values"], 0.999, False),
    ],
)
def test_learning_loses_less_and_what_it_finds_is_orthogonal(
    sites: list[str], share: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    write = Folding.write
    monkeypatch.setattr(Folding, "write", lambda self, matrices: (seen.append(matrices[-1]), write(self, matrices))[1])
    model = outlying()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[3::16] *= 12
    exact = logits(model)
    scheme = scheme_of({"kind": "rotate", "sites": sites, "steps": 24 if autocast else 12})
    text = [{"input_ids": ids(0)}, *list(batches(4))[1:]]
    calibrate(apply(model, scheme.rtn(), defer_init=True), text, scheme.rtn())
    before = error(model, exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sentence = calibrate(model, text, scheme)[-1]
    assert sentence.startswith("rotated: ") and error(model, exact) < share * before
    eye = torch.eye(seen[-1].shape[-1], dtype=seen[-1].dtype)
    assert seen[-1].dtype == torch.float64 and float((seen[-1].mT @ seen[-1] - eye).abs().max()) < 1e-7
    assert max(float((m.double().mT @ m.double() - eye).abs().max()) for m in seen) < 1e-5
    assert float((seen[-1] - eye).abs().max()) > 1e-2
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), exact, rtol=0, atol=4e-5 * float(exact.abs().max()))


def test_what_is_no_better_leaves_the_model_bit_for_bit() -> None:
    given = (Rule(match="*.layers.0.mlp.gate_proj", weight="int8_channel"), REST)
    scheme = scheme_of(
        {"kind": "rotate", "sites": ["residual", "values"], "start": "random", "steps": 1, "lr": 1e-9},
        given=given,
        fused=(),
    )
    model = build()
    with torch.no_grad():  # a weight that rounding does not change
        weight = model.model.layers[0].mlp.gate_proj.weight
        weight.copy_((weight * 200).round().clamp(-127, 127) / 128)
        weight[:, 0] = 127 / 128
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (sentence,) = calibrate(apply(model, scheme, defer_init=True), batches(), scheme)
    assert sentence.startswith("not rotated, since it is no better: values (4 x 32) and residual stream (1 x 128)")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], parameter) for name, parameter in kept.items())


def test_tied_heads_are_untied_on_request_only() -> None:
    message = refused(scheme_of(BOTH), build(tie_word_embeddings=True))
    assert "one tensor (tied)" in message and "24,576 bytes" in message and "`untie: true`" in message
    model = build(tie_word_embeddings=True)
    assert "lm_head" not in {m.path for m in report(model, scheme_of({**BOTH, "sites": ["values"]})).modules}
    assert "lm_head" in {m.path for m in report(model, scheme_of(UNTIED)).modules}
    apply(model, scheme_of(UNTIED))
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (["hadamard", "rotate"], "`rotate` after it"),
        (["rotate", "rotate"], "rotate stands once"),
        (["smooth", BOTH], "put smooth after rotate"),
        ([{"kind": "rotate", "steps": 0}], "does nothing"),
        ([{"kind": "rotate", "untie": True}], "only rotating the residual stream"),
        ([{"kind": "rotate", "sites": []}], "sites names"),
        ([{"kind": "rotate", "sites": ["values", "values"]}], "sites names"),
    ],
)
def test_settings_that_cannot_be_are_refused(init: list[Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Scheme(rules=(REST,), init=init)


def test_it_comes_before_scales_and_gptq() -> None:
    for made in ("scales", "gptq"):
        with pytest.raises(ValidationError, match=f"rotate in scheme.init comes after {made}.*put {made} last"):
            Scheme(rules=(REST,), init=[made, "rotate"])


def test_other_steps_work_on_what_was_rotated() -> None:
    model = uneven("llama")
    before = logits(model)
    scheme = scheme_of(BOTH, "smooth", "permute", {"kind": "hadamard", "size": 16}, "gptq")
    calibrate(apply(model, scheme, defer_init=True), batches(), scheme)
    assert error(model, before) < 1.0
    with pytest.raises(ConfigError, match="put rotate before it"):
        calibrate(model, batches(), scheme_of("rotate"))


def test_an_untied_student_is_exported_and_comes_back(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", tie_word_embeddings=True)
    rules = [pair_rules("nvfp4", "nvfp4"), {"match": "*", "skip": "rest"}]
    model = quantized(source, rules, init=[UNTIED])
    out = quiet_export(model, source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with served(model), torch.inference_mode():
        expected = model(input_ids=text_ids(), use_cache=False).logits.float()
    with torch.inference_mode():
        assert torch.equal(load_exported(out)(input_ids=text_ids(), use_cache=False).logits.float(), expected)
    found = verify(out)
    assert found.ok, found


def test_a_saved_student_comes_back() -> None:
    scheme = scheme_of(UNTIED)
    model = apply(build(tie_word_embeddings=True), scheme, defer_init=True)
    calibrate(model, batches(), scheme)
    other = apply(build(tie_word_embeddings=True, initializer_range=0.3), scheme, defer_init=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("width", [64, 63, 576, 896])
def test_a_hadamard_start_is_orthogonal_at_any_width(width: int) -> None:
    matrix = rotations._hadamard(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    size = width & -width  # what is left over is mixed by a random matrix, the rest evenly
    assert width // size == 1 or not torch.allclose(matrix.abs(), matrix.abs()[0, 0].expand_as(matrix))
