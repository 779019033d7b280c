"""Waiting for a database that is away. Only what can heal by itself is waited for: a wrong query fails at once."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from headrace.errors import StorageFull, StoreUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
HEALS = (StoreUnavailable, StorageFull)
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


class Outage:
    """What one process knows of its store's absence: who waits for it now."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._lock = threading.Lock()
        self._waiting = 0

    @property
    def is_on(self) -> bool:
        """Whether somebody's call has failed and waits for the store to come back."""
        return self._waiting > 0

    def ride_out(self, call: Callable[[], T], *, what: str, give_up: Callable[[], bool] = lambda: False) -> T:
        """Call until the store answers, with a growing pause between; return what it returned.

        `what` says in the log what waits. Raise the store's error once `give_up()` is true, and any other error at once.
        """
        try:
            return call()
        except HEALS as error:
            if give_up():
                raise
            log.warning(
                "the store does not answer (%s); %s waits and is tried again until it does", error.message, what,
                extra={"event": "store_outage", "waiting": what, "code": error.code},
            )  # fmt: skip
        since = time.monotonic()
        self._count(1)
        try:
            result = _insist(call, give_up)
        finally:
            self._count(-1)
        away_s = time.monotonic() - since
        log.warning(
            "the store answers again after %.1f s; %s went through", away_s, what,
            extra={"event": "store_back", "waiting": what, "away_s": away_s},
        )  # fmt: skip
        return result

    def _count(self, change: int) -> None:
        with self._lock:
            self._waiting += change


def _insist(call: Callable[[], T], give_up: Callable[[], bool]) -> T:
    pause = FIRST_PAUSE_S
    while True:
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, so that workers don't return in step
        pause = min(pause * 2, LONGEST_PAUSE_S)
        try:
            return call()
        except HEALS:
            if give_up():
                raise
