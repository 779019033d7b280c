"""Chunks: which are sent next, who holds them, and when they are done.

A worker's right to a chunk is its `epoch`: each claim raises it, and whatever carries an older one is refused (a zombie's write).
A lease that ran out lets another worker claim the chunk; until one does, the old holder may go on where it was.
Every function works inside the caller's transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, func, or_, select, update

from headrace.batch import TEXT, BatchStatus, no_such_batch
from headrace.config import GenerationConfig
from headrace.store import turns
from headrace.store.lifecycle import close_chunks, count_rows, is_stopping, settle
from headrace.store.tables import LEASED, RUNNING, batches, chunks, completions, now, prompts
from headrace.store.values import ChunkMessage, ChunkRef, ChunkState, Claim, PendingPrompt


@dataclass(frozen=True, slots=True)
class Held:
    """The locked rows behind some claims."""

    batches: dict[str, Row[Any]]
    chunks: dict[str, Row[Any]]
    at: float
    """Now, by the database's clock."""


def lock(connection: Connection, chunk_ids: Collection[str]) -> Held:
    """Lock chunks and, before them, their batches, in the one order that keeps two writers from waiting for each other."""
    ids = sorted(set(chunk_ids))
    owners = select(chunks.c.batch_id).where(chunks.c.id.in_(ids))
    batch_rows = connection.execute(
        select(batches).where(batches.c.id.in_(owners)).order_by(batches.c.id).with_for_update(key_share=True)
    ).all()
    chunk_rows = connection.execute(
        select(chunks, (chunks.c.lease_until < now()).label("has_lapsed"), now().label("at"))
        .where(chunks.c.id.in_(ids))
        .order_by(chunks.c.id)
        .with_for_update(of=chunks)
    ).all()
    at = chunk_rows[0].at if chunk_rows else 0.0
    return Held({row.id: row for row in batch_rows}, {row.id: row for row in chunk_rows}, at)


def requeue_lapsed(connection: Connection, *, model: str | None = None) -> int:
    """Put chunks whose lease ran out back to the queue; return how many. Their attempt stays counted."""
    lapsed = select(chunks.c.id).where(LEASED, chunks.c.lease_until < now())
    return _requeue(connection, lapsed if model is None else lapsed.where(chunks.c.model == model))


def requeue_unclaimed(connection: Connection, *, grace_s: float, model: str | None = None) -> int:
    """Forget that chunks were sent which nobody claimed within `grace_s` seconds; return how many."""
    stale = select(chunks.c.id).where(chunks.c.state == ChunkState.QUEUED, chunks.c.sent_at < now() - grace_s)
    return _requeue(connection, stale if model is None else stale.where(chunks.c.model == model))


def _requeue(connection: Connection, ids: Any) -> int:
    # A row that somebody holds is being worked on right now: leave it to them.
    picked = ids.with_for_update(skip_locked=True)
    values = {"state": ChunkState.QUEUED.value, "sent_at": None, "lease_until": None}
    return connection.execute(update(chunks).where(chunks.c.id.in_(picked)).values(values)).rowcount


def has_lapsed(connection: Connection, *, model: str) -> bool:
    """Whether a lease on one of the model's chunks ran out."""
    lapsed = exists().where(chunks.c.model == model, LEASED, chunks.c.lease_until < now())
    return bool(connection.execute(select(lapsed)).scalar())


def next_refs(connection: Connection, *, model: str, limit: int, grace_s: float) -> list[ChunkRef]:
    """Pick the chunks to send now and mark them as sent: first what was lost, then what was never sent, by turns."""
    lost = (
        select(chunks.c.id)
        .where(chunks.c.model == model, chunks.c.state == ChunkState.QUEUED, chunks.c.sent_at < now() - grace_s, _runs())
        .order_by(chunks.c.rank, chunks.c.sent_at, chunks.c.id)
        .limit(limit)
    )
    found = list(connection.execute(lost).scalars())
    fresh: list[ChunkRef] = []
    if len(found) < limit:
        fresh = _mark(connection, turns.pick(connection, model=model, limit=limit - len(found)))
    if not found:
        return fresh
    # Locked last: `pick` waits for batches, and whoever holds one may be waiting for a chunk of it.
    free = select(chunks.c.id).where(chunks.c.id.in_(found), chunks.c.sent_at < now() - grace_s)
    locked = set(connection.execute(free.with_for_update(skip_locked=True)).scalars())
    return [*_mark(connection, [chunk_id for chunk_id in found if chunk_id in locked]), *fresh]


def _runs() -> ColumnElement[bool]:
    # Not EXISTS: PostgreSQL may turn that into a join that begins with every running batch.
    of_chunk = select(batches.c.id).where(batches.c.id == chunks.c.batch_id, RUNNING, batches.c.expiring_at.is_(None))
    return of_chunk.scalar_subquery().is_not(None)


def _mark(connection: Connection, ids: Sequence[str]) -> list[ChunkRef]:
    """Mark chunks as sent and return them in the order of `ids`; one that was cancelled since it was picked is left out."""
    if not ids:
        return []
    marked = update(chunks).where(chunks.c.id.in_(ids), chunks.c.state == ChunkState.QUEUED).values(sent_at=now())
    rows = {row.id: row for row in connection.execute(marked.returning(chunks))}
    return [_ref(rows[chunk_id]) for chunk_id in ids if chunk_id in rows]


def _ref(row: Row[Any]) -> ChunkRef:
    return ChunkRef(
        chunk_id=row.id,
        batch_id=row.batch_id,
        number=row.number,
        of=row.chunk_count,
        start=row.start,
        stop=row.stop,
        model=row.model,
    )


def find(connection: Connection, chunk_id: str) -> ChunkRef | None:
    """Return the chunk of this id; None: there is none."""
    row = connection.execute(select(chunks).where(chunks.c.id == chunk_id)).first()
    return None if row is None else _ref(row)


def unsend(connection: Connection, chunk_ids: Sequence[str]) -> None:
    """Undo `next_refs` for chunks that could not be sent after all."""
    connection.execute(
        update(chunks).where(chunks.c.id.in_(chunk_ids), chunks.c.state == ChunkState.QUEUED).values(sent_at=None)
    )


def count_in_flight(connection: Connection, *, model: str, grace_s: float | None) -> int:
    """Count chunks that were sent and are not done. With `grace_s`, those that are lost by now don't count."""
    query = select(func.count()).where(chunks.c.model == model, chunks.c.sent_at.is_not(None))
    if grace_s is not None:
        lives = or_(
            and_(chunks.c.state == ChunkState.QUEUED, chunks.c.sent_at >= now() - grace_s),
            and_(chunks.c.state == ChunkState.LEASED, chunks.c.lease_until >= now()),
        )
        query = query.where(lives)
    return int(connection.execute(query).scalar_one())


def message(connection: Connection, ref: ChunkRef) -> ChunkMessage:
    """Return what a worker needs for a chunk; raise `NotFound` when the batch is gone."""
    batch = connection.execute(select(batches.c.gen_config, batches.c.endpoint).where(batches.c.id == ref.batch_id)).first()
    if batch is None:
        raise no_such_batch(ref.batch_id)
    rows = connection.execute(
        select(prompts.c.index, prompts.c.body, prompts.c.gen_config).where(
            _in_range(prompts.c, ref.batch_id, ref.start, ref.stop), prompts.c.body.is_not(None)
        )
    ).all()
    bodies = {index: json.loads(body) for index, body, _ in rows}
    return ChunkMessage(
        batch_id=ref.batch_id, chunk_id=ref.chunk_id, number=ref.number, of=ref.of, start=ref.start, stop=ref.stop, model=ref.model,
        gen_config=GenerationConfig.from_dict(json.loads(batch.gen_config)),
        prompts=tuple(bodies.get(index) for index in range(ref.start, ref.stop)),
        own_configs={index: GenerationConfig.from_dict(json.loads(config)) for index, _, config in rows if config is not None},
        is_raw=batch.endpoint == TEXT,
    )  # fmt: skip


def _in_range(columns: Any, batch_id: str, start: int, stop: int) -> ColumnElement[bool]:
    return and_(columns.batch_id == batch_id, columns.index >= start, columns.index < stop)


def claim(connection: Connection, chunk_id: str, *, worker: str, lease_s: float) -> Claim | None:
    """Give the chunk to `worker`; None when it is done, cancelled, unknown, or in another live hand."""
    held = lock(connection, [chunk_id])
    row = held.chunks.get(chunk_id)
    if row is None:
        return None
    batch = held.batches[row.batch_id]
    is_free = row.state == ChunkState.QUEUED or (row.state == ChunkState.LEASED and row.has_lapsed)
    if not is_free or is_stopping(batch) or batch.status != BatchStatus.IN_PROGRESS:
        return None
    connection.execute(
        update(chunks)
        .where(chunks.c.id == chunk_id)
        .values(
            state=ChunkState.LEASED.value,
            worker=worker,
            epoch=row.epoch + 1,
            attempts=row.attempts + 1,
            lease_until=now() + lease_s,
            sent_at=func.coalesce(chunks.c.sent_at, now()),
        )
    )
    if batch.started_at is None:
        connection.execute(update(batches).where(batches.c.id == batch.id).values(started_at=now()))
    return Claim(
        chunk_id=chunk_id, batch_id=row.batch_id, number=row.number, of=row.chunk_count, start=row.start, stop=row.stop,
        model=row.model, epoch=row.epoch + 1, attempt=row.attempts + 1, worker=worker, lease_s=lease_s,
    )  # fmt: skip


def pending(connection: Connection, claimed: Claim) -> list[PendingPrompt]:
    """Return the chunk's prompts that have no completion yet, by index."""
    answered = exists().where(completions.c.batch_id == prompts.c.batch_id, completions.c.index == prompts.c.index)
    rows = connection.execute(
        select(prompts.c.index, prompts.c.body)
        .where(_in_range(prompts.c, claimed.batch_id, claimed.start, claimed.stop), ~answered)
        .order_by(prompts.c.index)
    )
    return [PendingPrompt(index, json.loads(body)) for index, body in rows]


def finish(connection: Connection, claimed: Claim) -> bool:
    """Mark the chunk done if all its rows are there, and end the batch if it was the last. A second call says True again."""
    held = lock(connection, [claimed.chunk_id])
    row = held.chunks.get(claimed.chunk_id)
    if row is None or row.epoch != claimed.epoch or row.state == ChunkState.CANCELLED:
        return False
    if row.state == ChunkState.DONE:
        return True
    batch = held.batches[row.batch_id]
    if count_rows(connection, row) < row.stop - row.start:
        if is_stopping(batch):
            close_chunks(connection, batch, [row])
        return False
    connection.execute(
        update(chunks)
        .where(chunks.c.id == row.id)
        .values(state=ChunkState.DONE.value, sent_at=None, lease_until=None, finished_at=now())
    )
    connection.execute(
        update(batches).where(batches.c.id == batch.id).values(open_chunks=batches.c.open_chunks - 1, updated_at=now())
    )
    settle(connection, batch.id)
    return True


def release(connection: Connection, claimed: Claim) -> None:
    """Hand the chunk back, its attempt uncounted; no-op when it is no longer held.

    Raises the epoch, so that a late write of the same worker is refused.
    """
    held = lock(connection, [claimed.chunk_id])
    row = held.chunks.get(claimed.chunk_id)
    if row is None or row.epoch != claimed.epoch or row.state not in (ChunkState.LEASED, ChunkState.QUEUED):
        return
    batch = held.batches[row.batch_id]
    if is_stopping(batch):
        close_chunks(connection, batch, [row])
        return
    connection.execute(
        update(chunks)
        .where(chunks.c.id == row.id)
        .values(
            state=ChunkState.QUEUED.value,
            epoch=row.epoch + 1,
            attempts=row.attempts - 1,
            sent_at=None,
            lease_until=None,
            worker=None,
        )
    )


def extend(connection: Connection, claimed: Claim, lease_s: float) -> None:
    """Lengthen the lease of a locked chunk, also of one that lapsed and that nobody took."""
    connection.execute(
        update(chunks)
        .where(chunks.c.id == claimed.chunk_id)
        .values(
            state=ChunkState.LEASED.value,
            worker=claimed.worker,
            lease_until=now() + lease_s,
            sent_at=func.coalesce(chunks.c.sent_at, now()),
        )
    )


def renew(connection: Connection, claims: Sequence[Claim], lease_s: float) -> set[Claim]:
    """Lengthen the leases; return the claims that still hold. A chunk of a stopping batch is closed and not among them."""
    held = lock(connection, [claimed.chunk_id for claimed in claims])
    kept: set[Claim] = set()
    for claimed in claims:
        row = held.chunks.get(claimed.chunk_id)
        if row is None or row.epoch != claimed.epoch or row.state not in (ChunkState.LEASED, ChunkState.QUEUED):
            continue
        batch = held.batches[row.batch_id]
        if is_stopping(batch):
            close_chunks(connection, batch, [row])
            continue
        extend(connection, claimed, lease_s)
        kept.add(claimed)
    return kept
