"""An engine that serves for weeks must not grow with what it has answered."""

from __future__ import annotations

import gc
import json
import random
import sys
import threading
import weakref
from pathlib import Path

import pytest
import weighed_rank

from engine import rank
from engine.frontend import Frontend
from engine.protocol import Close, Message
from headrace.config import GenerationConfig, PytorchEngineConfig

PROMPTS = 4000
SENDERS = 4
READER_MIB = 0.5
"""The reading thread's arena stays at 0.2 MiB; with a fresh 256 KiB for every read it had 1.5 after so many prompts, and more with every thousand."""


def test_reading_commands_does_not_grow_the_heap(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Small batches of uneven prompts, as a worker's chunks bring them: the growth came of small objects among large reads."""
    weight = tmp_path / "arenas.json"
    frontend = Frontend(
        str(tiny_model_dir),
        backend_config=PytorchEngineConfig(session_len=256, num_gpu_blocks=512, block_size=16, max_batch_size=32, device="cpu"),
        engine_command=[sys.executable, "-P", weighed_rank.__file__, str(weight)],
    )
    try:
        senders = [threading.Thread(target=_send, args=(frontend, number)) for number in range(SENDERS)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        answered = frontend.stats()["prompts_completed"]
    finally:
        frontend.close()
    assert answered == PROMPTS
    _main, *others = json.loads(weight.read_text())
    assert others, "the reading thread has no arena of its own: this test sees nothing"
    assert max(others) < READER_MIB * 2**20, f"{[round(size / 2**20, 2) for size in others]} MiB in the arenas of the threads"


class _Node:
    """Something that holds itself: no count of references ever frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_an_idle_engine_collects_what_only_a_full_collection_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        has_work = False

    class Pipe:
        def __init__(self) -> None:
            self.messages: list[list[Message]] = [[], [Close()]]

        def take(self, *, wait: bool) -> list[Message]:
            assert wait
            return self.messages.pop(0)

    monkeypatch.setattr(rank, "_TIDY_S", 0.0)
    node = _Node()
    gone = weakref.ref(node)
    gc.collect()  # it is among the old now
    del node
    rank.serve(Idle(), Pipe())  # type: ignore[arg-type]  # what it needs of the two
    assert gone() is None


def _send(frontend: Frontend, number: int) -> None:
    draw = random.Random(number)
    left, done = PROMPTS // SENDERS, threading.Semaphore(0)
    while left:
        count = min(left, draw.randrange(1, 25))
        config = GenerationConfig(max_new_tokens=draw.randrange(1, 9), ignore_eos=True)
        for index in range(count):
            prompt = " ".join(draw.choices(["the", "mill", "wheel", "turns"], k=draw.choice([1, 2, 3, 5, 8, 20])))
            frontend.submit(prompt, config, lambda _: done.release(), index=index)
        for _ in range(count):
            done.acquire()
        left -= count
