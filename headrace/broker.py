"""The contract between who sends work and who does it: the Celery app's settings, names, and how chunks enter Redis.

Redis carries work, SQL carries truth: whatever is lost here is sent again by `dispatch`, and whatever arrives twice is refused by
the claim on its chunk. What is in Redis, under the prefix `headrace:`:

    generate.<model>     list of chunk messages that wait; at most `dispatch_window` for each model, or a quarter as many as are worked on
    unacked              hash of delivery tag to message: delivered to a worker, not acknowledged yet
    unacked_index        sorted set of delivery tag by time of delivery, which the worker renews while it works on the chunk

This module knows no SQL, no HTTP and no engine.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import redis
from celery import Celery
from kombu.exceptions import KombuError
from kombu.exceptions import OperationalError as BrokerError

from headrace.crash import crash_point
from headrace.errors import InvalidRequest, NotFound, QueueUnavailable
from headrace.store.values import ChunkRef

if TYPE_CHECKING:
    from headrace.settings import Settings
    from headrace.store import ChunkMessage, Store

log = logging.getLogger(__name__)

TASK_GENERATE: Final = "headrace.generate"
TASK_RECONCILE: Final = "headrace.reconcile"
KEY_PREFIX: Final = "headrace:"
CHANNEL_LOOK: Final = f"{KEY_PREFIX}look"
"""Published to: workers look at once which of their chunks were cancelled."""
POINTER_VERSION: Final = 0
"""The version of a message that carries no prompts."""
SEND_GROUP: Final = 8
"""Chunks that are marked as sent before they are: so many wait for their grace to pass when the sender dies between the two."""

_NEVER_S: Final = 1e9
_PUBLISH_RETRY = {"max_retries": 2, "interval_start": 0.0, "interval_step": 0.1, "interval_max": 0.2}
_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}.items()
    if hasattr(socket, name)  # not everywhere
}
_OUTAGE = (BrokerError, KombuError, redis.RedisError, OSError)


def queue_name(model: str) -> str:
    """Return the queue of one model: its name where that is plain, else its end and a hash, so that two paths never meet."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-")[-40:]
    if slug != model:
        slug = f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return f"generate.{slug}"


def make_celery(settings: Settings) -> Celery:
    """Return the Celery app that the api, the worker and Flower all use; its default queue is the one of `settings.model`.

    Sender and receiver must agree on the visibility timeout (the shortest of all who share a Redis wins), so nobody makes
    a Celery app in another way. Nothing is connected yet.
    """
    app = Celery("headrace", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        task_default_queue=queue_name(settings.model),
        task_serializer="json",
        accept_content=["json"],
        # Results are rows in SQL; a result backend would keep them a second time, in Redis.
        result_backend=None,
        task_ignore_result=True,
        # A message is acknowledged when its chunk's rows are committed; a worker that dies before that is redelivered to.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # Threads: cancelling tasks when the connection is lost is impossible, and the claim on the chunk outlives it.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # A worker takes no chunk before it has a thread for it: fewer hostages when it dies, and fair shares between workers.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=settings.worker_concurrency,
        worker_hijack_root_logger=False,
        # Each thread of a worker tells its progress now and then, and waits where it finds no connection.
        broker_pool_limit=settings.worker_concurrency + 8,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_publish_retry=True,
        task_publish_retry_policy=_PUBLISH_RETRY,
        worker_send_task_events=True,
        task_send_sent_event=False,  # would add one 'worker' to Flower for each process that sends
        event_queue_expires=60,
        broker_transport_options=_transport_options(settings),
        visibility_timeout=settings.visibility_timeout_s,
    )
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    sweep_s = max(1, min(5, int(settings.visibility_timeout_s / 4)))
    return {
        "visibility_timeout": settings.visibility_timeout_s,
        # By default Redis is searched for overdue messages every 100 s only, and a worker killed while it searches
        # keeps the others from it for 300 s.
        "unacked_restore_interval": sweep_s,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        # Without a timeout a send to a peer that vanished hangs for ever. The event loop may meet several such connections in a
        # row (heartbeat, acknowledgements), each for so long.
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        # A peer that vanished without a word is noticed within 26 s: by TCP, and behind a box that still answers for it by
        # the reply to BRPOP that is overdue (health_check_interval).
        "socket_keepalive_options": _KEEPALIVE,
        "health_check_interval": 10,
        "global_keyprefix": KEY_PREFIX,
        "client_name": "headrace",
        # A sender's own connect: without a bound a REST request would wait for Redis for ever.
        **_PUBLISH_RETRY,
    }


class Broker:
    """Sends chunks. One for each process, used from any thread: it keeps a small pool of connections.

    Every method raises `QueueUnavailable` when Redis can't be reached.
    """

    def __init__(self, app: Celery) -> None:
        """Keep `app` (from `make_celery`); nothing is connected yet."""
        self.app = app
        self._redis = redis.Redis.from_url(str(app.conf.broker_url), socket_timeout=5, socket_connect_timeout=3)

    def enqueue(self, message: ChunkMessage | ChunkRef) -> None:
        """Put one chunk into its model's queue: its message, or a pointer that a worker reads from SQL.

        What an operator sees of it in Flower names no prompt.
        """
        chunk = {"version": POINTER_VERSION, **asdict(message)} if isinstance(message, ChunkRef) else message.to_dict()
        try:
            self.app.send_task(
                TASK_GENERATE,
                kwargs={"chunk": chunk},
                queue=queue_name(message.model),
                argsrepr=describe(message),
                kwargsrepr="",
                ignore_result=True,
            )
        except _OUTAGE as error:
            raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({error})") from error

    def count_waiting(self, model: str) -> int:
        """Return how many messages wait in the model's queue (not those that a worker holds)."""
        try:
            return int(self._redis.llen(KEY_PREFIX + queue_name(model)))
        except _OUTAGE as error:
            raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({error})") from error

    def hurry(self) -> None:
        """Ask every worker to look now which of its chunks were cancelled; those that don't hear it look within a second anyway."""
        try:
            self._redis.publish(CHANNEL_LOOK, "")
        except _OUTAGE as error:
            raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({error})") from error

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self.app.close()


def describe(message: ChunkMessage | ChunkRef) -> str:
    """Return one line for operators, such as `batch_1f0c… chunk 3/40 rows 128-191 · 64 prompts · smollm2`."""
    rows = f"{message.start}-{message.stop - 1}"
    return f"{message.batch_id[:14]}… chunk {message.number}/{message.of} rows {rows} · {message.stop - message.start} prompts · {message.model}"


def dispatch(store: Store, broker: Broker, settings: Settings, model: str) -> int:
    """Send the chunks of `model` that are due, as far as its window has room; return how many were sent.

    Called after a batch is committed, after each chunk, and by the reconciler; any number of callers at once do no harm.
    Raise `QueueUnavailable` or `StoreUnavailable`; the next call takes up the rest.
    """
    # First, so that nothing is marked as sent while Redis is away.
    waiting = broker.count_waiting(model)
    working = store.count_in_flight(model=model, grace_s=0)
    sent = _send_lost(store, broker, settings, model, waiting=waiting, working=working)
    # At least a quarter as many wait as run: however many workers there are, none comes for a chunk and finds nothing.
    room = max(settings.dispatch_window - working, working // 4) - waiting - sent
    return sent + _send(store, broker, model, limit=room, grace_s=_NEVER_S)


def _send_lost(store: Store, broker: Broker, settings: Settings, model: str, *, waiting: int, working: int) -> int:
    """Send what was sent and is nowhere, whether or not the window has room: new chunks would fill it up for ever."""
    if store.count_in_flight(model=model) - working <= waiting:
        return 0
    # A lapsed lease is none of these: its chunk is like one that was never sent.
    store.requeue_lost(model=model, grace_s=_NEVER_S)
    known = store.count_in_flight(model=model)
    # A chunk may wait in a busy queue for longer than any grace. Only as many are sent a second time as Redis holds too few:
    # else the queue would fill up with copies.
    overdue = known - store.count_in_flight(model=model, grace_s=settings.requeue_grace_s)
    lost = min(known - working - waiting, overdue, settings.dispatch_window)
    return _send(store, broker, model, limit=lost, grace_s=settings.requeue_grace_s)


def _message(store: Store, ref: ChunkRef) -> ChunkMessage | ChunkRef:
    """Return what to send for a chunk: a pointer where this release can't read its batch, which must not hold up the others."""
    try:
        return store.chunk_message(ref)
    except (InvalidRequest, KeyError, TypeError, ValueError) as error:
        log.warning(
            "chunk %s can't be read by this release (%s); a pointer to it is sent, for a worker of another", ref.chunk_id, error,
            extra={"event": "chunk_unreadable", "chunk_id": ref.chunk_id},
        )  # fmt: skip
        return ref


def _send(store: Store, broker: Broker, model: str, *, limit: int, grace_s: float) -> int:
    sent = 0
    while sent < limit:
        asked = min(limit - sent, SEND_GROUP)
        refs = store.next_chunks(model=model, limit=asked, grace_s=grace_s)
        for place, ref in enumerate(refs):
            crash_point("before_send")
            try:
                broker.enqueue(_message(store, ref))
            except NotFound:  # its batch was deleted meanwhile
                continue
            except QueueUnavailable:
                store.unsend(refs[place:])
                raise
        sent += len(refs)
        if len(refs) < asked:
            break
    return sent
