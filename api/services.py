"""What a request handler needs: the settings, the store and the broker, opened when first used.

Nothing is opened at import or at start: a service that starts before its database answers 503 until it is there, and no
handler knows SQL or Celery.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final, Literal

from fastapi import Depends, Request

from headrace.broker import Broker, dispatch, make_celery
from headrace.errors import HeadraceError
from headrace.settings import Settings

if TYPE_CHECKING:
    from headrace.store import Store

log = logging.getLogger(__name__)

KEYS_SEEN_S: Final = 1.0
"""How long an open door stays open after the first key was made: a look into the database for each request would cost more than this."""


class Services:
    """One for each application; shared by all request threads."""

    def __init__(self, settings: Settings, *, store: Store | None = None, broker: Broker | None = None) -> None:
        """`store` and `broker` given here stay the caller's to close; others are opened from `settings` and closed here."""
        self.settings = settings
        self.started_at = int(time.time())
        self._lock = threading.Lock()
        self._store = store
        self._broker = broker
        self._owns_store = store is None
        self._owns_broker = broker is None
        self.wake_readers: Callable[[], None] = lambda: None
        """Tells the readers of files that there is something to do for them. Set by the application."""
        # What was true once stays true; what was not is looked up again.
        self._asks_for_keys = False
        self._look_for_keys_at = 0.0

    @property
    def store(self) -> Store:
        """The store; the first use opens it. Raises `StoreUnavailable`; the next use tries again."""
        if self._store is None:
            from headrace.store import open_store

            # Outside the lock: while the database is away every request would wait for the one before it to give up.
            opened = open_store(self.settings.database_url)
            with self._lock:
                if self._store is None:
                    self._store = opened
                    return opened
            opened.close()
        return self._store

    @property
    def broker(self) -> Broker:
        """The way into Redis; nothing is connected before something is sent."""
        with self._lock:
            if self._broker is None:
                self._broker = Broker(make_celery(self.settings))
            return self._broker

    def asks_for_keys(self) -> bool:
        """Whether a caller needs a key: the operator set one, or made one. The first key shuts the door within `KEYS_SEEN_S`."""
        if not self._asks_for_keys and time.monotonic() >= self._look_for_keys_at:
            self._asks_for_keys = bool(self.settings.api_key) or self.store.keys.any()
            self._look_for_keys_at = time.monotonic() + KEYS_SEEN_S
        return self._asks_for_keys

    def check_room(self) -> None:
        """Raise `StorageFull` before anything is stored that the database has no room for."""
        self.store.check_room(max_bytes=self.settings.max_database_bytes, min_free_bytes=self.settings.min_free_bytes)

    def send_chunks(self, *, model: str) -> Literal["sent", "unavailable"]:
        """Send what fits into the model's window. Never raises: the batch is committed, and the reconciler sends what isn't sent here."""
        try:
            sent = dispatch(self.store, self.broker, self.settings, model)
        except HeadraceError as error:
            log.warning(
                "chunks of %s were not sent (%s); they are in SQL and the reconciler sends them when Redis is back",
                model,
                error.message,
                extra={"event": "dispatch_postponed", "model": model, "code": error.code},
            )
            return "unavailable"
        except Exception:
            # A 500 here would make the client send a batch again that is already stored.
            log.exception(
                "chunks of %s were not sent; the reconciler sends them",
                model,
                extra={"event": "dispatch_failed", "model": model},
            )
            return "unavailable"
        log.debug("sent %d chunks", sent, extra={"event": "chunks_sent", "model": model, "chunks": sent})
        return "sent"

    def hurry_workers(self) -> None:
        """Let workers hear of a cancel at once. Never raises for an outage of Redis: they find out by themselves."""
        try:
            self.broker.hurry()
        except HeadraceError as error:
            log.info("workers find out by themselves: %s", error.message, extra={"event": "hurry_unheard", "code": error.code})

    def close(self) -> None:
        """Close what was opened here."""
        if self._owns_broker and self._broker is not None:
            self._broker.close()
        if self._owns_store and self._store is not None:
            self._store.close()


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
"""Parameter type of a handler that needs the services."""
