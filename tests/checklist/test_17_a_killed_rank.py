"""Point 17: `kill -9` of a rank in the middle of a batch is noticed within two seconds, and every item is answered exactly once.

With a SQL sink behind it: tests/integration/test_faults.py. Several ranks: tests/headrace/test_pipeline.py.
"""

from __future__ import annotations

import os
import signal
import time

from engine.async_engine import AsyncEngine
from engine.supervisor import EngineEvent
from headrace import GenerationConfig

LONG = GenerationConfig(max_new_tokens=40, ignore_eos=True, top_k=0, random_seed=11)


def test_killed(pipe: AsyncEngine, events: list[EngineEvent]) -> None:
    prompts = [f"prompt {number}" for number in range(60)]
    expected = [answer.text for answer in pipe(prompts, LONG)]  # type: ignore[union-attr]
    (pid,) = pipe.frontend.pids
    seen = len(events)
    answers = pipe.stream(iter(prompts), LONG)
    got = [next(answers)]
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while not any(event.kind == "engine_died" for event in events[seen:]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [event.kind for event in events[seen:]][:1] == ["engine_died"]
    got += answers
    assert sorted(answer.index for answer in got) == list(range(60))
    assert [answer.text for answer in sorted(got, key=lambda answer: answer.index)] == expected
    assert pipe.frontend.pids != (pid,)
