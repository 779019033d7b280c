"""What happens to a group of ranks when one is struck in the middle of a batch, and what must be left when all is over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.async_engine import AsyncEngine
from engine.supervisor import EngineEvent
from headrace import GenerationConfig

SHARED_MEMORY = Path("/dev/shm")


class Watched:
    """A pipeline's events, with the moment of each."""

    def __init__(self) -> None:
        self.events: list[tuple[float, EngineEvent]] = []

    def __call__(self, event: EngineEvent) -> None:
        self.events.append((time.monotonic(), event))

    def deaths(self) -> list[float]:
        return [at for at, event in self.events if event.kind == "engine_died"]


def strike(
    pipe: AsyncEngine, watched: Watched, victim: int, how: signal.Signals, *, prompts: int, tokens: int
) -> tuple[float, set[int]]:
    """Strike rank `victim` in the middle of a batch: seconds until it was noticed, and all processes there were.

    Every prompt must be answered once and whole, by a group of new processes.
    """
    config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True, top_k=1)
    texts = [f"prompt {number}" for number in range(prompts)]
    before, deaths = pipe.frontend.pids, len(watched.deaths())
    answers: list[Any] = []
    pieces = pipe.stream_infer(texts, config)
    answers.append(next(pieces))  # the batch runs
    thread = threading.Thread(target=lambda: answers.extend(pieces))
    thread.start()
    struck = time.monotonic()
    os.kill(before[victim], how)
    assert eventually(lambda: len(watched.deaths()) > deaths, 60), "nobody noticed"
    noticed = watched.deaths()[-1] - struck
    thread.join(180)
    assert not thread.is_alive()
    assert all(piece.error_code is None for piece in answers)
    counts = [sum(len(piece.token_ids) for piece in answers if piece.index == index) for index in range(prompts)]
    assert counts == [tokens] * prompts
    after = pipe.frontend.pids
    assert not set(before) & set(after)
    return noticed, {*before, *after}


def eventually(check: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < until:
        time.sleep(0.02)
    return done


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def shared_memory() -> set[str]:
    """What lies in shared memory by name."""
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
