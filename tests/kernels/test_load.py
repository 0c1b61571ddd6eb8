"""Which kernels are registered, and how they are switched off."""

import pytest
import torch

from qat.kernels.load import KERNELS, cpu_problem, load, load_for_training


def test_every_kernel_is_registered_with_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.kernels import load as loading

    registered = {}
    monkeypatch.setattr(torch.library, "register_kernel", lambda name, key, kernel: registered.update({name: kernel}))
    monkeypatch.setattr(loading, "_loaded", set())
    for operator, files in KERNELS.items():
        loading.register(operator, "cuda", files["cuda"])
    assert registered.keys() == {f"qat::{operator}" for operator in KERNELS}
    assert all(kernel.__wrapped__.__name__ == name.removeprefix("qat::") for name, kernel in registered.items())


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load_for_training()
    here = "Triton kernels for fake_quantize," if torch.cuda.is_available() else "C kernels for fake_quantize_input"
    assert here in capsys.readouterr().err or cpu_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("QAT_KERNELS", "0")
    assert load() == []
    load_for_training()
    assert "no kernels (QAT_KERNELS=0): fake quantization runs its reference" in capsys.readouterr().err
