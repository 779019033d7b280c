"""Workers: who is there, and what they last said. Every function works inside the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, delete, select, update

from headrace.store.session import insert_new
from headrace.store.tables import now, workers
from headrace.store.values import WorkerInfo, to_json

FORGET_AFTER_S: Final = 7 * 86400.0
"""Workers that were silent for so long are forgotten."""


def register(connection: Connection, worker_id: str, *, host: str, model: str, stats: Mapping[str, Any]) -> None:
    """Write the worker down, anew if its id is known."""
    connection.execute(delete(workers).where(workers.c.heartbeat_at < now() - FORGET_AFTER_S))
    values = {"host": host, "model": model, "started_at": now(), "heartbeat_at": now(), "stats": to_json(dict(stats))}
    if connection.execute(update(workers).where(workers.c.id == worker_id).values(values)).rowcount == 0:
        connection.execute(insert_new(connection, workers).values(id=worker_id, **values))


def heartbeat(connection: Connection, worker_id: str, stats: Mapping[str, Any] | None) -> bool:
    """Note that the worker lives; return False when it is not registered."""
    values: dict[str, Any] = {"heartbeat_at": now()}
    if stats is not None:
        values["stats"] = to_json(dict(stats))
    return connection.execute(update(workers).where(workers.c.id == worker_id).values(values)).rowcount == 1


def forget(connection: Connection, worker_id: str) -> None:
    """Strike the worker off."""
    connection.execute(delete(workers).where(workers.c.id == worker_id))


def read(connection: Connection, *, max_age_s: float | None, model: str | None) -> list[WorkerInfo]:
    """Return the workers by start; with `max_age_s` those that were heard of within so many seconds."""
    age = (now() - workers.c.heartbeat_at).label("age_s")
    query = select(workers, age).order_by(workers.c.started_at, workers.c.id)
    if max_age_s is not None:
        query = query.where(workers.c.heartbeat_at >= now() - max_age_s)
    if model is not None:
        query = query.where(workers.c.model == model)
    return [
        WorkerInfo(
            id=row.id,
            host=row.host,
            model=row.model,
            started_at=row.started_at,
            heartbeat_at=row.heartbeat_at,
            age_s=max(0.0, row.age_s),
            stats=json.loads(row.stats),
        )
        for row in connection.execute(query)
    ]
