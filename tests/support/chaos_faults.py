"""The faults of the chaos tests: each does one kind of harm to a stage and arranges when it ends.

A fault returns False when there is nothing that it could hit now, and may raise what the part that it wanted to use raises while it is
down; then another one falls instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from typing import Protocol

from chaos_stage import CHUNK, Stage
from servers import PostgresServer, RedisServer
from worker_process import HeadraceProcess

from headrace.broker import KEY_PREFIX, queue_name
from headrace.errors import Conflict
from headrace.store import ChunkRef


class Target(Protocol):
    """A batch, as far as a fault needs to know it."""

    prompts: list
    may_be_cancelled: bool
    is_over: bool

    @property
    def batch_id(self) -> str | None: ...


def _queue(stage: Stage) -> str:
    return KEY_PREFIX + queue_name(stage.settings.model)


Fault = Callable[[Stage, Sequence[Target]], bool]


def _end_worker(stage: Stage, end: Callable[[HeadraceProcess], None]) -> bool:
    worker = stage.pick_worker()
    if worker is None:
        return False
    stage.asked_to_end.add(worker)
    end(worker)
    return True


def worker_kill9(stage: Stage, jobs: Sequence[Target]) -> bool:
    return _end_worker(stage, lambda worker: worker.kill9())


def worker_sigterm(stage: Stage, jobs: Sequence[Target]) -> bool:
    return _end_worker(stage, lambda worker: worker.terminate())


def engine_lost(stage: Stage, jobs: Sequence[Target]) -> bool:
    """The engine is given up: its worker hands its chunks back and ends."""
    return stage.engine == "echo" and _end_worker(stage, lambda worker: os.kill(worker.pid, signal.SIGUSR2))


def engine_kill9(stage: Stage, jobs: Sequence[Target]) -> bool:
    """The real engine's process is killed; its worker stays and starts another one."""
    worker = stage.pick_worker() if stage.engine == "tiny" else None
    ranks = [] if worker is None else [child for child in worker.children() if "engine.rank" in child.cmdline()]
    for rank in ranks:
        rank.kill()
    return bool(ranks)


def worker_freeze(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Longer than its lease: it wakes up as a zombie."""
    worker = stage.pick_worker()
    if worker is None:
        return False
    stage.frozen.add(worker)
    os.kill(worker.pid, signal.SIGSTOP)

    def thaw() -> None:
        stage.frozen.discard(worker)
        os.kill(worker.pid, signal.SIGCONT)

    lease_s = stage.settings.lease_s
    stage.later(1.2 * lease_s, 2 * lease_s, thaw)
    return True


def _down(stage: Stage, server: RedisServer | PostgresServer, stop: Callable[[], None]) -> bool:
    if not server.is_running:
        return False
    server.resume()
    stop()
    stage.later(0.0, 2.5, server.start)
    return True


def redis_kill9(stage: Stage, jobs: Sequence[Target]) -> bool:
    return _down(stage, stage.redis, stage.redis.kill9)


def redis_restart(stage: Stage, jobs: Sequence[Target]) -> bool:
    return _down(stage, stage.redis, stage.redis.stop)


def redis_freeze(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Connections stay open and nothing answers."""
    if not stage.redis.is_running:
        return False
    stage.redis.pause()
    stage.later(0.5, 4, stage.redis.resume)
    return True


def redis_flushall(stage: Stage, jobs: Sequence[Target]) -> bool:
    with stage.link() as link:
        return bool(link.flushall())


def redis_cut(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Every connection is closed by the server."""
    with stage.link() as link:
        return link.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") > 0


def messages_dropped(stage: Stage, jobs: Sequence[Target]) -> bool:
    with stage.link() as link:
        return bool(link.rpop(_queue(stage), stage.draw.randrange(1, 9)))


def messages_doubled(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Each of some messages that wait is there three times."""
    with stage.link() as link:
        copies = link.lrange(_queue(stage), 0, stage.draw.randrange(8))
        return bool(copies) and link.lpush(_queue(stage), *copies, *copies) > 0


def messages_forgotten(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Redis doesn't know any more what it delivered and to whom."""
    with stage.link() as link:
        return link.delete(KEY_PREFIX + "unacked", KEY_PREFIX + "unacked_index") > 0


def message_from_nowhere(stage: Stage, jobs: Sequence[Target]) -> bool:
    """A chunk of any batch, done or not, is delivered three more times."""
    known = [job for job in jobs if job.batch_id is not None]
    if not known:
        return False
    job = stage.draw.choice(known)
    count = -(-len(job.prompts) // CHUNK)
    number = stage.draw.randrange(count)
    batch_id = str(job.batch_id)
    ref = ChunkRef(
        chunk_id=f"{batch_id.replace('batch_', 'chunk_', 1)}_{number + 1:07d}", batch_id=batch_id, number=number + 1, of=count,
        start=number * CHUNK, stop=min(len(job.prompts), (number + 1) * CHUNK), model=stage.settings.model,
    )  # fmt: skip
    with stage.link() as link:
        link.ping()  # a frozen Redis would hold up this thread, which is the one that thaws it
    message = stage.service.store.chunk_message(ref)
    for _ in range(3):
        stage.service.broker.enqueue(message)
    return True


def database_kill9(stage: Stage, jobs: Sequence[Target]) -> bool:
    return stage.postgres is not None and _down(stage, stage.postgres, stage.postgres.kill9)


def database_restart(stage: Stage, jobs: Sequence[Target]) -> bool:
    return stage.postgres is not None and _down(stage, stage.postgres, stage.postgres.stop)


def database_cut(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Every connection of every process is closed by the server."""
    if stage.postgres is None or not stage.postgres.is_running:
        return False
    stage.postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'headrace'")
    return True


def database_locked(stage: Stage, jobs: Sequence[Target]) -> bool:
    """Somebody holds SQLite's one write lock."""
    if stage.postgres is not None:
        return False
    holder = sqlite3.connect(stage.folder / "headrace.db", timeout=1, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        # A worker that was frozen in a transaction has the lock, and this thread is the one that thaws it.
        holder.close()
        return False
    stage.later(0.5, 3, holder.close)
    return True


def api_kill9(stage: Stage, jobs: Sequence[Target]) -> bool:
    assert stage.api.process is not None
    if stage.api.process.poll() is not None:
        return False
    stage.api.kill9()
    stage.later(0.1, 2, lambda: stage.api.start() and None)
    return True


def batch_cancelled(stage: Stage, jobs: Sequence[Target]) -> bool:
    """A client cancels a batch; it insists until the API takes it or says that the batch is over."""
    able = [job for job in jobs if job.may_be_cancelled and job.batch_id is not None and not job.is_over]
    if not able:
        return False

    def cancel() -> None:
        with contextlib.suppress(Conflict):
            stage.client.cancel(str(able[0].batch_id))

    stage.senders.submit(cancel)
    return True


FAULTS: tuple[Fault, ...] = (
    *(worker_kill9, worker_kill9, worker_sigterm, worker_freeze, engine_lost, engine_kill9, engine_kill9),
    *(redis_kill9, redis_restart, redis_freeze, redis_flushall, redis_cut),
    *(messages_dropped, messages_doubled, messages_forgotten, message_from_nowhere),
    *(database_kill9, database_restart, database_cut, database_locked),
    *(api_kill9, batch_cancelled),
)
"""One deck: every fault that can hit something falls once (kill -9 of a worker or a real engine twice) before one falls again."""
