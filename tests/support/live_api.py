"""A real uvicorn on loopback in a thread of the test, and a hand that answers batches as a worker would."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, Self

import httpx
import uvicorn
from store_driver import answer

from api.app import create_app
from headrace.settings import Settings
from headrace.store import Store


class LiveApi:
    """Serves `create_app(settings, …)` on a free port while the context is open."""

    def __init__(self, settings: Settings, **parts: Any) -> None:
        config = uvicorn.Config(
            create_app(settings, **parts), host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert self._thread.is_alive(), "uvicorn ended at its start"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        self.url = "http://127.0.0.1:%d" % self._server.servers[0].sockets[0].getsockname()[1]  # noqa: UP031
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def http(self, **options: Any) -> httpx.Client:
        """Return a plain HTTP client for this server."""
        return httpx.Client(base_url=self.url, timeout=30, **options)


def work(store: Store, *, model: str = "echo", only: Iterable[int] | None = None, failing: Iterable[int] = ()) -> None:
    """Claim every chunk that is due and answer it: all of it, or the indexes in `only` (the chunk stays claimed)."""
    bad = set(failing)
    for ref in store.next_chunks(model=model, limit=100_000, grace_s=0):
        claim = store.claim_chunk(ref.chunk_id, worker="hand", lease_s=60)
        assert claim is not None
        wanted = [item.index for item in store.pending(claim) if only is None or item.index in only]
        store.record(claim, [answer(i, error="engine_error" if i in bad else None) for i in wanted])
        if only is None:
            assert store.finish_chunk(claim)
