"""The device that is current where an operator meets its kernel: it matters on a GPU only, and is seen here without
one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.kernels.device import INTERPRETED, device_of, on_its_device


def test_a_kernel_runs_with_its_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    launch = on_its_device(lambda *arguments: seen.append((current[0], arguments)))
    with FakeTensorMode():
        there, here = torch.empty(1, device="cuda:1"), torch.empty(1, device="cuda:0")
        launch(None, there, "name")
        launch(here, None)
        launch(torch.empty(1), 3)
    assert [index for index, _ in seen] == [1, 0, 0] and current == [0]
    assert seen[0][1] == (None, there, "name") and seen[2][1][1] == 3


def test_rules_ask_the_device_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        major, minor, multi_processor_count, shared_memory_per_block_optin = 8, 9, 142, 101376

    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Told)
    with FakeTensorMode():
        found = device_of(torch.empty(1, device="cuda:3"))
    assert (found.capability, found.processors, found.shared) == (89, 142, 101376)
    assert asked == [torch.device("cuda:3")] and device_of(torch.empty(1)) == INTERPRETED
