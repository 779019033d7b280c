"""The ground on which the fault tests stand: a Redis, a database, the real worker processes, and the oracle.

A fault module is `tests/support/fault_NN_name.py` with

    TITLE: str
    def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]

which raises AssertionError where the promise was broken and returns its counts. `tests/chaos/fault.py NN` runs it; `long` is the size
of the record, not `long` the one of every test run. Servers are started once for each process of tests and shared by its faults.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import redis
from echo_frontend import answer
from proxy import Proxy
from servers import PostgresServer, RedisServer
from service import Service
from sqlalchemy import func, select
from store_driver import check
from worker_process import QUICK, HeadraceProcess, wait_for

from headrace.batch import BatchStatus
from headrace.broker import KEY_PREFIX, queue_name
from headrace.completion import Completion
from headrace.settings import Settings
from headrace.store import ChunkState
from headrace.store.tables import chunks

SUPPORT = Path(__file__).resolve().parent
MODEL = "echo"
Say = Callable[[str], None]


def discover() -> dict[str, str]:
    """Return the module of each fault test by its number, as '01'."""
    found = {path.stem[6:8]: path.stem for path in sorted(SUPPORT.glob("fault_[0-9][0-9]_*.py"))}
    return {number: module for number, module in found.items() if re.fullmatch(r"fault_\d\d_[a-z0-9_]+", module)}


def load(number: str) -> ModuleType:
    """Return the module of a fault test."""
    return importlib.import_module(discover()[number])


@cache
def redis_of_this_process() -> RedisServer:
    """A Redis that lives as long as this process."""
    server = RedisServer()
    server.start()
    atexit.register(server.__exit__)
    return server


@cache
def postgres_of_this_process() -> PostgresServer:
    """A PostgreSQL that lives as long as this process."""
    server = PostgresServer()
    server.folder.chmod(0o711)  # it may run as another user
    server.start()
    atexit.register(server.__exit__)
    return server


class Ground:
    """Redis, a database and a service on them, whose workers echo. Made by `ground`."""

    def __init__(self, settings: Settings, folder: Path, redis_server: RedisServer, postgres: PostgresServer | None) -> None:
        self.settings = settings
        self.folder = folder
        self.redis = redis_server
        self.postgres = postgres
        self.tally = folder / "tally"
        self.tally.touch()
        self.service = Service(settings, folder)
        self.exits = contextlib.ExitStack()
        self.mixes_releases = False
        """Whether some of the workers are of another release."""

    def worker(
        self, *, pause_s: float = 0.0, concurrency: int = 4, environ: dict[str, str] | None = None, **changes: Any
    ) -> HeadraceProcess:
        """Start a worker whose engine takes `pause_s` for a prompt; it is killed at the end, whatever happens."""
        echo = {"ECHO_PAUSE_S": str(pause_s), "ECHO_TALLY": str(self.tally)}
        worker = self.service.worker(concurrency=concurrency, environ={**echo, **(environ or {})}, **changes)
        return self.exits.enter_context(worker)

    @contextlib.contextmanager
    def link(self, timeout_s: float = 5) -> Iterator[redis.Redis]:
        """A connection to Redis of one's own, by no proxy."""
        link = redis.Redis.from_url(self.redis.url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        try:
            yield link
        finally:
            link.close()

    def chunks_of(self, worker: HeadraceProcess) -> dict[str, int]:
        """Return the chunks that a worker holds by their ids, with the epoch of its claim."""
        query = select(chunks.c.id, chunks.c.epoch).where(
            chunks.c.state == ChunkState.LEASED, chunks.c.worker.contains(f"#{worker.pid}-")
        )
        return dict(self.service.store._database.read(lambda connection: connection.execute(query).all()))  # type: ignore[arg-type]

    def still_held(self, held: dict[str, int]) -> set[str]:
        """Return those of `chunks_of` that are neither another claim's by now nor over."""
        query = select(chunks.c.id, chunks.c.epoch).where(chunks.c.id.in_(held), chunks.c.state.in_(("leased", "queued")))
        rows = self.service.store._database.read(lambda connection: connection.execute(query).all())
        return {row.id for row in rows if held[row.id] == row.epoch}

    def wait_over(self, *batch_ids: str, timeout_s: float) -> None:
        """Wait until the batches are over and nothing of them is left in Redis."""
        for batch_id in batch_ids:
            self.service.wait_over(batch_id, timeout_s=timeout_s)
        wait_for(lambda: self.left_in_redis() == 0, timeout_s=timeout_s, what="no message is left in Redis", every_s=0.2)

    def left_in_redis(self) -> int:
        """Messages that wait or were not acknowledged."""
        with self.link() as link:
            waiting = link.llen(KEY_PREFIX + queue_name(self.settings.model))
            return int(waiting + link.hlen(KEY_PREFIX + "unacked") + link.zcard(KEY_PREFIX + "unacked_index"))

    def judge(self, batch_id: str, prompts: Sequence[Any]) -> dict[str, int]:
        """The oracle: the batch is over, every row is the one of a run without faults, counters are a recount, no lease is left."""
        rows = self.service.assert_exactly_once(batch_id, len(prompts))
        batch = check(self.service.store, batch_id, mixes_releases=self.mixes_releases)
        assert batch.status is BatchStatus.COMPLETED, batch
        for prompt, row in zip(prompts, rows, strict=True):
            assert substance(row) == substance(answer(prompt, index=row.index)), f"index {row.index} has another answer"
        assert self.service.store.count_in_flight(model=self.settings.model) == 0, "a lease is left"
        return {"rows": len(rows), "lost": 0, "doubled": 0, "failed": batch.counts.failed}

    def computed(self) -> tuple[int, int]:
        """Return how many prompts were given to engines so far, and how many engines answered."""
        marks = Counter(self.tally.read_bytes())
        return marks[ord("s")], marks[ord("a")]

    def again_pct(self, rows: int) -> dict[str, float]:
        """Return how much was computed more than once: prompts given to an engine again, answers given again."""
        started, answered = self.computed()
        return {
            "started_again_pct": round(100 * (started / rows - 1), 2),
            "answered_again_pct": round(100 * (answered / rows - 1), 2),
        }

    def close(self) -> None:
        self.exits.close()
        self.service.close()


@contextlib.contextmanager
def ground(
    *,
    database: str = "postgres",
    redis_server: RedisServer | None = None,
    redis_proxy: Proxy | None = None,
    database_proxy: Proxy | None = None,
    **changes: Any,
) -> Iterator[Ground]:
    """Make a ground with an empty Redis and an empty database ('postgres' or 'sqlite'); `changes` are settings.

    `redis_server`: one of the fault's own, else the process's. Workers go through the proxies; the test itself goes straight.
    """
    server = redis_server or redis_of_this_process()
    server.resume()
    server.start()
    server.flush()
    folder = Path(tempfile.mkdtemp(prefix="headrace-fault-"))
    folder.chmod(0o711)
    with contextlib.ExitStack() as stack:
        postgres = postgres_of_this_process() if database == "postgres" else None
        if postgres is None:
            url = f"sqlite:///{folder}/headrace.db"
        else:
            postgres.resume()
            postgres.start()
            url = stack.enter_context(postgres.database())
        settings = Settings(
            model=MODEL, engine_frontend="echo_frontend:EchoFrontend", database_url=url, redis_url=server.url, home=folder,
            **{**QUICK, "chunk_size": 16, **changes},
        )  # fmt: skip
        made = Ground(settings, folder, server, postgres)
        stack.callback(made.close)
        ways = {"redis_url": redis_proxy, "database_url": database_proxy}
        through = {name: proxy.url(getattr(settings, name)) for name, proxy in ways.items() if proxy is not None}
        made.service.settings = dataclasses.replace(settings, **through)
        try:
            yield made
        except BaseException:
            print(f"the logs of every process are in {folder}", flush=True)
            raise
    shutil.rmtree(folder, ignore_errors=True)


class Feed:
    """Keeps a service at work: another batch whenever few prompts are left, until `end`."""

    def __init__(self, field: Ground, *, size: int) -> None:
        self._field = field
        self._size = size
        self.batch_ids: list[str] = []
        self.tick()

    def tick(self) -> None:
        """Submit a batch if it is time."""
        batches = [self._field.service.store.get_batch(batch_id).counts for batch_id in self.batch_ids[-3:]]
        if sum(counts.total - counts.done for counts in batches) < self._size:
            # Sent by a worker: the broker may be away, for whoever tests that.
            self.batch_ids.append(self._field.service.submit(texts(self._size), send=False))

    def claims(self) -> int:
        """Return how many claims on chunks there were so far: this grows as soon as messages are taken and work begins."""
        query = select(func.sum(chunks.c.epoch))
        return int(self._field.service.store._database.read(lambda connection: connection.execute(query).scalar_one()))

    def done(self) -> int:
        """Return how many rows there are."""
        return sum(self._field.service.done(batch_id) for batch_id in self.batch_ids)

    def end(self, *, timeout_s: float) -> dict[str, int | float]:
        """Wait for all batches, judge them, and return the sum of their counts."""
        self._field.wait_over(*self.batch_ids, timeout_s=timeout_s)
        total: Counter[str] = Counter()
        for batch_id in self.batch_ids:
            total.update(self._field.judge(batch_id, texts(self._size)))
        return {**total, "batches": len(self.batch_ids), **self._field.again_pct(total["rows"])}


def texts(total: int) -> list[str]:
    """Return `total` prompts, each of its own length."""
    return [f"prompt {index} " + "wørd " * (index % 7) for index in range(total)]


def substance(row: Completion) -> Completion:
    """Return the row without what differs from run to run."""
    return dataclasses.replace(row, queue_ms=0.0, run_ms=0.0, attempts=0)


def rest(seconds: float, tick: Callable[[], object], *, every_s: float = 0.1) -> None:
    """Call `tick` again and again for a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tick()
        time.sleep(every_s)
