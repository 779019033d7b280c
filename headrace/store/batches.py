"""Batches: read, listed, cancelled, expired, deleted. Every function works inside the caller's transaction.

What is asked every few seconds names `OPEN` or `GONE` in the words of a partial index: batches that are over may be a million.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, delete, exists, func, or_, select, tuple_, update

from headrace.batch import Batch, BatchStatus, RequestCounts, no_such_batch
from headrace.completion import TokenUsage
from headrace.config import GenerationConfig
from headrace.errors import Conflict
from headrace.store import outputs
from headrace.store.lifecycle import DELETING, advance, lock_batch
from headrace.store.tables import GONE, OPEN, batches, chunks, completions, ingests, now, prompts
from headrace.store.values import to_json

STALL_S: Final = 300.0
"""A batch of which no prompt arrived for so long, and that is not complete, is given up: whoever sent it is gone."""
DELETE_SLICE: Final = 5000
"""Rows that are deleted in one transaction: on SQLite nobody else writes meanwhile."""
_STALLED_ERROR: Final = {
    "code": "submission_interrupted",
    "message": "The sender went away before every prompt was stored; send the batch again.",
}
_PLAIN: Final = (
    "id", "model", "created_at", "expires_at", "started_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at",
    "expired_at", "cancelling_at", "cancelled_at", "updated_at", "endpoint", "completion_window", "priority", "input_file_id", "begun",
)  # fmt: skip


def from_row(row: Row[Any]) -> Batch:
    """Return the snapshot that other rooms see."""
    return Batch(
        **{name: getattr(row, name) for name in _PLAIN},
        gen_config=GenerationConfig.from_dict(json.loads(row.gen_config)),
        status=BatchStatus(row.status),
        counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=usage_of(row),
        metadata=json.loads(row.metadata),
        errors=tuple(json.loads(row.errors)),
    )


def usage_of(row: Row[Any]) -> TokenUsage:
    """Return the tokens of the whole batch so far."""
    return TokenUsage(prompt_tokens=row.prompt_tokens, cached_tokens=row.cached_tokens, completion_tokens=row.completion_tokens)


def get(connection: Connection, batch_id: str) -> Row[Any]:
    """Return the batch's row; raise `NotFound`."""
    row = connection.execute(select(batches).where(batches.c.id == batch_id, batches.c.status != DELETING)).first()
    if row is None:
        raise no_such_batch(batch_id)
    return row


def owner_of(connection: Connection, batch_id: str) -> str | None:
    """Return the API key's id that sent the batch; raise `NotFound`."""
    row = connection.execute(select(batches.c.owner).where(batches.c.id == batch_id)).first()
    if row is None:
        raise no_such_batch(batch_id)
    owner: str | None = row.owner
    return owner


def find(
    connection: Connection, *, after: str | None, limit: int, status: BatchStatus | None, owner: str | None = None
) -> list[Batch]:
    """Return batches (of `owner` alone), newest first, from the one after `after`; raise `NotFound` when that is unknown."""
    query = select(batches).where(batches.c.status != DELETING)
    query = query.order_by(batches.c.created_at.desc(), batches.c.id.desc()).limit(limit)
    if after is not None:
        last = get(connection, after)
        if owner is not None and last.owner != owner:
            raise no_such_batch(after)
        query = query.where(tuple_(batches.c.created_at, batches.c.id) < (last.created_at, last.id))
    if owner is not None:
        query = query.where(batches.c.owner == owner)
    if status is not None:
        query = query.where(batches.c.status == status.value)
    return [from_row(row) for row in connection.execute(query)]


def begin_cancel(connection: Connection, batch_id: str) -> None:
    """Say that the batch is to stop: no-op when it already is; raise `NotFound`, and `Conflict` when it is over."""
    row = lock_batch(connection, batch_id)
    if row is None:
        raise no_such_batch(batch_id)
    if row.status == BatchStatus.CANCELLING or advance(connection, batch_id, BatchStatus.CANCELLING):
        return
    raise Conflict(f"Cannot cancel a batch with status '{row.status}'.")


def begin_delete(connection: Connection, batch_id: str) -> None:
    """Let nobody see a batch that is over any more; raise `NotFound`, and `Conflict` while it is not over."""
    row = lock_batch(connection, batch_id)
    if row is None:
        raise no_such_batch(batch_id)
    if not BatchStatus(row.status).is_terminal:
        raise Conflict(f"Cannot delete a batch with status '{row.status}'; cancel it first.")
    values = {"status": DELETING, "idempotency_key": None, "updated_at": now()}
    connection.execute(update(batches).where(batches.c.id == batch_id).values(values))
    outputs.forget(connection, batch_id)


def find_deleting(connection: Connection) -> list[str]:
    """Return the ids of the batches of which rows may be left: somebody deletes them now, or was killed over it."""
    return list(connection.execute(select(batches.c.id).where(GONE)).scalars())


def delete_slice(connection: Connection, batch_id: str, *, start: int) -> bool:
    """Delete the rows from index `start` on of a batch that nobody sees, `DELETE_SLICE` of them; return whether there are more."""
    stop = start + DELETE_SLICE
    for table in (completions, prompts):
        connection.execute(delete(table).where(table.c.batch_id == batch_id, table.c.index >= start, table.c.index < stop))
    # A batch that failed while it came in has no total; its rows are gone already.
    last = connection.execute(select(batches.c.total).where(batches.c.id == batch_id)).scalar()
    if last is not None and stop < last:
        return True
    connection.execute(delete(chunks).where(chunks.c.batch_id == batch_id))
    connection.execute(delete(batches).where(batches.c.id == batch_id, batches.c.status == DELETING))
    return False


def find_outlived(connection: Connection, *, retention_s: float, limit: int) -> list[str]:
    """Return the ids of batches that have been over for `retention_s` seconds, oldest first."""
    terminal = [status.value for status in BatchStatus if status.is_terminal]
    # The end of a batch is the last change of its row. `created_at` bounds the search by an index.
    query = (
        select(batches.c.id)
        .where(batches.c.created_at < now() - retention_s, batches.c.updated_at < now() - retention_s)
        .where(batches.c.status.in_(terminal))
        .order_by(batches.c.created_at)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


def count_open_prompts(connection: Connection) -> int:
    """Return how many prompts of all batches have neither answer nor error."""
    is_open = batches.c.status.in_([BatchStatus.IN_PROGRESS.value, BatchStatus.CANCELLING.value])
    query = select(func.sum(batches.c.total - batches.c.completed - batches.c.failed)).where(OPEN, is_open)
    return int(connection.execute(query).scalar() or 0)


_IS_DUE: Final = and_(
    OPEN, batches.c.status == BatchStatus.IN_PROGRESS.value, batches.c.expires_at <= now(), batches.c.expiring_at.is_(None)
)


def find_due(connection: Connection) -> list[str]:
    """Return the ids of the batches whose time is up."""
    return list(connection.execute(select(batches.c.id).where(_IS_DUE)).scalars())


def begin_expire(connection: Connection, batch_id: str) -> None:
    """Mark a batch whose time is up. From here on nobody starts on a chunk of it."""
    connection.execute(update(batches).where(batches.c.id == batch_id, _IS_DUE).values(expiring_at=now()))


def find_stopping(connection: Connection) -> list[str]:
    """Return the ids of the batches that are being cancelled or expired."""
    stopping = or_(
        batches.c.status == BatchStatus.CANCELLING,
        and_(batches.c.status == BatchStatus.IN_PROGRESS, batches.c.expiring_at.is_not(None)),
    )
    return list(connection.execute(select(batches.c.id).where(OPEN, stopping)).scalars())


def give_up_stalled(connection: Connection) -> int:
    """End batches whose sender went away while its prompts were being stored; return how many."""
    stalled = (
        select(batches.c.id)
        .where(OPEN, batches.c.status.in_([BatchStatus.VALIDATING.value, BatchStatus.CANCELLING.value]))
        .where(batches.c.total == 0, batches.c.updated_at < now() - STALL_S)
        # Those that are read from a file have no sender that could go away.
        .where(~exists().where(ingests.c.batch_id == batches.c.id))
        .with_for_update(skip_locked=True)
    )
    ids = list(connection.execute(stalled).scalars())
    for batch_id in ids:
        # No row of it may stay: nothing was promised, and `total` is 0.
        connection.execute(delete(completions).where(completions.c.batch_id == batch_id))
        connection.execute(delete(prompts).where(prompts.c.batch_id == batch_id))
        values = {"errors": to_json([_STALLED_ERROR]), "idempotency_key": None, "failed": 0}
        connection.execute(update(batches).where(batches.c.id == batch_id).values(values))
        if not advance(connection, batch_id, BatchStatus.FAILED):
            advance(connection, batch_id, BatchStatus.CANCELLED)
    return len(ids)
