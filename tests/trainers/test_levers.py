"""Proposals of a plan, taken at their word; strategies against what is divided under each; the recipes for clusters."""

import re
from pathlib import Path
from typing import Any

import pytest

from qat.config import override
from qat.init.scales import ScaleSearch
from qat.init.smooth import Smooth
from qat.trainers.footprint import GIB, job_facts, memory
from qat.trainers.job import Job, load_job
from qat.trainers.levers import HEADROOM, changed, launch_advice, memory_advice, ways
from qat.trainers.zero import BUCKET
from tests.trainers.test_estimate import ROOT, job
from tests.trainers.test_speeds import h100, half_billion, speed

__all__ = ["half_billion"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def peak(wanted: Job) -> int:
    return sum(memory(wanted, job_facts(wanted), "cuda", True).values())


def recipe(name: str, *changes: str) -> Job:
    return load_job(ROOT / "configs" / "qad" / f"{name}.yaml", list(changes))


def proposals(wanted: Job) -> list[tuple[list[str], float, float]]:
    """Overrides, GiB and tokens per second of each way that a plan says would fit."""
    (note,) = memory_advice(wanted, job_facts(wanted), h100(wanted))
    found = re.findall(r"with (\S+=.*?) \(([\d,]+) GiB, ([\d,]+) tokens/s\)", note)
    return [
        (said.replace("'", "").replace("{rank: 16}", "{rank:#16}").split(), *numbers(*rest)) for said, *rest in found
    ]


def numbers(*texts: str) -> list[float]:
    return [float(text.replace(",", "")) for text in texts]


def taken(wanted: Job, said: list[str]) -> Job:
    data = override(wanted.model_dump(mode="json"), [setting.replace("#", " ") for setting in said])
    together = data["micro_rows"] * data["devices"]
    return Job.model_validate({**data, "rows": -(-data["rows"] // together) * together})


def test_what_is_proposed_fits_and_every_part_of_it_is_needed() -> None:
    wanted = job("meta-llama/Llama-3.1-8B", rows=4, micro_rows=4, data={"seq_len": 4096}, scheme={"learn": "none"})
    room = HEADROOM * 80 * GIB
    assert peak(wanted) > room
    divided, adapted = proposals(wanted)
    assert any(setting.startswith("strategy=fsdp") for setting in divided[0])
    assert any(setting.startswith("lora=") for setting in adapted[0])
    for said, gib, _ in (divided, adapted):
        other = taken(wanted, said)
        assert peak(other) <= room and peak(other) / GIB == pytest.approx(gib, abs=0.5)
    for setting in divided[0]:
        if not setting.startswith(("strategy", "devices")):
            assert peak(taken(wanted, [other for other in divided[0] if other != setting])) > room


def test_a_job_that_fits_is_left_alone_and_one_that_nothing_helps_is_told_its_largest_part() -> None:
    small = recipe("llama-3.1-8b-nvfp4-8gpu")
    assert memory_advice(small, job_facts(small), h100(small)) == []
    huge = job("meta-llama/Llama-3.1-70B", lora={"rank": 16}, scheme={"learn": "none"})
    (note,) = memory_advice(huge, job_facts(huge), h100(huge))
    assert re.search(r"the largest part is master weights \(26\d GiB\)", note)


def test_a_waiting_gpu_gets_more_rows(half_billion: Path) -> None:
    wanted = job(half_billion, rows=8, micro_rows=1, data={"seq_len": 512})
    (note,) = launch_advice(wanted, job_facts(wanted), h100(wanted))
    rows, promised, now = re.findall(r"micro_rows=(\d+).* give ([\d,]+) tokens/s instead of ([\d,]+)", note)[0]
    assert numbers(now)[0] == pytest.approx(speed(wanted), rel=0.01)
    better = changed(wanted, micro_rows=int(rows))
    assert speed(better) == pytest.approx(numbers(promised)[0], rel=0.01) and speed(better) > 50_000
    assert launch_advice(better, job_facts(better), h100(better)) == []


def test_each_stage_divides_more() -> None:
    wanted = recipe("llama-3.1-8b-nvfp4-8gpu")
    known, machine = job_facts(wanted), h100(wanted)
    found = {way.strategy: way for way in ways(wanted, known, machine)}
    one, ddp, zero1, zero2 = (
        found[name] for name in ("one device", "ddp (auto)", "deepspeed, ZeRO-1", "deepspeed, ZeRO-2")
    )
    parts = memory(changed(wanted, strategy="ddp"), known, "cuda", True)
    trained = parts["Adam moments"] // 2
    assert ddp.peak == sum(parts.values()) and ddp.devices == 8 and one.devices == 1
    masters, bucket = trained / 8, 4 * BUCKET
    assert zero1.peak == pytest.approx(one.peak - 2 * trained * 7 / 8 + masters + bucket, rel=1e-6)
    assert zero2.peak == pytest.approx(zero1.peak - trained * 7 / 8, rel=1e-6)
    third, offloaded = found["deepspeed, ZeRO-3"], found["deepspeed, ZeRO-3, offloaded"]
    assert found["fsdp"].peak == peak(wanted) and offloaded.peak <= third.peak < zero2.peak
    assert offloaded.tokens_per_second < third.tokens_per_second


@pytest.mark.parametrize(
    ("name", "least", "most"), [("llama-3.1-8b-nvfp4-8gpu", 2_000, 6_000), ("llama-3.1-70b-nvfp4-64gpu", 100, 700)]
)
def test_recipes_for_clusters_have_believable_plans(name: str, least: int, most: int) -> None:
    """A step fits, and tokens per second and GPU are a tenth to a half of what the chip's peak allows."""
    wanted = recipe(name)
    known = job_facts(wanted)
    parts: dict[str, Any] = memory(wanted, known, "cuda", True)
    assert parts.pop("initialisation, beyond that") == 0
    step, states = sum(parts.values()), 16 * known.student.parameters / wanted.devices
    assert states < step < HEADROOM * 80 * GIB
    assert least < speed(wanted) / wanted.devices < most
    assert memory_advice(wanted, known, h100(wanted)) == []
    scheme = wanted.scheme.model_copy(update={"init": (Smooth(strength="auto"), ScaleSearch())})
    whole = changed(wanted, scheme=scheme)  # before it is divided
    undivided: dict[str, Any] = memory(whole, known, "cuda", True)
    notes = memory_advice(whole, known, h100(whole))
    assert (sum(undivided.values()) < HEADROOM * 80 * GIB) == ("8b" in name)
    assert notes == [] if "8b" in name else f"a step would fit ({step / GIB:.0f} GiB)" in notes[0]
