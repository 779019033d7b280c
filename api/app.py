"""The application: `uvicorn api.app:app`, or `create_app(settings, store=…, broker=…)` where a caller brings its own.

Importing this module opens nothing and reads no environment: `app` is built when it is first asked for.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

from api import batches, docs, files, health, metrics, models, problems, results
from api.auth import require_key
from api.examples import problems as problem_responses
from api.file_batches import Readers
from api.middleware import BodyLimit, RequestContext
from api.services import Services
from api.upkeep import Upkeep
from headrace.errors import InvalidRequest
from headrace.log import configure
from headrace.settings import Settings, get_settings

if TYPE_CHECKING:
    from headrace.broker import Broker
    from headrace.store import Store

__all__ = ["create_app"]


def create_app(settings: Settings, *, store: Store | None = None, broker: Broker | None = None) -> FastAPI:
    """Return the application. A store or broker given here stays the caller's to close."""
    services = Services(settings, store=store, broker=broker)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        readers = Readers(services)
        services.wake_readers = readers.wake
        readers.start()
        upkeep = Upkeep(services)
        upkeep.start()
        yield
        # Side by side: each may have to wait for a database that doesn't answer.
        await asyncio.gather(run_in_threadpool(upkeep.close), run_in_threadpool(readers.close))
        services.close()

    # FastAPI's own /docs loads its scripts from a CDN, which many hosts that run this can't reach: docs.py serves a page of its own.
    app = FastAPI(
        title="headrace",
        version=docs.version(),
        summary="Prompt batches in, every answer out, exactly once.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.services = services
    problems.install(app)
    locked: dict[str, Any] = {"dependencies": [Depends(require_key)], "responses": problem_responses()}
    for router in (batches.router, results.router, files.router, models.router):
        app.include_router(router, **locked)
    app.include_router(health.router)
    app.include_router(metrics.router)
    docs.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_file_bytes=settings.max_file_bytes)
    app.add_middleware(RequestContext)
    return app


@cache
def _default_app() -> FastAPI:
    try:
        settings = get_settings()
    except InvalidRequest as error:
        # The command line of uvicorn is an operator's: a traceback would bury the setting's name.
        raise SystemExit(f"this API can't start: {error.message}") from None
    configure(settings.log_level)
    app = create_app(settings)
    _answer_quickly()
    return app


def _answer_quickly() -> None:
    """Keep one request's work from holding up the others: this process has one lock for all its threads.

    What is loaded stays; looking through all of it for garbage took 70 ms of every few thousand prompts that were stored, in which
    nothing was answered. And a thread that stores prompts gives the lock up after 1 ms, not 5: a status takes it some five times.
    """
    import headrace.store  # noqa: F401  # otherwise loaded with the first request, behind the freeze

    gc.collect()
    gc.freeze()
    sys.setswitchinterval(1e-3)


def __getattr__(name: str) -> FastAPI:
    """Build `app` for `uvicorn api.app:app`."""
    if name != "app":
        raise AttributeError(f"module 'api.app' has no attribute {name!r}")
    return _default_app()
