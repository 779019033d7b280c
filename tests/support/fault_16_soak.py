"""Fault 16, the soak: a steady stream of small batches for as long as asked, and memory, files, threads and keys that stay flat.

    four senders ── HTTP ──▶ API ──▶ SQL ──▶ Redis ──▶ worker ──▶ the real engine, a tiny model ──▶ SQL ──▶ HTTP ──▶ checked, deleted

What an hour can show. Python's allocator takes memory from the system in arenas of 1 MiB, and glibc's in steps of the same order, so
a process that leaks nothing may still be a step or two larger at the end than in the middle. The slope is Theil and Sen's (the median
of the slopes between all pairs of samples) over the second half, which one step anywhere leaves at about 0; two steps within the
half make it at most STEPS_MIB divided by the half's hours. That is the bound: 4 MiB/h for an hour's soak, and for 48 h and more the
1 MiB/h that is asked of a day.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import redis
from tiny_service import TinyService

from headrace.batch import BatchStatus
from headrace.config import GenerationConfig
from headrace.errors import Conflict

TITLE = "soak: a steady stream of small batches; memory, files, threads, Redis keys and chunk times stay flat"
STEPS_MIB: Final = 2.0
WARM_MINUTES: Final = 2.0
"""A shorter soak ends while pools, caches and lazily loaded code still fill up: only its rows are judged."""
LEAST_MINUTES: Final = 3
"""So many minutes of an idle machine each half of the chunk times must have, else they aren't judged and not in the counts."""
SENDERS: Final = 4
SAMPLE_S: Final = 5.0
WORDS = ["the", "mill", "wheel", "turns", "while", "the", "water", "runs", "down", "the", "headrace"]
_CHUNK_ENDED = re.compile(r"\[chunk_ended\].*seconds=([0-9.]+)")
Say = Callable[[str], None]


@dataclass
class Tally:
    """What the senders did; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    batches: int = 0
    rows: int = 0
    cancelled: int = 0
    retried: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def add(self, **more: int) -> None:
        with self.lock:
            for name, count in more.items():
                setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class Sample:
    """One look at everything."""

    hours: float
    rss_mib: dict[str, float]
    fds: dict[str, int]
    threads: dict[str, int]
    redis_keys: int
    redis_mib: float


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """An hour, or fifteen seconds that show the machinery only."""
    return soak(minutes=60 if long else 0.15, seed=seed, say=say, database="postgres" if long else "sqlite")


def soak(
    *, minutes: float, seed: int, say: Say, database: str, enough: threading.Event | None = None
) -> dict[str, int | float]:
    """Let the stream flow for `minutes`, or until `enough` is set; return the counts and raise AssertionError where something grew."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-soak-"))
    folder.chmod(0o711)  # PostgreSQL may run as another user
    try:
        with TinyService(folder, database=database, chunk_size=8, max_prompt_bytes=4096) as tiny:
            counts = _Soak(tiny, seed=seed, say=say, enough=enough or threading.Event()).run(minutes)
    except BaseException:
        say(f"the logs of every process are in {folder}")
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return counts


class _Soak:
    def __init__(self, tiny: TinyService, *, seed: int, say: Say, enough: threading.Event) -> None:
        self._tiny = tiny
        self._enough = enough
        self._seed = seed
        self._say = say
        self._tally = Tally()
        self._stop = threading.Event()
        self._engine = tiny.engine()
        self._processes = {
            "api": psutil.Process(tiny.api.pid), "worker": psutil.Process(tiny.worker.pid), "engine": self._engine,
        }  # fmt: skip
        self._link = redis.Redis.from_url(tiny.redis.url)
        self._samples: list[Sample] = []
        self._log_at = 0
        # Of the minutes in which the machine was not busy with other work.
        self._p99s: list[float] = []

    def run(self, minutes: float) -> dict[str, int | float]:
        senders = [threading.Thread(target=self._send, args=(number,)) for number in range(SENDERS)]
        started = time.monotonic()
        for sender in senders:
            sender.start()
        try:
            self._watch(started, minutes)
        finally:
            self._stop.set()
            for sender in senders:
                sender.join(60)
        assert not self._tally.errors, f"{len(self._tally.errors)} senders failed, the first of {self._tally.errors[0]!r}"
        left = self._tiny.service.store.count_open_prompts()
        assert left == 0, f"{left} prompts are open after the last batch ended"
        return self._judge(round(60 * self._samples[-1].hours, 2))

    def _watch(self, started: float, minutes: float) -> None:
        interval_s = min(SAMPLE_S, minutes * 60 / 40)
        next_minute, rows_before = 1, 0
        while (gone_s := time.monotonic() - started) < minutes * 60 and not self._tally.errors and not self._enough.is_set():
            self._enough.wait(interval_s)
            self._samples.append(self._look(gone_s / 3600))
            if gone_s >= 60 * next_minute or gone_s + interval_s >= minutes * 60:
                self._report(next_minute, self._tally.rows - rows_before)
                next_minute, rows_before = next_minute + 1, self._tally.rows

    def _look(self, hours: float) -> Sample:
        for name, process in self._processes.items():
            assert process.is_running(), f"{name} ended during the soak"
        info: Any = self._link.info("memory")
        return Sample(
            hours=hours,
            rss_mib={name: process.memory_info().rss / 2**20 for name, process in self._processes.items()},
            fds={name: process.num_fds() for name, process in self._processes.items()},
            threads={name: process.num_threads() for name, process in self._processes.items()},
            redis_keys=int(self._link.dbsize()),  # type: ignore[arg-type]  # the stubs know asyncio's too
            redis_mib=info["used_memory"] / 2**20,
        )

    def _report(self, minute: int, rows: int) -> None:
        last, times, load = self._samples[-1], self._chunk_seconds(), os.getloadavg()[0]
        p99 = 1e3 * times[int(0.99 * len(times))] if times else 0.0
        if times and load <= 2 * (os.cpu_count() or 1):
            self._p99s.append(p99)
        parts = [
            f"{name} {last.rss_mib[name]:.1f} MiB {last.fds[name]} fds {last.threads[name]} threads" for name in self._processes
        ]
        chunks = f"{len(times)} chunks, p99 {p99:.0f} ms at a load of {load:.1f}"
        self._say(
            f"minute {minute}: {rows} rows, {self._tally.batches} batches in all; {chunks}; {'; '.join(parts)}; "
            f"redis {last.redis_keys} keys {last.redis_mib:.2f} MiB"
        )

    def _chunk_seconds(self) -> list[float]:
        """Return how long the chunks took that ended since the last call, sorted, from the worker's log."""
        with self._tiny.worker.log.open(errors="replace") as log:
            log.seek(self._log_at)
            text = log.read()
            self._log_at = log.tell()
        return sorted(float(seconds) for seconds in _CHUNK_ENDED.findall(text))

    def _send(self, number: int) -> None:
        draw = random.Random(f"{self._seed} {number}")
        try:
            while not self._stop.is_set():
                self._one_batch(draw)
        except BaseException as error:
            self._tally.errors.append(error)

    def _one_batch(self, draw: random.Random) -> None:
        """Submit a small batch, see it to its end, check every row, delete it."""
        client = self._tiny.client
        prompts: list[Any] = [_prompt(draw) for _ in range(draw.randrange(1, 25))]
        bad = {index for index, prompt in enumerate(prompts) if not prompt or len(prompt) > 4000}
        config = GenerationConfig(
            max_new_tokens=draw.randrange(1, 9),
            ignore_eos=True,
            n=draw.choice([1, 1, 1, 2]),
            temperature=draw.choice([0.0, 1.0]),
        )
        batch_id = client.submit(prompts, config, metadata={"soak": str(self._seed)}).id
        is_cancelled = draw.random() < 0.1
        if is_cancelled:
            time.sleep(draw.random() * 0.2)
            try:
                client.cancel(batch_id)
            except Conflict:
                is_cancelled = False
        batch = client.wait(batch_id, timeout=120)
        assert batch.status is (BatchStatus.CANCELLED if is_cancelled else BatchStatus.COMPLETED)
        rows = list(client.results(batch_id))
        assert [row.index for row in rows] == list(range(len(prompts)))
        if not is_cancelled:
            assert {row.index for row in rows if row.error is not None} == bad
        elif any(row.error is not None and row.error.code == "batch_cancelled" for row in rows) and draw.random() < 0.5:
            again = client.wait(client.retry(batch_id).id, timeout=120)
            assert again.status is BatchStatus.COMPLETED
            client.delete(again.id)
            self._tally.add(retried=1, rows=again.counts.total)
        client.delete(batch_id)
        self._tally.add(batches=1, rows=len(rows), cancelled=int(is_cancelled))

    def _judge(self, minutes: float) -> dict[str, int | float]:
        half = self._samples[len(self._samples) // 2 :]
        window_h = half[-1].hours - half[0].hours
        bound = max(1.0, STEPS_MIB / window_h)
        slopes = {
            name: round(theil_sen([one.hours for one in half], [one.rss_mib[name] for one in half]), 2)
            for name in self._processes
        }
        counts: dict[str, int | float] = {
            "minutes": minutes, "rows": self._tally.rows, "batches": self._tally.batches, "cancelled": self._tally.cancelled,
            "retried": self._tally.retried, "lost": 0, "rss_bound_mib_per_h": round(bound, 2),
            **{f"{name}_mib_per_h": slope for name, slope in slopes.items()},
            **{f"{name}_rss_mib": round(half[-1].rss_mib[name], 1) for name in self._processes},
            **{f"{name}_fds": half[-1].fds[name] for name in self._processes},
            **{f"{name}_threads": half[-1].threads[name] for name in self._processes},
            "redis_keys": half[-1].redis_keys,
        }  # fmt: skip
        # The first minutes load code; of few minutes the median says nothing.
        thirds = self._p99s[len(self._p99s) // 3 :]
        early, late = thirds[: len(thirds) // 2], thirds[len(thirds) // 2 :]
        is_timed = len(early) >= LEAST_MINUTES
        if is_timed:
            counts |= {
                "chunk_p99_ms_early": round(statistics.median(early)),
                "chunk_p99_ms_late": round(statistics.median(late)),
            }
        if minutes < WARM_MINUTES:
            return counts
        grown = [name for name, slope in slopes.items() if slope > bound] + self._levels_that_rose()
        if is_timed and statistics.median(late) > 2 * statistics.median(early) + 50:
            grown.append("chunk p99")
        assert not grown, f"not flat: {grown}; {counts}"
        return counts

    def _levels_that_rose(self) -> list[str]:
        """Name what is higher at the most in the last quarter than in the second: pools fill up in the first."""
        quarter = len(self._samples) // 4
        early, late = self._samples[quarter : 2 * quarter], self._samples[-quarter:]
        levels: dict[str, Callable[[Sample], float]] = {"redis keys": lambda one: one.redis_keys}
        for name in self._processes:
            levels[f"fds of {name}"] = lambda one, name=name: one.fds[name]  # type: ignore[misc]
            levels[f"threads of {name}"] = lambda one, name=name: one.threads[name]  # type: ignore[misc]
        return [what for what, level in levels.items() if max(map(level, late)) > max(map(level, early)) + 3]


def _prompt(draw: random.Random) -> Any:
    kind = draw.random()
    if kind < 0.02:
        return ""
    if kind < 0.04:
        return "word " * 1000
    text = " ".join(draw.choices(WORDS, k=draw.choice([1, 2, 3, 5, 8, 20])))
    return [{"role": "user", "content": text}] if kind < 0.3 else text


def theil_sen(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the median slope between all pairs of samples: one step, or a few wild samples, don't move it."""
    slopes = [
        (values[j] - values[i]) / (times[j] - times[i])
        for i in range(len(times))
        for j in range(i + 1, len(times))
        if times[j] > times[i]
    ]
    return statistics.median(slopes)
