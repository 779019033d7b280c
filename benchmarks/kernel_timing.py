"""Time on the device, as an engine sees it. Knows nothing of what is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def seconds(*runs: Callable[[], object], repeats: int = 15) -> float:
    """Median time of one call on the device, as an engine makes it: all of `runs` in a captured graph, replayed.

    Several runs are one call over several sets of inputs, so that none finds its own in the L2 cache.
    """
    count = max(1, 8 // len(runs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs * count:
            run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(3):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[len(times) // 2] * 1e-3 / (len(runs) * count)
