"""Celery's consumer, made to live through every loss of Redis.

kombu 5.7 tears a broken connection down in an order that now and then leaves a channel without its connection (seen once in some
thirty losses of Redis): closing that channel, or acknowledging a message of it afterwards, raises AttributeError, which Celery takes
for a bug and ends the worker: minutes of loading a model for a Redis that was away for a second. Here it counts as what it is, a lost
connection: the message is delivered again, and the claim on its chunk refuses it.

An error that Redis replies with ends Celery's worker, too: "out of memory" from one that is full, "read only" from one that has just
become a replica. Both pass, and a new connection finds out when. Celery and kombu are pinned below 5.8 for this module.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import redis
from celery.worker.consumer import Consumer

log = logging.getLogger(__name__)


class SteadyConsumer(Consumer):
    """Reconnects where Celery's own would end the process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take these for a lost connection, in the event loop and in an acknowledgement."""
        super().__init__(*args, **kwargs)
        self.connection_errors: tuple[type[BaseException], ...] = (
            *self.conninfo.connection_errors,
            AttributeError,
            redis.ResponseError,
        )

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes; a Redis that was away for minutes is found within three seconds of its return."""
        # Celery's own pause grows to half a minute.
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=0.5, interval_step=0.5, interval_max=3)
        return super().ensure_connected(conn)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Let go of the broken connection, whatever state it is in."""
        try:
            super().on_connection_error_after_connected(exc)
        except (*self.connection_errors, *self.channel_errors) as error:
            self.connection = None
            log.warning(
                "the broken connection to Redis could not be closed in order (%r); a new one is made", error,
                extra={"event": "connection_dropped"},
            )  # fmt: skip
