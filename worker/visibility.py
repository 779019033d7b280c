"""Keeps Redis from delivering a chunk a second time while this worker is still at it.

Celery's Redis transport remembers each delivered message with its time in a sorted set, and delivers whatever is older than the
visibility timeout again, to anybody. That timeout is short here, so that a killed worker's chunks come back soon; so a living
worker renews the times of the messages it holds. The set and the tags are kombu's: kombu is pinned below 5.8 for this module.
"""

from __future__ import annotations

import time
from typing import Any

import redis

from headrace.broker import KEY_PREFIX
from headrace.errors import QueueUnavailable


class VisibilityRenewer:
    """Renews the delivery times of one consumer's messages. `renew` is called from a chore's thread."""

    def __init__(self, redis_url: str) -> None:
        """`redis_url` is the broker's."""
        # A connection of its own: the consumer's belong to Celery's event loop.
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=3)
        # Set by `follow` each time the consumer (re)connects.
        self._channel: Any = None

    def follow(self, channel: Any) -> None:
        """Renew the messages of this kombu channel from now on; None: of none."""
        self._channel = channel

    def renew(self) -> int:
        """Give every message in hand the present time; return how many there are. Raise `QueueUnavailable` when Redis is away."""
        channel = self._channel
        if channel is None:
            return 0
        tags = _keys(channel.qos._delivered)  # noqa: SLF001  # kombu offers no other way
        if not tags:
            return 0
        # XX: a message acknowledged a moment ago must not come back into the index.
        try:
            self._redis.zadd(KEY_PREFIX + channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
        except (redis.RedisError, OSError) as error:
            raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({error})") from error
        return len(tags)

    def close(self) -> None:
        """Close the connection."""
        self._channel = None
        self._redis.close()


def _keys(mapping: Any) -> list[str]:
    """Copy the keys of a dict that the event loop may change at the same time."""
    while True:
        try:
            return list(mapping)
        except RuntimeError:  # it changed while it was copied
            continue
