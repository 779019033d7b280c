"""Hears from the API, over Redis' publish and subscribe, that a batch was cancelled, so that the engine is free a step later.

Nothing rests on it: what is said while nobody listens is lost, and the lease keeper looks once a second by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

import redis

from headrace.broker import CHANNEL_LOOK

log = logging.getLogger(__name__)

PATIENCE_S: Final = 2.0
"""How long it waits for a word before it looks whether it is to end, and for Redis before it connects again."""


class Listener:
    """Calls something whenever a word comes. `start`, then `stop`."""

    def __init__(self, redis_url: str, call: Callable[[], None]) -> None:
        """`redis_url` is the broker's; `call` must return at once."""
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=3, health_check_interval=10)
        self._call = call
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-listener", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns before it has ended."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                log.debug("not listening for cancels: %s", error)
                self._stop.wait(PATIENCE_S)
        self._redis.close()

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(CHANNEL_LOOK)
            # What was said while nobody listened is made up for.
            self._call()
            while not self._stop.is_set():
                if channel.get_message(timeout=PATIENCE_S) is not None:
                    self._call()
