"""TRL's trainers on a prepared model: each trains weights and scales, and what is exported is what was trained.

TRL is no dependency: these tests run where it is installed (`pip install trl`; 1.16 was used).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import qat
from qat.trainers.optim import parameter_kinds
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.plugging import check_export, loaded, made

trl = pytest.importorskip("trl", reason="TRL is not installed")

QUESTION = [{"role": "user", "content": "What jumps over the lazy dog?"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("The quick brown fox.", "A language model 012.")]
W4A16 = "int4_g64"
RULES = [{"match": "*_proj", "weight": W4A16}, {"match": "*", "skip": "not a projection"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("trl") / "model")


def arguments(kind: Any, out: Path, **settings: Any) -> Any:
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    return kind(str(out), **{**usual, **quiet, "learning_rate": 1e-3, **settings})


def optimizers(model: Any) -> Any:
    return torch.optim.AdamW(qat.parameter_groups(model, 1e-3)), None


def check_trained(model: Any, trainer: Any, out: Path) -> None:
    """Train; every kind of parameter moved, and the export is the trained model."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 4
    kinds = parameter_kinds(model)
    assert {kinds[n] for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
        "weight",
        "flat",
        "scale",
    }
    check_export(model, out)


def test_supervised(source: Path, tmp_path: Path) -> None:
    model = made(source)
    data = Dataset.from_list([{"messages": QUESTION + ANSWERS[0]}] * 8)
    trainer = trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, tmp_path / "out", max_length=64),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        optimizers=optimizers(model),
    )
    check_trained(model, trainer, tmp_path / "exported")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_preferences(source: Path, tmp_path: Path) -> None:
    """The reference is the unquantized model, which TRL loads by the name in the config."""
    model = made(source, W4A16)
    data = Dataset.from_list([{"prompt": QUESTION, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}] * 8)
    trainer = trl.DPOTrainer(
        model,
        None,
        arguments(trl.DPOConfig, tmp_path / "out", max_length=64),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        optimizers=optimizers(model),
    )
    assert not any("quantizer" in name for name, _ in trainer.ref_model.named_parameters())
    check_trained(model, trainer, tmp_path / "exported")
    accuracies = [e["rewards/accuracies"] for e in trainer.state.log_history if "rewards/accuracies" in e]
    assert accuracies[-1] == 1.0


def test_reinforcement_with_rollouts_in_the_numbers_that_are_served(source: Path, tmp_path: Path) -> None:
    """The trainer's own generation is the quantized forward pass; after it, an engine holds the same weights."""
    model = made(source, W4A16)
    engine = tmp_path / "engine"
    qat.export(model, engine)
    packed = qat.PackedWeights(model, source=source)
    pushed: list[dict[str, torch.Tensor]] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        pushed.append({name: tensor.clone() for name, tensor in packed})
        return [float(index % 2) for index in range(len(completions))]

    trainer = trl.GRPOTrainer(
        model,
        reward,
        arguments(trl.GRPOConfig, tmp_path / "out", num_generations=2, max_completion_length=8, beta=0.0),
        train_dataset=Dataset.from_list([{"prompt": QUESTION}] * 8),
        processing_class=tiny_tokenizer(),
        optimizers=optimizers(model),
    )
    check_trained(model, trainer, tmp_path / "exported")
    assert len(pushed) == 4
    changed = {name for name in pushed[0] if not torch.equal(pushed[0][name], pushed[-1][name])}
    assert any("weight_packed" in name for name in changed)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_adapters_that_trl_adds_are_rounded_with_the_weights(source: Path, tmp_path: Path, kind: str) -> None:
    """`peft_config` of a trainer; the optimizer is the trainer's, since the adapters are not there before it."""
    peft = pytest.importorskip("peft")
    model = made(source, {"rules": [*RULES], "init": [], "learn": "none"})
    adapters = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    usual: dict[str, Any] = {"processing_class": tiny_tokenizer(), "peft_config": adapters}
    trainer: Any
    if kind == "sft":
        data = Dataset.from_list([{"messages": QUESTION + ANSWERS[0]}] * 8)
        settings = arguments(trl.SFTConfig, tmp_path / "out", max_length=64)
        trainer = trl.SFTTrainer(model, settings, train_dataset=data, **usual)
    elif kind == "dpo":
        data = Dataset.from_list([{"prompt": QUESTION, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}] * 8)
        settings = arguments(trl.DPOConfig, tmp_path / "out", max_length=64)
        trainer = trl.DPOTrainer(model, None, settings, train_dataset=data, **usual)
    else:
        data = Dataset.from_list([{"prompt": QUESTION}] * 8)
        settings = arguments(trl.GRPOConfig, tmp_path / "out", num_generations=2, max_completion_length=8, beta=0.1)
        trainer = trl.GRPOTrainer(model, lambda completions, **_: [0.0, 1.0], settings, train_dataset=data, **usual)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    check_export(trainer.model, tmp_path / "exported")


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["given", "own answers"])
def test_distillation(source: Path, tmp_path: Path, lmbda: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    model = made(source, W4A16)
    trainer = gkd.GKDTrainer(
        model,
        loaded(source),
        arguments(gkd.GKDConfig, tmp_path / "out", max_length=64, max_new_tokens=8, lmbda=lmbda),
        train_dataset=Dataset.from_list([{"messages": QUESTION + ANSWERS[0]}] * 8),
        processing_class=tiny_tokenizer(),
        optimizers=optimizers(model),
    )
    check_trained(model, trainer, tmp_path / "exported")
