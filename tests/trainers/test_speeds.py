"""How long a step takes on a GPU, from stated assumptions: products, launches, and what devices send."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qat.trainers import speeds
from qat.trainers.estimate import estimate
from qat.trainers.footprint import GIB, job_facts
from qat.trainers.job import Job
from qat.trainers.speeds import GPUS, Machine, launch_seconds, listed, sent_bytes, step_seconds
from tests.trainers.test_estimate import job


@pytest.fixture(autouse=True)
def _offline_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(speeds, "MEASURE_SECONDS", 0.0)


def h100(wanted: Job) -> Machine:
    return speeds._gpu(wanted, "an H100", "H100", 80 * GIB)


@pytest.fixture(scope="module")
def half_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes of Qwen2.5-0.5B."""
    folder = tmp_path_factory.mktemp("half")
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    AutoConfig.for_model("qwen2", **sizes, **heads).save_pretrained(folder)
    return folder


def speed(wanted: Job) -> float:
    return wanted.tokens_per_step / step_seconds(wanted, job_facts(wanted), h100(wanted))


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Some Accelerator", None),
    ],
)
def test_devices_are_found_by_their_own_names(name: str, known_as: str | None) -> None:
    assert listed(name) == known_as


def test_large_job_takes_the_time_of_its_products() -> None:
    wanted = job("meta-llama/Llama-3.1-8B", steps=10, rows=32, micro_rows=4, devices=8, data={"seq_len": 4096})
    found = estimate(wanted)
    (plan,) = found.plans  # a CPU is no device for eight
    assert plan.device == "assumed H100 SXM" and plan.precision == "bf16-mixed"
    at_least = found.flops_per_token * found.tokens / (8 * GPUS["H100"][0])
    assert found.tokens == 10 * 32 * 4096
    assert 1 / 0.45 <= plan.training_seconds / at_least < 1.6 / 0.45
    assert plan.tokens_per_second == pytest.approx(found.tokens / plan.training_seconds)


def test_an_h100_trains_half_a_billion_parameters_at_fifty_thousand_tokens_a_second(half_billion: Path) -> None:
    def micro(rows: int, **changes: Any) -> Job:
        return job(half_billion, rows=rows, micro_rows=rows, data={"seq_len": 512}, **changes)

    assert 50_000 <= speed(micro(16)) <= 150_000
    known, machine = job_facts(micro(1)), h100(micro(1))
    least = launch_seconds(micro(1), known, machine)
    assert speed(micro(1)) == pytest.approx(512 / least, rel=0.1) and speed(micro(1)) < 15_000  # the host's speed
    assert launch_seconds(micro(16), known, machine) == least
    assert speed(micro(2)) == pytest.approx(2 * speed(micro(1)), rel=0.05)
    dense = [{"match": "*", "skip": "all but one"}]
    rules = [{"match": "*.0.mlp.down_proj", "weight": "nvfp4", "input": "nvfp4"}, *dense]
    assert launch_seconds(micro(1), job_facts(micro(1, scheme={"rules": rules})), machine) < 0.5 * least
    again = micro(1, activation_checkpointing=True)
    assert least < launch_seconds(again, known, machine) < 5 / 3 * least + 1e-9


def test_divided_weights_are_sent_in_every_pass_and_gradients_of_whole_models_once_a_step() -> None:
    many = {"devices": 8, "rows": 16, "micro_rows": 1}
    whole, divided = (job("meta-llama/Llama-3.1-8B", strategy=name, **many) for name in ("ddp", "fsdp"))
    known = job_facts(whole)
    count = known.student.parameters
    assert sent_bytes(job("meta-llama/Llama-3.1-8B"), known) == (0, 0)
    assert sent_bytes(whole, known) == (0, 2 * 4 * count * 7 / 8)
    assert sent_bytes(divided, known) == ((2 * 4 + 4 + 2) * count * 7 / 8, 0)
    far = job("meta-llama/Llama-3.1-8B", strategy="fsdp", devices=16, rows=16, micro_rows=1)
    assert h100(far).per_sent_byte > 5 * h100(divided).per_sent_byte
    assert speed(far) < 2 * speed(divided)  # twice the devices, over a network
