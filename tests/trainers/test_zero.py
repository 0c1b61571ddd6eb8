"""What the one key of DeepSpeed becomes, and what each stage leaves on a device and on its host."""

import pytest

from qat.trainers import zero
from qat.trainers.zero import ADAM_BYTES, BUCKET, HOST_MEMORY, PCIE, ZeroConfig, divided, engine_config, host_seconds

STATES = {
    "master weights": 800,
    "scales": 80,
    "gradients": 800,
    "Adam moments": 1600,
    "average of weights": 808,
    "teacher": 400,
}


def test_each_stage_divides_what_its_name_says() -> None:
    first, second, third = (divided(ZeroConfig.model_validate({"stage": stage}), 8, STATES) for stage in (1, 2, 3))
    assert first["Adam moments"] == 200 and first["masters of the optimizer"] == 100
    assert first["gradients"] == first["master weights"] == 800 and second == {**first, "gradients": 100}
    parameters = {"master weights": 100, "average of weights": 101, "teacher": 50}
    assert third == {**second, **parameters} and third["scales"] == 80
    assert third["gradients being summed"] == 4 * BUCKET


def test_what_is_offloaded_is_not_on_the_device() -> None:
    optimizer, everything = (ZeroConfig.model_validate({"stage": 3, "offload": what}) for what in ("optimizer", "all"))
    moments = {"Adam moments": 0, "masters of the optimizer": 0}
    third = divided(ZeroConfig(stage=3), 8, STATES)
    assert divided(optimizer, 8, STATES) == {**third, **moments}
    assert divided(everything, 8, STATES) == {**third, **moments, "master weights": 0, "average of weights": 0}
    least = 8e9 / 8 / PCIE + ADAM_BYTES * 1e9 / HOST_MEMORY
    assert least == host_seconds(optimizer, 10**9, 10**9, 8, 2.0) < host_seconds(everything, 10**9, 10**9, 8, 2.0)
    assert host_seconds(ZeroConfig(stage=3), 10**9, 10**9, 8, 2.0) == 0


def test_nothing_is_compiled_and_nothing_is_rounded_by_the_engine() -> None:
    plain = engine_config(ZeroConfig(), 0.5, False)
    assert plain["gradient_clipping"] == 0.5 and plain["zero_optimization"]["stage"] == 2
    assert "bf16" not in plain and "torch_autocast" not in plain
    assert plain["zero_force_ds_cpu_optimizer"] is False
    mixed = engine_config(ZeroConfig(stage=3, offload="all"), 1.0, True)
    assert "bf16" not in mixed and mixed["torch_autocast"]["dtype"] == "bfloat16"
    assert {"offload_optimizer", "offload_param"} <= mixed["zero_optimization"].keys()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert "pip install deepspeed" in str(zero.missing())
    monkeypatch.setattr(zero, "find_spec", lambda name: name)
    assert zero.missing() is None
