"""Whether one more batch is taken: the limits of the key that sends it, the bound on all open prompts, room on the disk.

A limit is checked in the transaction that writes the batch's row, under one lock, so that two requests at once can't both
take the last place. What a batch announces is `reserved` from its first row on; what it has when it is complete replaces that.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, case, func, select, text

from headrace.errors import InvalidRequest, QueueFull, QuotaExceeded, StorageFull
from headrace.store.session import Database
from headrace.store.tables import OPEN, api_keys, batches

_LOCK_KEY: Final = 0x61646D69_74000000  # "admit"
_ACTIVE: Final = case((batches.c.total > 0, batches.c.total - batches.c.completed - batches.c.failed), else_=batches.c.reserved)


def admit(
    connection: Connection,
    batch_id: str,
    *,
    owner: str | None,
    prompts: int,
    priority: int,
    max_open_prompts: int | None = None,
) -> None:
    """Raise unless a batch of `prompts` (as far as that is known) may come in; its own row doesn't count.

    Raises `QueueFull` while `max_open_prompts` of all batches are open, `QuotaExceeded` while the owner's key is at its limit, and
    `InvalidRequest` when the batch alone is above it, or asks for a higher priority than the key may. The caller's transaction keeps others out until it ends.
    """
    limits = _limits(connection, owner)
    if limits is not None and limits.max_priority is not None:
        _check_priority(priority, limits.max_priority)
        limits = limits if limits[:2] != (None, None) else None
    if limits is None and max_open_prompts is None:
        return
    if connection.dialect.name != "sqlite":  # whose write lock is held already
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    if max_open_prompts is not None and _active(connection, batch_id, None)[0] >= max_open_prompts:
        raise QueueFull
    if limits is None:
        return
    most = limits.max_active_prompts
    if most is not None and prompts > most:
        raise InvalidRequest(
            f"this API key may have {most:,} active prompts at a time, and this batch has {prompts:,}; split it",
            param="prompts",
        )
    active_prompts, active_batches = _active(connection, batch_id, owner)
    if limits.max_active_batches is not None and active_batches >= limits.max_active_batches:
        raise QuotaExceeded(_told("max_active_batches", limits.max_active_batches, active_batches, "batches"))
    if most is not None and active_prompts + prompts > most:
        raise QuotaExceeded(_told("max_active_prompts", most, active_prompts, "prompts"))


def _check_priority(priority: int, highest: int) -> None:
    if priority > highest:
        raise InvalidRequest(
            f"this API key's batches may have a priority of at most {highest}, and this one asks for {priority}",
            param="priority",
        )


def _told(limit: str, most: int, active: int, what: str) -> str:
    return (
        f"{limit}: this API key may have {most:,} active {what} and has {active:,}; send the request again when some are done"
    )


def _limits(connection: Connection, owner: str | None) -> Any:
    if owner is None:
        return None
    columns = (api_keys.c.max_active_prompts, api_keys.c.max_active_batches, api_keys.c.max_priority)
    row = connection.execute(select(*columns).where(api_keys.c.id == owner)).first()
    return None if row is None or all(limit is None for limit in row) else row


def _active(connection: Connection, batch_id: str, owner: str | None) -> tuple[int, int]:
    """Return the open prompts and the open batches of `owner` (None: of all), without the batch itself."""
    query = select(func.coalesce(func.sum(_ACTIVE), 0), func.count()).where(OPEN, batches.c.id != batch_id)
    row = connection.execute(query if owner is None else query.where(batches.c.owner == owner)).one()
    return int(row[0]), int(row[1])


def check_room(database: Database, *, max_bytes: float = math.inf, min_free_bytes: float = 0) -> None:
    """Raise `StorageFull` when the database has `max_bytes` or more, or (SQLite) its disk has less than `min_free_bytes` left."""
    if database.is_sqlite:
        path = Path(database.url.database or "")
        free = shutil.disk_usage(path.parent).free
        if free < min_free_bytes:
            raise StorageFull(
                f"the database's disk has {free:,} bytes left, and new batches are taken from {min_free_bytes:,.0f} on "
                "(HEADRACE_MIN_FREE_BYTES); delete batches or free some space"
            )
    if math.isfinite(max_bytes) and (size := size_of(database)) >= max_bytes:
        raise StorageFull(
            f"the database has {size:,} bytes, and no new batch is taken from {max_bytes:,.0f} on (HEADRACE_MAX_DATABASE_BYTES); "
            "delete batches, or set HEADRACE_RETENTION_S"
        )


def size_of(database: Database) -> int:
    """Return the bytes that the database's rows and indexes take on disk; in SQLite without the pages that wait to be used again."""
    if not database.is_sqlite:
        size = text("SELECT pg_database_size(current_database())")
        return int(database.read(lambda connection: connection.execute(size).scalar_one()))

    def pages(connection: Connection) -> int:
        count, free, page = (
            int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (count - free) * page

    log = Path(f"{database.url.database}-wal")
    return database.read(pages) + (log.stat().st_size if log.exists() else 0)
