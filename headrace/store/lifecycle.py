"""How a batch moves: every change of state, the closing of chunks, and the end of a batch.

A state changes only by `advance`, an UPDATE that holds the arrows of `headrace.batch.ARROWS`, so that one of several writers
wins. Every function works inside the caller's transaction, which holds the batch's row. It knows nothing of generation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, func, literal, or_, select, update

from headrace.batch import BatchStatus, sources
from headrace.completion import CompletionError
from headrace.crash import crash_point
from headrace.store import outputs
from headrace.store.session import insert_new
from headrace.store.tables import batches, chunks, completions, now, prompts
from headrace.store.values import ChunkState, encode_answer

log = logging.getLogger(__name__)

CLOSE_SLICE: Final = 128
"""Chunks that are closed in one transaction: so few that other writers wait for a fraction of a second."""
DELETING: Final = "deleting"
"""In `batches.status`: the batch is gone for everybody, and its rows are being deleted piece by piece. No state that anyone sees."""
CANCELLED_ERROR: Final = CompletionError(
    code="batch_cancelled", message="The batch was cancelled before this prompt was answered."
)
EXPIRED_ERROR: Final = CompletionError(
    code="batch_expired", message="This request could not be executed before the completion window expired."
)


def advance(connection: Connection, batch_id: str, target: BatchStatus) -> bool:
    """Move a batch to `target` and note the time, if an arrow leads there; return whether this call did it."""
    times = {f"{target.value}_at": now()} if f"{target.value}_at" in batches.c else {}
    done = connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.status.in_([state.value for state in sources(target)]))
        .values(status=target.value, updated_at=now(), **times)
    )
    if done.rowcount == 1:
        log.info(
            "Batch %s is %s",
            batch_id,
            target.value,
            extra={"event": "batch_status", "batch_id": batch_id, "status": target.value},
        )
    return done.rowcount == 1


def lock_batch(connection: Connection, batch_id: str) -> Row[Any] | None:
    """Return the batch's row, which nobody else changes until the transaction ends; None: there is none."""
    # FOR NO KEY UPDATE: inserting rows that refer to the batch goes on.
    row = connection.execute(select(batches).where(batches.c.id == batch_id).with_for_update(key_share=True)).first()
    return None if row is None or row.status == DELETING else row


def settle(connection: Connection, batch_id: str) -> None:
    """End the batch if its last chunk is closed. The caller holds the batch's row."""
    row = connection.execute(select(batches).where(batches.c.id == batch_id)).one()
    if row.total == 0 or row.open_chunks > 0 or BatchStatus(row.status).is_terminal:
        return
    assert row.completed + row.failed == row.total, (
        f"{batch_id}: {row.completed} + {row.failed} rows of {row.total} in a closed batch"
    )
    crash_point("mid_finalize")
    if row.status == BatchStatus.CANCELLING:
        advance(connection, batch_id, BatchStatus.CANCELLED)
    elif row.expiring_at is not None:
        advance(connection, batch_id, BatchStatus.EXPIRED)
    elif advance(connection, batch_id, BatchStatus.FINALIZING):
        advance(connection, batch_id, BatchStatus.COMPLETED)
    outputs.announce(connection, row)


def is_stopping(batch: Row[Any]) -> bool:
    """Whether the batch is being cancelled or expired: nobody starts on it, and who works on it stops."""
    return batch.status == BatchStatus.CANCELLING or batch.expiring_at is not None


def stop_error(batch: Row[Any]) -> CompletionError:
    """Return what the unanswered prompts of a stopping batch are told."""
    return CANCELLED_ERROR if batch.status == BatchStatus.CANCELLING else EXPIRED_ERROR


def close_chunks(connection: Connection, batch: Row[Any], rows: Sequence[Row[Any]]) -> int:
    """Give every unanswered prompt of the open chunks `rows` an error and cancel them; if they were the last, end the batch.

    Return how many prompts were filled. The caller holds the batch's row and the chunks' rows.
    """
    if not rows:
        settle(connection, batch.id)
        return 0
    ids = [row.id for row in rows]
    missing: int = sum(row.stop - row.start - row.completed - row.failed for row in rows)
    filled = _fill(connection, batch, rows)
    assert filled == missing, f"{batch.id}: {missing} rows were missing by the counters, {filled} by the tables"
    open_ones = chunks.c.id.in_(ids)
    connection.execute(
        update(chunks)
        .where(open_ones)
        .values(
            state=ChunkState.CANCELLED.value,
            failed=chunks.c.stop - chunks.c.start - chunks.c.completed,
            sent_at=None,
            lease_until=None,
            finished_at=now(),
        )
    )
    connection.execute(
        update(batches)
        .where(batches.c.id == batch.id)
        .values(failed=batches.c.failed + missing, open_chunks=batches.c.open_chunks - len(ids), updated_at=now())
    )
    settle(connection, batch.id)
    return missing


def _fill(connection: Connection, batch: Row[Any], chunk_rows: Sequence[Row[Any]]) -> int:
    """Insert the batch's error for every prompt of the chunks that has no row; return how many."""
    error = stop_error(batch)
    values = (literal(error.code), now(), literal(encode_answer((), error)))
    filled = 0
    for start, stop in _runs(chunk_rows):
        # A range of one table, with conflicts left aside: anything that joins prompts to completions is at the mercy of
        # PostgreSQL's statistics, which know nothing yet of a batch that came in a minute ago (measured: 100 times slower).
        rows = select(prompts.c.batch_id, prompts.c.index, *values).where(
            prompts.c.batch_id == batch.id, prompts.c.index >= start, prompts.c.index < stop
        )
        insert = insert_new(connection, completions).from_select(
            ["batch_id", "index", "error_code", "recorded_at", "body"], rows
        )
        filled += connection.execute(insert.execution_options(preserve_rowcount=True)).rowcount
    return filled


def _runs(chunk_rows: Sequence[Row[Any]]) -> list[tuple[int, int]]:
    """Return the ranges of indexes that the chunks cover, adjacent ones as one."""
    runs: list[tuple[int, int]] = []
    for row in sorted(chunk_rows, key=lambda row: int(row.start)):
        if runs and runs[-1][1] == row.start:
            runs[-1] = (runs[-1][0], row.stop)
        else:
            runs.append((row.start, row.stop))
    return runs


def close_slice(connection: Connection, batch_id: str) -> bool:
    """Close up to `CLOSE_SLICE` open chunks of a stopping batch; return whether there may be more.

    Cancelled: a chunk that a live worker holds is left to it for now (its next word closes the chunk), so that answers which
    are ready are kept. Expired: every chunk.
    """
    batch = lock_batch(connection, batch_id)
    if batch is None or BatchStatus(batch.status).is_terminal or not is_stopping(batch):
        return False
    closable = or_(chunks.c.state == ChunkState.QUEUED, and_(chunks.c.state == ChunkState.LEASED, chunks.c.lease_until < now()))
    if batch.status != BatchStatus.CANCELLING:
        closable = chunks.c.state.in_([ChunkState.QUEUED.value, ChunkState.LEASED.value])
    rows = connection.execute(
        select(chunks)
        .where(chunks.c.batch_id == batch_id, closable)
        .order_by(chunks.c.number)
        .limit(CLOSE_SLICE)
        .with_for_update()
    ).all()
    close_chunks(connection, batch, rows)
    return len(rows) == CLOSE_SLICE


def count_rows(connection: Connection, chunk: Row[Any]) -> int:
    """Return how many completions of the chunk's range there are."""
    query = select(func.count()).where(
        completions.c.batch_id == chunk.batch_id, completions.c.index >= chunk.start, completions.c.index < chunk.stop
    )
    return int(connection.execute(query).scalar_one())
