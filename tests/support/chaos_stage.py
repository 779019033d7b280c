"""A whole service of real processes for the chaos tests: Redis, a database, the API, workers with the echo engine or the real one.

Knows which processes are to live and starts anew what has died; what harms them is in chaos_faults.py.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import redis
from servers import PostgresServer, RedisServer, free_port
from service import Service
from worker_process import QUICK, HeadraceProcess, wait_for

from headrace.broker import KEY_PREFIX, queue_name
from headrace.client import Client
from headrace.settings import Settings

CHUNK = 16


class Stage:
    """Used as a context manager; workers run from `start_workers` on, and `tick` has to be called all the time."""

    def __init__(self, folder: Path, *, database: str, draw: random.Random, workers: int, pause_s: float, engine: str) -> None:
        """`database`: 'postgres' or 'sqlite'; `engine`: 'echo', which takes `pause_s` for a prompt, or 'tiny', the real one."""
        self.folder = folder
        self.engine = engine
        self.draw = draw
        self.tally = folder / "tally"
        self.frozen: set[HeadraceProcess] = set()
        self.asked_to_end: set[HeadraceProcess] = set()
        self.senders = ThreadPoolExecutor(2, thread_name_prefix="chaos-sender")
        self._database = database
        self._worker_count = workers
        self._environ = {"ECHO_PAUSE_S": str(pause_s), "ECHO_TALLY": str(self.tally), "ECHO_DIES_ON_SIGUSR2": "1"}
        self._workers: list[HeadraceProcess] = []
        self._heals: list[tuple[float, int, Callable[[], object]]] = []
        self._ticket = itertools.count()
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.redis = stack.enter_context(RedisServer())
            self.postgres = stack.enter_context(PostgresServer()) if self._database == "postgres" else None
            url = f"sqlite:///{self.folder}/headrace.db"
            if self.postgres is not None:
                self.postgres.execute("CREATE DATABASE headrace")
                url = self.postgres.url("headrace")
            self.settings = Settings(
                database_url=url, redis_url=self.redis.url, home=self.folder, **self._model(),
                **{**QUICK, "chunk_size": CHUNK, "dispatch_window": 24},
            )  # fmt: skip
            self.service = Service(self.settings, self.folder)
            stack.callback(self.service.close)
            port = free_port()
            arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
            self.api = stack.enter_context(HeadraceProcess(arguments, self.settings, self.folder / "api.log"))
            self.client = stack.enter_context(Client(f"http://127.0.0.1:{port}", max_retries=40, timeout=30))
            wait_for(lambda: _answers(port), timeout_s=60, what="the API answers", process=self.api)
            stack.callback(self.senders.shutdown, wait=True, cancel_futures=True)
            stack.callback(self._end_workers)
            self._exits = stack.pop_all()
        return self

    def _model(self) -> dict[str, str]:
        if self.engine == "echo":
            return {"model": "echo", "engine_frontend": "echo_frontend:EchoFrontend"}
        from tiny_models import save_tiny_model
        from tiny_service import ENGINE

        return {"model": str(save_tiny_model(self.folder / "tiny")), "engine_config": json.dumps(dict(ENGINE))}

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def start_workers(self) -> None:
        for _ in range(self._worker_count):
            self._start_worker()

    def _start_worker(self) -> None:
        self._workers.append(self.service.worker(environ=self._environ).start())

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.__exit__()

    def pick_worker(self) -> HeadraceProcess | None:
        """Return a worker that can be harmed: one that has come as far as holding an engine, and is neither frozen nor ending."""
        able = [
            worker
            for worker in self._workers
            if worker not in self.frozen | self.asked_to_end and "worker_started" in worker.log_tail(10**7)
        ]
        return self.draw.choice(able) if able else None

    def later(self, lowest_s: float, highest_s: float, heal: Callable[[], object]) -> None:
        """End a fault's harm within these bounds."""
        heapq.heappush(self._heals, (time.monotonic() + self.draw.uniform(lowest_s, highest_s), next(self._ticket), heal))

    def tick(self) -> None:
        """Heal what is due, and replace workers that have ended. One that ended unasked is a failure."""
        while self._heals and self._heals[0][0] <= time.monotonic():
            heapq.heappop(self._heals)[2]()
        for worker in list(self._workers):
            assert worker.process is not None
            if worker.process.poll() is not None:
                assert worker in self.asked_to_end, f"a worker ended unasked\n{worker.log_tail()}"
                self._workers.remove(worker)
                self._start_worker()

    def heal_all(self) -> None:
        """End all harm now."""
        while self._heals:
            heapq.heappop(self._heals)[2]()

    @contextlib.contextmanager
    def link(self) -> Iterator[redis.Redis]:
        """A connection to Redis of one's own."""
        link = redis.Redis.from_url(self.redis.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            yield link
        finally:
            link.close()

    def left_in_redis(self) -> int:
        """Messages that wait or were not acknowledged."""
        with self.link() as link:
            waiting = link.llen(KEY_PREFIX + queue_name(self.settings.model))
            return int(waiting + link.hlen(KEY_PREFIX + "unacked") + link.zcard(KEY_PREFIX + "unacked_index"))


def _answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    return False
