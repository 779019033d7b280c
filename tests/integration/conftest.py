"""Real processes: redis-server, a database, workers. Each test says which database it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import RedisServer
from service import Service
from worker_process import QUICK

from headrace.settings import Settings


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/headrace.db"


@pytest.fixture
def make_service(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(database_url: str, **changes: object) -> Service:
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
