"""`prepare` and `export` around Hugging Face's Trainer: it learns, resumes, exports what it trained with its scales;
what cannot work is refused before anything is trained."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

import qat
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, ConfigError, FormatError, UnsupportedError
from qat.init.calibration import calibrate
from qat.init.scales import ScaleSearch
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from qat.trainers.optim import parameter_kinds
from qat.trainers.prepared import as_scheme, prepared
from tests.tiny import tiny_model
from tests.trainers.plugging import PRESET, calibration, check_export, loaded, made, rows, states_differ


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("plugging") / "model")


def trainer(model: Any, out: Path, steps: int = 6, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, 1e-3))
    return Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))


def losses(used: Trainer) -> list[float]:
    return [entry["loss"] for entry in used.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("gemma", {}), ("qwen3_moe", {}), ("llama", {"gradient_checkpointing": True})],
    ids=["llama", "tied", "experts", "checkpointing"],
)
def test_trainer_learns_resumes_and_exports_what_it_trained(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    source = tiny_model(kind, tmp_path / "model")
    model = made(source)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = trainer(model, tmp_path / "out", **settings)
    used.train()
    assert losses(used)[-1] < losses(used)[0] - 0.5
    kinds = parameter_kinds(model)
    moved = {kinds[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"weight", "flat", "scale"}
    check_export(model, tmp_path / "exported")

    again = made(source)
    resumed = trainer(again, tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert not states_differ(model, again)
    assert losses(resumed)[-2:] == losses(used)[-2:]

    found = qat.load_prepared(tmp_path / "out" / "checkpoint-6", source=source)
    assert not states_differ(model, found)
    assert qat.export(found, tmp_path / "found") == tmp_path / "found"
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("exported", "found"))
    assert a == b


def test_it_is_the_same_model_as_by_apply_and_calibrate(source: Path) -> None:
    model = made(source)
    scheme = as_scheme(PRESET)
    other = apply(loaded(source), scheme)
    calibrate(other.eval(), calibration(), scheme)
    assert not states_differ(model, _without_second_names(other))
    ids = rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other(ids).logits)


def _without_second_names(model: Any) -> Any:
    from qat.trainers.whole_state import keep_whole

    keep_whole(model)
    return model


def test_training_mode_and_type_of_the_model(source: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).train()
    assert qat.prepare(model, PRESET, calibration()) is model
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())


def test_where_a_scheme_comes_from(tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [{"match": "*_proj", "weight": "int4_g64"}, {"match": "*", "skip": "rest"}]
    expected = Scheme(rules=rules, init=())
    table = {"rules": rules, "init": []}
    (tmp_path / "scheme.yaml").write_text(yaml.safe_dump(table))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "scheme": table}))
    for given in (expected, table, tmp_path / "scheme.yaml", str(tmp_path / "job.yaml")):
        assert as_scheme(given) == expected
    preset = as_scheme("fp8_channel+fp8_token", calibrated=False)
    assert (preset.rules[0].weight, preset.rules[0].input) == ("fp8_channel", "fp8_token")
    assert preset.init == (ScaleSearch(weighted=False),)
    assert as_scheme("int4_g64").rules[0].input is None and as_scheme("int4_g64").init == (ScaleSearch(),)
    with pytest.raises(FormatError, match="nvfp5"):
        as_scheme("nvfp5")


def test_calibration_is_asked_for_by_what_needs_it(source: Path) -> None:
    def wrong(scheme: Any) -> str:
        with pytest.raises(ConfigError, match="calibration") as raised:
            qat.prepare(loaded(source), scheme)
        return str(raised.value)

    rules = [{"match": "*_proj", "weight": "int4_g64"}, {"match": "*", "skip": "rest"}]
    assert "gptq" in wrong({"rules": rules, "init": ["smooth", "gptq"]})
    assert "weighted: false" in wrong({"rules": rules})
    assert "nvfp4 (a calibrated range)" in wrong("nvfp4+nvfp4")
    with pytest.raises(ConfigError, match="no batch"):
        qat.prepare(loaded(source), PRESET, [])
    model = qat.prepare(loaded(source), "int8_channel+int8_token")
    other = apply(loaded(source), as_scheme("int8_channel+int8_token", calibrated=False))
    starts = [[site.quantizer.start for site in weights(m).values()] for m in (model, other)]
    assert all(map(torch.equal, *starts))


def test_what_cannot_be_prepared_is_refused(source: Path, tmp_path: Path) -> None:
    model = made(source)
    with pytest.raises(ConfigError, match="prepared already"):
        qat.prepare(model, PRESET, calibration())
    with pytest.raises(ConfigError, match="applied"):
        qat.prepare(apply(loaded(source), as_scheme("int4_g64")), "int4_g64")
    with pytest.raises(ConfigError, match="steps"):
        made(source, cage={"strength": 1.0})
    with pytest.raises(ConfigError, match="cage"):
        made(source, cage={"strenght": 1.0}, steps=5)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="load_prepared"):
        qat.prepare(loaded(tmp_path / "saved"), PRESET, calibration())
    with pytest.raises(ConfigError, match="not prepared"):
        qat.export(loaded(source), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no model that qat\.prepare"):
        qat.load_prepared(source)


def test_numbers_that_were_computed_in_bf16_are_refused(tmp_path: Path) -> None:
    """Gemma multiplies embeddings with a factor that its class rounds to the type it is loaded in."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("gemma", tmp_path / "model"), dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"embed_scale.*dtype=torch\.float32"):
        qat.prepare(model, PRESET, calibration())


def test_adapters_of_peft_are_refused(source: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(loaded(source), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedError, match="adapters"):
        qat.prepare(model, PRESET, calibration())


def test_an_unknown_source_is_said_and_asked_for(source: Path, tmp_path: Path) -> None:
    model = loaded(source)
    model.config._name_or_path = "made-up"
    with pytest.warns(UserWarning, match="source="):
        qat.prepare(model, PRESET, calibration())
    with pytest.raises(CheckpointError, match="source="):
        qat.export(model, tmp_path / "out")
    qat.export(model, tmp_path / "out", source=source)
    assert load_exported(tmp_path / "out") is not None


def test_a_checkpoint_names_no_folder_but_the_hub(source: Path, tmp_path: Path) -> None:
    model = made(source)
    model.save_pretrained(tmp_path / "saved")
    assert str(source) not in (tmp_path / "saved" / "config.json").read_text()
    other = loaded(source)
    other.config._name_or_path = "no-such-owner/no-such-model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.prepare(other, PRESET, calibration(), source=source)
    assert other.config.qat["source"] == "no-such-owner/no-such-model"
    other.save_pretrained(tmp_path / "hub")
    again = qat.load_prepared(tmp_path / "hub", source=source)
    assert again.config.qat == other.config.qat and prepared(again).scheme == prepared(other).scheme


def test_notes_of_the_export_come_before_training(source: Path) -> None:
    rules = [{"match": "*_proj", "weight": "int3_g64", "input": None}, {"match": "*", "skip": "rest"}]
    with pytest.warns(UserWarning, match="export: .*"):
        qat.prepare(loaded(source), {"rules": rules, "init": []})


def test_groups_have_rates_of_their_own(source: Path) -> None:
    model = made(source)
    groups = qat.parameter_groups(model, 1e-4, scale_lr=2e-3, weight_decay=0.1)
    assert [(g["kind"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("weight", 1e-4, 0.1),
        ("flat", 1e-4, 0.0),
        ("scale", 2e-3, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    with pytest.raises(ConfigError, match="lr"):
        qat.parameter_groups(model, -1.0)


def test_a_copy_is_a_model_of_its_own(source: Path) -> None:
    """Reference models are copies."""
    model = made(source)
    twin = copy.deepcopy(model)
    assert not states_differ(model, twin)
    optimizer = torch.optim.AdamW(qat.parameter_groups(twin, 1e-3))
    batch = rows()[0]["input_ids"][None]
    twin.train()(batch, labels=batch).loss.backward()
    optimizer.step()
    assert states_differ(model, twin) and all(p.grad is None for p in model.parameters())


class _FusedHead(nn.Module):
    """As fused losses do: they take the head's weight and never call it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        own = model.forward

        def forward(input_ids: torch.Tensor, fused: bool = False) -> Any:
            if not fused:
                return own(input_ids)
            return functional.linear(model.model(input_ids).last_hidden_state, model.lm_head.weight)

        model.forward = forward


@pytest.mark.parametrize("head", [True, False])
def test_a_quantized_head_that_is_not_called_is_refused(source: Path, head: bool) -> None:
    skip = {"match": "model.embed_tokens", "skip": "table"}
    rules = [skip, {"match": "*", "weight": "int8_channel"}] if head else as_scheme("int8_channel").rules
    model = qat.prepare(loaded(source), {"rules": rules, "init": []})
    _FusedHead(model)
    ids = rows()[0]["input_ids"][None]
    model.eval()(ids, fused=True)  # not a training step
    model.train()
    if head:
        with pytest.raises(UnsupportedError, match="lm_head is multiplied with outside its layer"):
            model(ids, fused=True)
    else:
        model(ids, fused=True)
        assert not model._forward_hooks


def test_steps_of_the_trainer_refit_scales(tmp_path: Path, source: Path) -> None:
    """`learn: refit` lives on what follows a step, which nothing in the trainer knows of."""
    rules = [{"match": "*_proj", "weight": "int4_g64"}, {"match": "*", "skip": "rest"}]
    model = made(source, {"rules": rules, "learn": "refit"}, refit_every=3)
    starts: list[torch.Tensor] = []

    class Watch(TrainerCallback):  # type: ignore[misc] # transformers gives it no types
        def on_step_end(self, *_: Any, **__: Any) -> None:
            starts.append(torch.cat([site.quantizer.start.flatten() for site in weights(model).values()]).clone())

    used = trainer(model, tmp_path / "out", 7)
    used.add_callback(Watch())
    used.train()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(starts)]
    assert changed == [False, True, False, False, True, False]
    check_export(model, tmp_path / "exported")
    again = made(source, {"rules": rules, "learn": "refit"}, refit_every=3)
    trainer(again, tmp_path / "out", 7).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert not states_differ(model, again)


def test_tables_are_packed_where_asked(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rules = [{"match": "*_proj", "weight": "int4_g32"}, {"match": "*", "weight": "int8_channel"}]
    model = made(source, {"rules": rules, "tied": "share"})
    names = {}
    for packed in (False, True):
        qat.export(model, tmp_path / str(packed), pack_tables=packed)
        assert verify(tmp_path / str(packed)).ok
        names[packed] = open_export(tmp_path / str(packed)).names
    table = "model.embed_tokens.weight"
    assert table in names[False] and f"{table}_scale" not in names[False] and f"{table}_scale" in names[True]
