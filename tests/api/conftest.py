"""A server with a real SQLite store and a real Redis; no worker: the tests answer batches by hand."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from live_api import LiveApi
from servers import RedisServer
from sqlalchemy import delete
from store_driver import execute

from headrace.broker import Broker, make_celery
from headrace.settings import Settings
from headrace.store import Store
from headrace.store.tables import batches, files, workers


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def settings(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        models="echo,org/other",
        database_url=f"sqlite:///{tmp_path_factory.mktemp('api')}/headrace.db",
        redis_url=redis_server.url,
        max_body_bytes=24 * 1024 * 1024,
        max_prompts=30_000,
        dispatch_window=8,
        chunk_size=16,
        reconcile_interval_s=1.0,
    )


@pytest.fixture(scope="session")
def one_store(settings: Settings) -> Iterator[Store]:
    with Store(settings.database_url, create=True) as store:
        yield store


@pytest.fixture(scope="session")
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(make_celery(settings))
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def one_api(settings: Settings, one_store: Store, broker: Broker) -> Iterator[LiveApi]:
    """One server for the session: starting and draining one for each test would take most of the time."""
    with LiveApi(settings, store=one_store, broker=broker) as live:
        yield live


@pytest.fixture
def store(one_store: Store, redis_server: RedisServer) -> Store:
    """The server's store, emptied, and its Redis too."""
    redis_server.start()
    redis_server.flush()
    for table in (batches, files, workers):
        execute(one_store, delete(table))
    return one_store


@pytest.fixture
def api(one_api: LiveApi, store: Store) -> LiveApi:
    """The server, with nothing in its store."""
    return one_api


@pytest.fixture
def http(api: LiveApi) -> Iterator[httpx.Client]:
    with api.http() as client:
        yield client
