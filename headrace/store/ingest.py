"""Batches that are read from a file: who reads it, how far it is, and what ends it. Formats are not known here.

A batch of a file is `validating` while one reader turns lines into prompts, some thousand to a transaction. That transaction also
moves the reader's place in the file, so a reader that is killed at any moment loses nothing and repeats nothing: another one
claims the ingest when its lease has run out (epoch + 1) and goes on at that place. One last transaction makes the chunks.

    nothing wrong                        in_progress
    the file is wrong as a whole         failed, with its errors; the prompts that were stored are removed first
    cancelled meanwhile                  cancelled; likewise
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, func, select, update

from headrace.batch import BatchStatus, Item
from headrace.config import GenerationConfig
from headrace.errors import InvalidRequest
from headrace.store import files
from headrace.store.creation import Entry, Order, entry_of, new_batch_id, open_batch, seal, store_entries
from headrace.store.lifecycle import advance, lock_batch
from headrace.store.session import Database, insert_new
from headrace.store.tables import batches, completions, ingests, now, prompts
from headrace.store.values import to_json

LEASE_S: Final = 15.0
"""After so long without a transaction of its reader, an ingest is another's to claim."""
MAX_ATTEMPTS: Final = 10
"""After so many claims in a row that stored nothing, the batch is given up: reading it ends every reader."""
RESEND_S: Final = 900.0
"""So long after a batch was created, a request that its sender sends again finds it."""
DISCARD_ROWS: Final = 5000


class IngestStatus(StrEnum):
    """What became of a step."""

    OK = "ok"
    FENCED = "fenced"
    """Another reader has it, or it is over: stop."""
    CANCELLED = "cancelled"
    """The batch is being cancelled: discard."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the next line begins: byte `offset` of `part`; `line` lines were read before it, and `rows` of them stored."""

    part: int = 0
    offset: int = 0
    line: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingest:
    """The right to read one batch's file, void when its epoch is another."""

    batch_id: str
    file_id: str
    endpoint: str
    model: str
    gen_config: GenerationConfig
    epoch: int
    attempts: int
    place: Place
    errors: tuple[Mapping[str, Any], ...]


class Ingests:
    """The ingests of one store. Each call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, order: Order, file_id: str, *, scope: str | None = None, resent: int = 0) -> str:
        """Store a batch that is to be read from a file, and return its id.

        `scope`: the owner whose files may be used; None: everybody's. `resent`: how often the sender has sent this very request before. When that is above 0, the batch of an earlier sending is
        returned: the same file, order and owner, not older than `RESEND_S`, and last answered to a sending before this one. So is
        the batch of an equal request with the same idempotency key. Raises `NotFound`, `InvalidRequest` (the key was used with
        another content), `QueueFull`.
        """
        batch_id = new_batch_id()

        def work(connection: Connection) -> str:
            # Whoever else makes a batch of this file waits here: a request that is sent again finds what the first one made.
            file = files.lock(connection, file_id, owner=scope)
            digest = content_hash(order, file)
            if (
                resent > 0
                and order.idempotency_key is None
                and (known := _sent_before(connection, digest, file_id, order, resent))
            ):
                return known
            announced = replace(order, reserved=file.lines)
            existing = open_batch(connection, batch_id, announced, input_file_id=file_id, resent=resent, content_hash=digest)
            if existing is None:
                row = insert_new(connection, ingests).values(
                    batch_id=batch_id, file_id=file_id, chunk_size=order.chunk_size, created_at=now()
                )
                connection.execute(row)
                return batch_id
            if existing.content_hash != digest:
                raise InvalidRequest(
                    "this idempotency key was used with another request; take a new key", param="idempotency_key"
                )
            return str(existing.id)

        return self._database.write(work)

    def claim(self, *, batch_id: str | None = None) -> Ingest | None:
        """Claim an ingest that nobody reads, the oldest first, or the one of `batch_id`; None: there is none."""

        def work(connection: Connection) -> Ingest | None:
            free = select(ingests.c.batch_id).where(ingests.c.lease_until < now())
            free = free.order_by(ingests.c.created_at).limit(1).with_for_update(skip_locked=True)
            if batch_id is not None:
                free = free.where(ingests.c.batch_id == batch_id)
            found = connection.execute(free).scalar()
            if found is None:
                return None
            values = {"epoch": ingests.c.epoch + 1, "attempts": ingests.c.attempts + 1, "lease_until": now() + LEASE_S}
            connection.execute(update(ingests).where(ingests.c.batch_id == found).values(values))
            row = connection.execute(
                select(ingests, batches.c.endpoint, batches.c.model, batches.c.gen_config)
                .join(batches, batches.c.id == ingests.c.batch_id)
                .where(ingests.c.batch_id == found)
            ).one()
            return _from_row(row)

        # Without this look every idle reader would take SQLite's one write lock at each of its rounds.
        waits = select(ingests.c.batch_id).where(ingests.c.lease_until < now()).limit(1)
        if self._database.read(lambda connection: connection.execute(waits).scalar()) is None:
            return None
        return self._database.write(work, repeatable=False)

    def append(
        self, ingest: Ingest, items: Sequence[Item], place: Place, errors: Sequence[Mapping[str, Any]] = ()
    ) -> IngestStatus:
        """Store the items that follow those stored before, and move on to `place`; `errors`: all that were found so far."""
        entries = _entries(ingest, items, place.rows - len(items))

        def work(connection: Connection) -> IngestStatus:
            batch = lock_batch(connection, ingest.batch_id)
            values = {
                "part": place.part, "offset": place.offset, "line": place.line, "rows": place.rows, "errors": to_json(list(errors)),
                "attempts": 0, "lease_until": now() + LEASE_S,
            }  # fmt: skip
            if batch is None or not _move(connection, ingest, values):
                return IngestStatus.FENCED
            if batch.status == BatchStatus.CANCELLING:
                return IngestStatus.CANCELLED
            store_entries(connection, ingest.batch_id, entries)
            connection.execute(update(batches).where(batches.c.id == ingest.batch_id).values(updated_at=now()))
            return IngestStatus.OK

        # A second run after a commit whose reply was lost stores nothing twice: ON CONFLICT DO NOTHING.
        return self._database.write(work)

    def keep(self, ingest: Ingest, lease_s: float = LEASE_S) -> IngestStatus:
        """Extend the lease; also says whether the batch is being cancelled."""

        def work(connection: Connection) -> IngestStatus:
            if not _move(connection, ingest, {"lease_until": now() + lease_s}):
                return IngestStatus.FENCED
            status = connection.execute(select(batches.c.status).where(batches.c.id == ingest.batch_id)).scalar()
            return IngestStatus.CANCELLED if status == BatchStatus.CANCELLING else IngestStatus.OK

        return self._database.write(work)

    def release(self, ingest: Ingest) -> None:
        """Let another reader go on at once."""
        self._database.write(lambda connection: _move(connection, ingest, {"lease_until": 0.0}))

    def repeated_ids(self, ingest: Ingest, *, limit: int) -> list[tuple[str, int]]:
        """Return up to `limit` (custom_id, index of its second use) of names that were used more than once. The database sorts, on its disk."""
        query = (
            select(prompts.c.custom_id, func.min(prompts.c.index))
            .where(prompts.c.batch_id == ingest.batch_id, prompts.c.custom_id.is_not(None))
            .group_by(prompts.c.custom_id)
            .having(func.count() > 1)
            .limit(limit)
        )

        def work(connection: Connection) -> list[tuple[str, int]]:
            found = []
            for name, first in connection.execute(query).all():
                later = select(func.min(prompts.c.index)).where(
                    prompts.c.batch_id == ingest.batch_id, prompts.c.custom_id == name, prompts.c.index > first
                )
                found.append((str(name), int(connection.execute(later).scalar_one())))
            return sorted(found, key=lambda pair: pair[1])

        return self._database.read(work)

    def finish(self, ingest: Ingest, *, total: int) -> IngestStatus:
        """Make the chunks of the `total` stored items and open the batch. Again after a lost reply: FENCED, and nothing is done."""

        def work(connection: Connection) -> IngestStatus:
            batch = lock_batch(connection, ingest.batch_id)
            row = _held(connection, ingest)
            if batch is None or row is None:
                return IngestStatus.FENCED
            if batch.status == BatchStatus.CANCELLING:
                return IngestStatus.CANCELLED
            seal(
                connection,
                batch,
                total=total,
                chunk_size=row.chunk_size,
                refused=_refused(connection, batch.id, row.chunk_size),
            )
            connection.execute(delete(ingests).where(ingests.c.batch_id == ingest.batch_id))
            return IngestStatus.OK

        return self._database.write(work)

    def discard(self, ingest: Ingest, errors: Sequence[Mapping[str, Any]], *, rows: int) -> IngestStatus:
        """Remove the `rows` items that are stored, and end the batch: cancelled if that is wanted, else failed with `errors`."""
        for start in range(0, rows, DISCARD_ROWS):
            done = self._database.write(lambda connection, start=start: _remove(connection, ingest, start))  # type: ignore[misc]
            if not done:
                return IngestStatus.FENCED

        def work(connection: Connection) -> IngestStatus:
            batch = lock_batch(connection, ingest.batch_id)
            if batch is None or _held(connection, ingest) is None:
                return IngestStatus.FENCED
            connection.execute(delete(ingests).where(ingests.c.batch_id == ingest.batch_id))
            connection.execute(update(batches).where(batches.c.id == batch.id).values(reserved=0))
            if advance(connection, batch.id, BatchStatus.CANCELLED):
                return IngestStatus.CANCELLED
            connection.execute(update(batches).where(batches.c.id == batch.id).values(errors=to_json(list(errors))))
            advance(connection, batch.id, BatchStatus.FAILED)
            return IngestStatus.OK

        return self._database.write(work)


def content_hash(order: Order, file: files.StoredFile) -> str:
    """Return what two requests have in common that ask for the same: also where the second one's sender uploaded the file again."""
    return hashlib.sha256(to_json({**order.header(), "file": file.sha256 or file.id}).encode()).hexdigest()


def _sent_before(connection: Connection, digest: str, file_id: str, order: Order, resent: int) -> str | None:
    """Return the batch of an earlier sending of the same request, and note this one.

    Sendings of one call are counted by its client. A batch that answered this count already was made by another call.
    """
    owned = batches.c.owner.is_(None) if order.owner is None else batches.c.owner == order.owner
    found = connection.execute(
        select(batches.c.id)
        .where(batches.c.content_hash == digest, batches.c.input_file_id == file_id, owned, batches.c.resent < resent)
        .where(batches.c.created_at > now() - RESEND_S, batches.c.idempotency_key.is_(None))
        .order_by(batches.c.created_at.desc())
        .limit(1)
    ).scalar()
    if found is None:
        return None
    connection.execute(update(batches).where(batches.c.id == found).values(resent=resent))
    return str(found)


def _from_row(row: Row[Any]) -> Ingest:
    return Ingest(
        batch_id=row.batch_id, file_id=row.file_id, endpoint=row.endpoint, model=row.model, epoch=row.epoch, attempts=row.attempts,
        gen_config=GenerationConfig.from_dict(json.loads(row.gen_config)), errors=tuple(json.loads(row.errors)),
        place=Place(row.part, row.offset, row.line, row.rows),
    )  # fmt: skip


def _entries(ingest: Ingest, items: Sequence[Item], first: int) -> list[Entry]:
    return [entry_of(first + place, item, ingest.gen_config) for place, item in enumerate(items)]


def _held(connection: Connection, ingest: Ingest) -> Row[Any] | None:
    mine = select(ingests).where(ingests.c.batch_id == ingest.batch_id, ingests.c.epoch == ingest.epoch)
    return connection.execute(mine.with_for_update()).first()


def _move(connection: Connection, ingest: Ingest, values: Mapping[str, Any]) -> bool:
    mine = (ingests.c.batch_id == ingest.batch_id, ingests.c.epoch == ingest.epoch)
    return connection.execute(update(ingests).where(*mine).values(values)).rowcount == 1


def _refused(connection: Connection, batch_id: str, chunk_size: int) -> dict[int, int]:
    """Return how many completions each chunk has already: those of its refused lines."""
    # Only the refused lines have completions now.
    number = completions.c.index // chunk_size
    rows = connection.execute(select(number, func.count()).where(completions.c.batch_id == batch_id).group_by(number))
    return {int(chunk): int(count) for chunk, count in rows}


def _remove(connection: Connection, ingest: Ingest, start: int) -> bool:
    if not _move(connection, ingest, {"lease_until": now() + LEASE_S}):
        return False
    for table in (completions, prompts):
        inside = (table.c.batch_id == ingest.batch_id, table.c.index >= start, table.c.index < start + DISCARD_ROWS)
        connection.execute(delete(table).where(*inside))
    return True
