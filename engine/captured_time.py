"""How long what a step launches takes on a GPU, launched as a step launches it: from a captured graph. Knows nothing of what it times."""

from __future__ import annotations

from collections.abc import Callable

import torch

_REPEATS = 5


def captured_us(run: Callable[[], object]) -> float:
    """Capture `run` on the current device, after it ran once, and return a replay's microseconds: the least of a few."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        best = float("inf")
        for _ in range(_REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e3)
    torch.cuda.current_stream().wait_stream(stream)
    return best
