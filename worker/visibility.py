"""Keeps Redis from delivering a chunk a second time while this worker is still at it.

Celery's Redis transport remembers each delivered message with its time in a sorted set, and delivers whatever is older than the
visibility timeout again, to anybody. That timeout is short here, so that a killed worker's chunks come back soon; so a living
worker renews the times of the messages it holds.

An acknowledgement that fails (its connection was reset) is given up by Celery: the message stays in the worker's hands though its task
is over, would be renewed for ever, and takes one of the worker's places; when all are taken, nothing is fetched any more. Such messages
are acknowledged here. The sets and the tags are kombu's and Celery's, which are pinned below 5.8 for this module.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import redis
from celery.worker import state

from headrace.broker import KEY_PREFIX
from headrace.errors import QueueUnavailable

log = logging.getLogger(__name__)


def unfinished() -> set[str]:
    """Return the delivery tags of the messages whose tasks are waiting or running in this process."""
    return {str(request.message.delivery_tag) for request in _copy(state.reserved_requests)}


class VisibilityRenewer:
    """Renews the delivery times of one consumer's messages. `renew` is called from a chore's thread."""

    def __init__(self, redis_url: str, *, unfinished: Callable[[], set[str]] = unfinished) -> None:
        """`redis_url` is the broker's; `unfinished` tells the tags of the messages that are being worked on."""
        self._unfinished = unfinished
        # Tags without a task at the last renewal: a message that has just come in has none for a moment.
        self._idle: set[str] = set()
        # A connection of its own: the consumer's belong to Celery's event loop.
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=3)
        # Set by `follow` each time the consumer (re)connects.
        self._channel: Any = None

    def follow(self, channel: Any) -> None:
        """Renew the messages of this kombu channel from now on; None: of none."""
        self._channel = channel
        self._idle = set()

    def renew(self) -> int:
        """Give every message in hand the present time; return how many there are. Raise `QueueUnavailable` when Redis is away."""
        channel = self._channel
        if channel is None:
            return 0
        in_hand = set(_copy(channel.qos._delivered)) - set(_copy(channel.qos._dirty))  # noqa: SLF001  # kombu offers no other way
        idle = in_hand - self._unfinished()
        over, self._idle = idle & self._idle, idle
        tags = in_hand - over
        try:
            if over:
                self._acknowledge(channel, over)
            if tags:
                # XX: a message acknowledged a moment ago must not come back into the index.
                self._redis.zadd(KEY_PREFIX + channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
        except (redis.RedisError, OSError) as error:
            raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({error})") from error
        return len(tags)

    def _acknowledge(self, channel: Any, tags: Iterable[str]) -> None:
        """Do what an acknowledgement would have done."""
        with self._redis.pipeline() as pipe:
            pipe.zrem(KEY_PREFIX + channel.unacked_index_key, *tags)
            pipe.hdel(KEY_PREFIX + channel.unacked_key, *tags)
            pipe.execute()
        for tag in tags:
            channel.qos._quick_ack(tag)  # noqa: SLF001  # as above
            log.warning(
                "the acknowledgement of a message was lost with its connection; it is made up for",
                extra={"event": "ack_repeated"},
            )

    def close(self) -> None:
        """Close the connection."""
        self._channel = None
        self._redis.close()


def _copy(things: Iterable[Any]) -> list[Any]:
    """Copy a collection that the event loop may change at the same time."""
    while True:
        try:
            return list(things)
        except RuntimeError:  # it changed while it was copied
            continue
