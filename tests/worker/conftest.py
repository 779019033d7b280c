"""A worker without its process: a real SQLite store, a real Redis, and an engine that echoes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from echo_frontend import EchoFrontend
from outage_bench import OutageBench
from servers import RedisServer

from headrace.broker import Broker, make_celery
from headrace.settings import Settings
from headrace.store import Store
from worker.host import EngineHost
from worker.runtime import Runtime


@pytest.fixture
def settings(redis_server: RedisServer, tmp_path: Path) -> Settings:
    return Settings(
        model="echo",
        database_url=f"sqlite:///{tmp_path}/headrace.db",
        redis_url=redis_server.url,
        lease_s=30.0,
        flush_interval_s=0.05,
        reconcile_interval_s=3600.0,
        requeue_grace_s=0.2,
        dispatch_window=8,
        spool_dir=tmp_path / "spool",
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store(settings.database_url)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(make_celery(settings))
    yield broker
    broker.close()


@pytest.fixture
def engine() -> Iterator[EchoFrontend]:
    engine = EchoFrontend("echo", pause_s=0)
    yield engine
    engine.close()


@pytest.fixture
def make_runtime(settings: Settings, store: Store, broker: Broker) -> Iterator[Callable[..., Runtime]]:
    made = []

    def make(engine: EchoFrontend, **changes: object) -> Runtime:
        def load(on_event):
            engine._on_event = on_event
            return engine

        host = EngineHost(load, stall_s=settings.engine_stall_s)
        runtime = Runtime(
            dataclasses.replace(settings, **changes), store=store, broker=broker, host=host, name=f"gpu{len(made)}@test"
        )
        runtime.start()
        made.append(runtime)
        return runtime

    yield make
    for runtime in made:
        runtime.drain(0)
        runtime.close()


@pytest.fixture
def runtime(make_runtime: Callable[..., Runtime], engine: EchoFrontend) -> Runtime:
    return make_runtime(engine)


@pytest.fixture
def outage_bench(tmp_path: Path) -> Iterator[Callable[..., OutageBench]]:
    """Makes a claimed chunk whose recorder has a store that can be broken."""
    made: list[OutageBench] = []

    def make(*, rows: int) -> OutageBench:
        made.append(OutageBench(f"sqlite:///{tmp_path}/headrace.db", tmp_path / "spool", rows=rows))
        return made[-1]

    yield make
    for bench in made:
        bench.close()
