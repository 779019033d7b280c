"""The real engine dies again and again while its worker answers batches: kill -9, SIGSEGV, and a device that has no memory left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tiny_service import ENGINE, TinyService
from worker_process import QUICK, wait_for

from headrace.batch import BatchStatus
from headrace.config import GenerationConfig

TITLE = "kill -9, SIGSEGV or (fake) CUDA out of memory of an engine rank"
GREEDY: Final = GenerationConfig(max_new_tokens=24, ignore_eos=True, temperature=0.0)
BACK_S: Final = 10.0
"""How much longer than its first start an engine's way back may take."""
SIGNALS: Final = {"kill9": signal.SIGKILL, "sigsegv": signal.SIGSEGV, "out_of_memory": signal.SIGUSR1}
WORDS: Final = ("the", "mill", "wheel", "turns", "while", "water", "runs", "down", "the", "headrace")
_STAMP = re.compile(r"^(\d\d):(\d\d):(\d\d) .*\[(model_loading|engine_ready)\]", re.MULTILINE)


def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """Let the engine die twenty times, or three times, each way in turn; every row is that of a run without faults."""
    deaths, rows = (20, 400) if long else (3, 60)
    folder = Path(tempfile.mkdtemp(prefix="headrace-fault-"))
    folder.chmod(0o711)
    with TinyService(
        folder, database="postgres" if long else "sqlite", engine={**ENGINE, "max_batch_size": 16},
        engine_frontend="harsh_engine:HarshFrontend", **{**QUICK, "chunk_size": 16},
    ) as tiny:  # fmt: skip
        counts = _Fall(tiny, random.Random(seed), rows, say).run(deaths)
    shutil.rmtree(folder, ignore_errors=True)
    return counts


class _Fall:
    def __init__(self, tiny: TinyService, draw: random.Random, rows: int, say: Callable[[str], None]) -> None:
        self._tiny = tiny
        self._draw = draw
        self._say = say
        self._prompts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(rows)]
        self._batches: list[str] = []

    def run(self, deaths: int) -> dict[str, int | float]:
        worker, engine = self._tiny.worker.pid, self._tiny.engine().pid
        wanted = self._finish(self._submit())
        first_start_s = self._first_start_s()
        fallen, slowest_s = 0, 0.0
        while fallen < deaths:
            batch_id = self._batch_under_way()
            name = list(SIGNALS)[fallen % len(SIGNALS)]
            os.kill(engine, SIGNALS[name])
            engine, back_s = self._next_engine(engine)
            slowest_s, fallen = max(slowest_s, back_s), fallen + 1
            self._say(f"death {fallen} by {name}: back after {back_s:.1f} s, {self._tiny.service.done(batch_id)} rows")
            assert back_s <= first_start_s + BACK_S, f"{back_s:.1f} s; the first start took {first_start_s:.0f} s"
        again = 0
        for batch_id in self._batches[1:]:
            rows = self._finish(batch_id)
            assert [row[:2] for row in rows] == [row[:2] for row in wanted], f"{batch_id} has other answers"
            again += sum(attempts > 1 for *_, attempts in rows)
        assert self._tiny.worker.pid == worker
        assert self._tiny.worker.process is not None
        assert self._tiny.worker.process.poll() is None, "the worker ended"
        assert again > 0, "no death hit a prompt"
        return {
            "rows": len(self._batches) * len(self._prompts), "lost": 0, "doubled": 0, "failed": 0, "deaths": fallen,
            "rows_computed_again": again, "slowest_back_s": round(slowest_s, 1), "first_start_s": first_start_s,
        }  # fmt: skip

    def _submit(self) -> str:
        self._batches.append(self._tiny.client.submit(self._prompts, GREEDY).id)
        return self._batches[-1]

    def _batch_under_way(self) -> str:
        """Return a batch of which some rows are there and some are not, a new one if need be."""
        service = self._tiny.service
        if len(self._batches) == 1 or service.store.get_batch(self._batches[-1]).status.is_terminal:
            self._submit()
        batch_id, before = self._batches[-1], service.done(self._batches[-1])
        share = self._draw.randrange(1, 1 + len(self._prompts) // 10)
        wait_for(
            lambda: service.done(batch_id) >= min(before + share, len(self._prompts)), timeout_s=60, what="rows come",
            process=self._tiny.worker, every_s=0.005,
        )  # fmt: skip
        return batch_id

    def _next_engine(self, pid: int) -> tuple[int, float]:
        """Wait until another engine takes requests; return its process id and how long that took, in seconds."""
        began = time.monotonic()
        log, store = self._tiny.worker.log_tail, self._tiny.service.store

        def ready() -> int | None:
            found = re.findall(r"\[engine_ready\].*pids=\((\d+),", log(10**7))
            return int(found[-1]) if found and int(found[-1]) != pid else None

        def nothing_to_do() -> bool:
            return store.get_batch(self._batches[-1]).status.is_terminal

        if wait_for(lambda: ready() or nothing_to_do(), timeout_s=60, what="an engine", process=self._tiny.worker) is True:
            # A device without memory shows only at a step, and all was done before there was one.
            self._submit()
            began = time.monotonic()
        found = int(wait_for(ready, timeout_s=60, what="another engine is ready", process=self._tiny.worker))
        return found, time.monotonic() - began

    def _first_start_s(self) -> float:
        stamps = {
            event: int(hours) * 3600 + int(minutes) * 60 + int(seconds)
            for hours, minutes, seconds, event in reversed(_STAMP.findall(self._tiny.worker.log_tail(10**7)))
        }
        # The log counts whole seconds, and may begin before midnight.
        return float((stamps["engine_ready"] - stamps["model_loading"]) % 86400 + 1)

    def _finish(self, batch_id: str) -> list[tuple[Any, ...]]:
        """Wait for the batch's end, check the oracle, return its rows as (index, token ids, attempts)."""
        batch = self._tiny.service.wait_over(batch_id, self._tiny.worker, timeout_s=180)
        assert batch.status is BatchStatus.COMPLETED
        assert batch.counts.failed == 0
        rows = self._tiny.service.assert_exactly_once(batch_id, len(self._prompts))
        return [(row.index, row.choices[0].token_ids, row.attempts) for row in rows]
