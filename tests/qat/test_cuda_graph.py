"""Recordings on a GPU, those that fail among them; a CPU has none."""

import pytest
import torch

from qat.cuda_graph import record


@pytest.mark.gpu
def test_on_a_gpu_a_recording_is_replayed_with_what_lies_there_now() -> None:
    x = torch.ones(4, device="cuda")
    replay, y = record(lambda: x * 2, torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    for value in (3.0, 5.0):
        x.fill_(value)
        replay()
        assert y.tolist() == [2 * value] * 4


@pytest.mark.gpu
def test_on_a_gpu_a_recording_that_fails_leaves_nothing_behind() -> None:
    x, before = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        record(lambda: x.sum().item(), torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    assert torch.cuda.current_stream() == before
    assert bool(torch.rand(3, device="cuda").isfinite().all())
    torch.cuda.empty_cache()
    test_on_a_gpu_a_recording_is_replayed_with_what_lies_there_now()
