"""Real processes: redis-server, a database, workers. Each test says which database it wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import PostgresServer, RedisServer
from worker_process import QUICK, HeadraceProcess, wait_for, worker_process

from headrace.broker import Broker, dispatch, make_celery
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import Store


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


class Service:
    """One database, one Redis, and what a client needs to submit; workers are started by the test."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.store = Store(settings.database_url)
        self.store.migrate()
        self.broker = Broker(make_celery(settings))
        self._workers = 0

    def worker(self, *, concurrency: int = 4, environ: dict[str, str] | None = None, **changes: object) -> HeadraceProcess:
        """Return a worker process, not started."""
        self._workers += 1
        settings = dataclasses.replace(self.settings, **changes)
        name = f"gpu{self._workers}"
        return worker_process(settings, self.folder / f"{name}.log", name=name, concurrency=concurrency, environ=environ)

    def ready(self, worker: HeadraceProcess, *, timeout_s: float = 60) -> HeadraceProcess:
        """Wait until the worker has its model."""
        wait_for(
            lambda: any(f"#{worker.pid}-" in info.id for info in self.store.list_workers()),
            timeout_s=timeout_s,
            what="the worker is registered",
            process=worker,
        )
        return worker

    def submit(self, prompts: list, *, gen_config: GenerationConfig | None = None, send: bool = True, **options: object) -> str:
        """Store a batch and send its first chunks, as the API does."""
        options.setdefault("chunk_size", self.settings.chunk_size)
        batch = self.store.create_batch(prompts, gen_config or GenerationConfig(), model=self.settings.model, **options)
        if send:
            dispatch(self.store, self.broker, self.settings, self.settings.model)
        return batch.id

    def done(self, batch_id: str) -> int:
        return self.store.get_batch(batch_id).counts.done

    def wait_over(self, batch_id: str, worker: HeadraceProcess | None = None, *, timeout_s: float = 60):
        """Return the batch when it is over."""
        return wait_for(
            lambda: (batch := self.store.get_batch(batch_id)).status.is_terminal and batch,
            timeout_s=timeout_s,
            what=f"the batch is over, at {self.store.get_batch(batch_id).counts}",
            process=worker,
        )

    def assert_exactly_once(self, batch_id: str, total: int):
        """Check the oracle: one row for each index, in order, and counters that equal a recount. Return the rows."""
        rows = list(self.store.stream_results(batch_id))
        assert [row.index for row in rows] == list(range(total))
        batch = self.store.get_batch(batch_id)
        assert batch.counts.total == total
        assert batch.counts.failed == sum(row.error is not None for row in rows)
        assert batch.counts.completed == sum(row.error is None for row in rows)
        assert batch.usage.prompt_tokens == sum(row.usage.prompt_tokens for row in rows)
        assert batch.usage.completion_tokens == sum(row.usage.completion_tokens for row in rows)
        assert batch.usage.cached_tokens == sum(row.usage.cached_tokens for row in rows)
        return rows

    def close(self) -> None:
        self.broker.close()
        self.store.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/headrace.db"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        with server.database() as url:
            yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/headrace.db"


@pytest.fixture
def make_service(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(database_url: str, **changes: object) -> Service:
        redis_server.start()
        redis_server.flush()
        settings = Settings(database_url=database_url, redis_url=redis_server.url, home=tmp_path, **{**QUICK, **changes})
        made.append(Service(settings, tmp_path))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def echo_service(make_service: Callable[..., Service]) -> Callable[..., Service]:
    """A service whose workers answer with an echo after ECHO_PAUSE_S: for faults of everything around an engine."""

    def make(database_url: str, **changes: object) -> Service:
        return make_service(
            database_url, model="echo", engine_frontend="echo_frontend:EchoFrontend", **{"chunk_size": 16, **changes}
        )

    return make
