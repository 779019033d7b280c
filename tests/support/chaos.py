"""A storm: a whole service of real processes, random faults by a seed while batches come in over HTTP, and a count at the end.

    Redis · PostgreSQL or SQLite · the API · workers with the echo engine           each of them dies, freezes and comes back
    jobs ── Client.submit ──▶ API ──▶ SQL ──▶ Redis ──▶ workers ──▶ SQL             a fault falls every so many rows
    oracle: one row for each index, equal to those of a run without faults; counters equal a recount; nothing left behind

The order of faults and their lengths come from the seed; when exactly each one falls is up to the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import redis
from chaos_faults import FAULTS, Fault
from chaos_stage import Stage
from worker_process import wait_for

from headrace.batch import Batch, BatchStatus
from headrace.completion import Completion
from headrace.config import GenerationConfig
from headrace.errors import HeadraceError

WISH = GenerationConfig(max_new_tokens=12, ignore_eos=True, random_seed=7)
"""With a seed of its own: what is drawn doesn't depend on the batch's id, which is another one in the storm."""


@dataclass
class Job:
    """One batch: what is asked, and what a run without faults answered."""

    prompts: list[Any]
    priority: int
    # Set by the calm run.
    wanted: list[Completion] = field(default_factory=list)
    # Set when it is submitted in the storm.
    reply: Future[Batch] | None = None
    done: int = 0
    is_over: bool = False
    may_be_cancelled: bool = False

    @property
    def batch_id(self) -> str | None:
        """Known once the API has answered."""
        return self.reply.result().id if self.reply is not None and self.reply.done() else None


def make_jobs(draw: random.Random, total: int, *, size: int) -> list[Job]:
    """Return jobs with `total` prompts: texts, conversations, some that the engine refuses and some refused at the rim."""

    def prompt(index: int) -> Any:
        text = f"prompt {index} " + "wørd " * draw.randrange(8)
        kind = draw.random()
        if kind < 0.01:
            return ""
        if kind < 0.03:
            return text + "REFUSE"
        return [{"role": "user", "content": text}] if kind < 0.3 else text

    sizes = [size] * (total // size) + ([total % size] if total % size else [])
    return [Job([prompt(i) for i in range(count)], draw.choice([0, 0, 1])) for count in sizes]


class Storm:
    """Used as a context manager; `run` returns the counts and raises AssertionError where the promise was broken."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        database: str = "postgres",
        workers: int = 3,
        pause_s: float = 1.0,
        engine: str = "echo",
    ) -> None:
        """`engine`: 'echo', which takes `pause_s` for a prompt, or 'tiny', the real one on a tiny model."""
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._about = {"engine": engine, "seed": seed, "database": database, "workers": workers}
        self._stage = Stage(folder, database=database, draw=self.draw, workers=workers, pause_s=pause_s, engine=engine)
        self._deck: list[Fault] = []
        self._jobs: list[Job] = []

    def __enter__(self) -> Self:
        self._stage.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stage.__exit__()

    def run(self, *, prompts: int, faults: int, batch_size: int, gap_s: float = 1.0, patience_s: float = 120) -> dict[str, Any]:
        """Answer `prompts` while `faults` fall, none sooner than `gap_s` after the last; return the counts."""
        self._jobs = make_jobs(self.draw, prompts, size=batch_size)
        self._answer_calmly()
        for job in self.draw.sample(self._jobs, len(self._jobs) // 5):
            job.may_be_cancelled = True
        started = time.monotonic()
        self._stage.start_workers()
        wait_for(self._stage.pick_worker, timeout_s=120, what="a worker is up")
        self._weather(faults=faults, prompts=prompts, gap_s=gap_s)
        stormy_s = time.monotonic() - started
        self._calm_down(patience_s)
        until_over_s = time.monotonic() - started - stormy_s
        return {
            **self._about, "prompts": prompts, "batches": len(self._jobs), "faults": sum(self.counts.values()),
            "by_kind": dict(sorted(self.counts.items())), **self._judge(), "storm_s": round(stormy_s, 1),
            "until_over_s": round(until_over_s, 1),
        }  # fmt: skip

    def _answer_calmly(self) -> None:
        """Let one undisturbed worker answer everything: what the storm's rows are compared with."""
        service = self._stage.service
        with service.worker() as worker:
            service.ready(worker, timeout_s=120)
            ids = [self._stage.client.submit(job.prompts, WISH).id for job in self._jobs]
            for job, batch_id in zip(self._jobs, ids, strict=True):
                service.wait_over(batch_id, worker, timeout_s=300)
                job.wanted = service.assert_exactly_once(batch_id, len(job.prompts))
            worker.terminate()
            worker.wait(30)

    def _weather(self, *, faults: int, prompts: int, gap_s: float) -> None:
        """Let all faults fall, spread over the work: each waits for its share of rows, or for time to pass."""
        fallen, waiting = 0, list(self._jobs)
        next_rows, last_at = 1.0, time.monotonic()
        while fallen < faults or waiting:
            self._stage.tick()
            rows = self._look()
            if waiting and sum(not job.is_over for job in self._jobs if job.reply is not None) < 3:
                self._submit(waiting.pop(0))
            gone_s = time.monotonic() - last_at
            is_due = gone_s >= gap_s and (rows >= next_rows or gone_s > 5 * gap_s)
            if fallen < faults and is_due and self._inject(rows):
                fallen += 1
                next_rows, last_at = fallen * prompts / faults * 0.9, time.monotonic()
            time.sleep(0.05)

    def _inject(self, rows: int) -> bool:
        """Let the next fault of the deck fall that can hit something; False when none can."""
        if not self._deck:
            self._deck = list(FAULTS)
            self.draw.shuffle(self._deck)
        for place, fault in enumerate(self._deck):
            try:
                has_hit = fault(self._stage, self._jobs)
            except (redis.RedisError, HeadraceError, psutil.NoSuchProcess):
                continue  # what it would use is down already
            if has_hit:
                del self._deck[place]
                self.counts[fault.__name__] += 1
                print(f"{time.strftime('%X')} fault {sum(self.counts.values())}: {fault.__name__}, {rows} rows", flush=True)
                return True
        self._deck = []
        return False

    def _submit(self, job: Job) -> None:
        submit = self._stage.client.submit
        job.reply = self._stage.senders.submit(submit, job.prompts, WISH, priority=job.priority)

    def _look(self) -> int:
        """Return how many rows there are, as far as the database can be asked."""
        for job in self._jobs:
            if not job.is_over and job.batch_id is not None:
                with contextlib.suppress(HeadraceError):
                    batch = self._stage.service.store.get_batch(job.batch_id)
                    job.done, job.is_over = batch.counts.done, batch.status.is_terminal
        return sum(job.done for job in self._jobs)

    def _calm_down(self, patience_s: float) -> None:
        """Heal everything and wait until every batch is over and nothing is left in Redis."""
        self._stage.heal_all()
        deadline = time.monotonic() + patience_s
        while True:
            self._stage.tick()
            self._look()
            open_ones = [(job.batch_id, job.done, len(job.prompts)) for job in self._jobs if not job.is_over]
            left = self._stage.left_in_redis()
            if not open_ones and not left:
                return
            assert time.monotonic() < deadline, f"not over after {patience_s} s: {open_ones}, messages in Redis: {left}"
            time.sleep(0.1)

    def _judge(self) -> dict[str, Any]:
        """The oracle."""
        computed, total, cancelled = 0, 0, 0
        assert len({job.batch_id for job in self._jobs}) == len(self._jobs)
        stored = sum(1 for _ in self._stage.client.list(page_size=100))
        assert stored == 2 * len(self._jobs), "a repeated submission made a second batch"
        for job in self._jobs:
            rows = self._stage.service.assert_exactly_once(str(job.batch_id), len(job.prompts))
            batch = self._stage.service.store.get_batch(str(job.batch_id))
            was_cancelled = job.may_be_cancelled and batch.status is BatchStatus.CANCELLED
            assert was_cancelled or batch.status is BatchStatus.COMPLETED
            for row, wanted in zip(rows, job.wanted, strict=True):
                if was_cancelled and row.error is not None and row.error.code == "batch_cancelled":
                    continue
                assert _substance(row) == _substance(wanted), f"index {row.index} of {job.batch_id} has another answer"
                computed += bool(job.prompts[row.index])
            total += len(rows)
            cancelled += was_cancelled
        assert self._stage.service.store.count_in_flight(model=self._stage.settings.model) == 0
        counts = {"rows": total, "lost": 0, "doubled": 0, "batches_cancelled": cancelled}
        if self._stage.engine != "echo":  # the real one keeps no tally
            return counts
        marks = Counter(self._stage.tally.read_bytes())
        return {
            **counts,
            "answered_again_pct": round(100 * (marks[ord("a")] / computed - 1), 2),
            "started_again_pct": round(100 * (marks[ord("s")] / computed - 1), 2),
        }


def _substance(row: Completion) -> Completion:
    """Return the row without what differs from run to run: times, and what was found in a cache."""
    usage = dataclasses.replace(row.usage, cached_tokens=0)
    return dataclasses.replace(row, usage=usage, queue_ms=0.0, run_ms=0.0, attempts=0)
