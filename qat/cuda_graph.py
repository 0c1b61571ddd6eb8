"""Recording a CUDA graph, and undoing a recording that failed.

A recording fails where something in it waits for the GPU. Until PyTorch mends it (pytorch #180395), a failed one leaves
its thread on the recording's stream, the allocator believing that a recording goes on, and the random number generator
refusing to be used outside of one: `record` puts these right before it raises.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

WARM = 2  # runs before a recording: what compiles or allocates at its first call is then done


def record(run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Callable[[], None], Any]:
    """What replays `run`, and its results, which lie where each replay writes them.

    Args:
        run: without anything that waits for the GPU; warmed on the same stream.
        pool: of `torch.cuda.graph_pool_handle`, for the memory of one or several graphs.
        stream: not the current one.

    Raises:
        Exception: what kept it from being recorded.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads (logging, data) may talk to the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = run()
    except BaseException:
        _undo(before, pool)
        raise
    return graph.replay, results


def _undo(before: Any, pool: Any) -> None:
    torch.cuda.set_stream(before)
    device = before.device.index
    with contextlib.suppress(Exception):  # what torch's own clean-up did, where it came so far
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    with contextlib.suppress(Exception):
        generator.graphsafe_set_state(generator.clone_state())  # a clone is not being recorded
