"""What each step of a run costs: GPU time by CUDA events, host time, and the time between steps, by kind of step.

`Timeline` is an executor around an executor, so it sees what the engine asks for and knows nothing of how it is done. An event
costs a microsecond of the stream, no profiler runs, and nothing is read before the run is over.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch

from engine.executor import LocalExecutor
from engine.plan import RunningStep, StepPlan
from engine.token_masks import TokenMasks


class _Step(NamedTuple):
    kind: str
    tokens: int
    rows: int
    launched: float
    """Host seconds at the launch, and when it returned."""
    returned: float
    begin: torch.cuda.Event
    end: torch.cuda.Event


def kind_of(plan: StepPlan) -> str:
    """`decode`: only rows of one token (a graph's replay); `prefill`: none of them; `mixed`: both."""
    singles = sum(row.count == 1 for row in plan.rows)
    if singles == len(plan.rows):
        return "decode"
    return "mixed" if singles else "prefill"


class Timeline:
    """Implements `engine.plan.Executor` over `inner`. A step that waits for masks is timed up to its logits only."""

    def __init__(self, inner: LocalExecutor) -> None:
        """Time nothing yet."""
        self._inner = inner
        self._steps: list[_Step] = []

    @property
    def num_blocks(self) -> int:
        """The inner executor's."""
        return self._inner.num_blocks

    @property
    def worthwhile_tokens(self) -> int:
        """The inner executor's."""
        return self._inner.worthwhile_tokens

    def launch(self, plan: StepPlan) -> RunningStep:
        """Launch between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launched = time.perf_counter()
        begin.record()
        running = self._inner.launch(plan)
        end.record()
        self._steps.append(_Step(kind_of(plan), plan.num_tokens, len(plan.rows), launched, time.perf_counter(), begin, end))
        return running

    def choose(self, masks: TokenMasks) -> None:
        """As the inner one does."""
        self._inner.choose(masks)

    def report(self) -> dict[str, Any]:
        """Say what the inner one says."""
        return self._inner.report()

    def close(self) -> None:
        """Close the inner one."""
        self._inner.close()

    def take(self) -> dict[str, Any]:
        """Sum up the steps since the last call, by kind.

        `gpu_ms` is from the first to the last operation of a step on the device; `host_ms` is the launch on the host (a launch
        as long as the step itself: the device waits for it); `between_us` is what passes on the device from the end of a step to
        the beginning of the next: the time that the host exposes. `share`: of the whole run.
        """
        torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        total = steps[0].begin.elapsed_time(steps[-1].end)
        kinds: dict[str, list[tuple[_Step, float]]] = defaultdict(list)
        for number, step in enumerate(steps):
            before = steps[number - 1].end.elapsed_time(step.begin) if number else 0.0
            kinds[step.kind].append((step, before))
        return {kind: _summary(found, total) for kind, found in sorted(kinds.items())}


def _summary(found: list[tuple[_Step, float]], total: float) -> dict[str, Any]:
    gpu = [step.begin.elapsed_time(step.end) for step, _ in found]
    between = [before for _, before in found]
    count, tokens = len(found), sum(step.tokens for step, _ in found)
    return {
        "steps": count,
        "share": round((sum(gpu) + sum(between)) / total, 4),
        "tokens": round(tokens / count, 1),
        "rows": round(sum(step.rows for step, _ in found) / count, 1),
        "gpu_ms": round(sum(gpu) / count, 3),
        "host_ms": round(1e3 * sum(step.returned - step.launched for step, _ in found) / count, 3),
        "between_us": round(1e3 * sum(between) / count, 1),
        "us_per_token": round(1e3 * sum(gpu) / tokens, 3),
    }
