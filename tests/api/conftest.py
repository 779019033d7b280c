"""A server with a real SQLite store and a real Redis; no worker: the tests answer batches by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_api import LiveApi
from servers import RedisServer

from headrace.broker import Broker, make_celery
from headrace.settings import Settings
from headrace.store import Store


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def settings(redis_server: RedisServer, tmp_path: Path) -> Settings:
    redis_server.start()
    redis_server.flush()
    return Settings(
        models="echo,org/other",
        database_url=f"sqlite:///{tmp_path}/headrace.db",
        redis_url=redis_server.url,
        max_body_bytes=24 * 1024 * 1024,
        max_prompts=30_000,
        dispatch_window=8,
        chunk_size=16,
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with Store(settings.database_url, create=True) as store:
        yield store


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(make_celery(settings))
    yield broker
    broker.close()


@pytest.fixture
def api(settings: Settings, store: Store, broker: Broker) -> Iterator[LiveApi]:
    with LiveApi(settings, store=store, broker=broker) as live:
        yield live


@pytest.fixture
def http(api: LiveApi) -> Iterator[httpx.Client]:
    with api.http() as client:
        yield client
