"""Fixtures that every room's tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: spinning OpenMP threads on a busy two-core machine make everything up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from headrace.log import ROOMS

if TYPE_CHECKING:
    from servers import PostgresServer, RedisServer

    from headrace.store import Store


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random llama with a chat template, as a Hugging Face directory."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    """The session's Redis, for tests that look after its state themselves."""
    from servers import RedisServer

    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(redis_process: RedisServer) -> Iterator[RedisServer]:
    """A running, empty Redis (`.url`); the test may kill, pause and restart it."""
    redis_process.resume()
    redis_process.start()
    redis_process.flush()
    yield redis_process
    redis_process.resume()


@pytest.fixture(scope="session")
def postgres_process() -> Iterator[PostgresServer]:
    """The session's PostgreSQL, for tests that look after its state themselves."""
    from servers import PostgresServer

    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_server(postgres_process: PostgresServer) -> Iterator[PostgresServer]:
    """A running PostgreSQL; the test may kill, pause and restart it."""
    postgres_process.resume()
    postgres_process.start()
    yield postgres_process
    postgres_process.resume()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty database, dropped after the test."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, of each kind in turn."""
    return f"sqlite:///{tmp_path / 'headrace.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A migrated, empty store, of each kind in turn."""
    from headrace.store import Store

    with Store(store_url, create=True) as store:
        yield store


@pytest.fixture(autouse=True)
def _fresh_logging() -> None:
    """Undo what `pipeline()` and the commands set before: at level ERROR this test would see no warning."""
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(logging.NOTSET)
        logger.handlers.clear()
        logger.propagate = True
