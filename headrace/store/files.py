"""Uploaded files: kept in SQL in parts of bounded size, so that several API processes share them without a disk between them.

A file is 'uploading' until its last part is there; nobody sees it before. What was never completed, and what has expired, is swept.
Of the file of a batch's answers only name and size are here: it is made of the completions while it is read. Nothing here knows what
is in a file.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, insert, or_, select, tuple_, update

from headrace.errors import Conflict, NotFound
from headrace.store.outputs import COUNTED, COUNTING, PURPOSE
from headrace.store.session import Database
from headrace.store.tables import ARRIVING, EXPIRES, file_parts, files, ingests, now

PART_BYTES: Final = 1 << 20
"""Largest part: what is in memory of a file at one time."""
STALL_S: Final = 300.0
"""An upload of which no part arrived for so long is given up: whoever sent it is gone."""
COUNT_LEASE_S: Final = 60.0
"""Whoever counts the bytes of a file of answers, and has not said for so long that it goes on, is gone."""
UPLOADING: Final = "uploading"
PROCESSED: Final = "processed"
_LISTED: Final = (PROCESSED, COUNTING, COUNTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that is there whole. Times are Unix seconds of the database's clock."""

    id: str
    """'file-' and 32 hex digits."""
    owner: str | None
    purpose: str
    filename: str
    """As its sender called it: for eyes, never a path."""
    bytes: int
    lines: int
    """Line ends in it."""
    sha256: str | None
    """Of the content."""
    parts: int
    created_at: float
    expires_at: float | None
    is_counted: bool = True
    """False: a file of answers whose `bytes` are not known yet, and 0."""


def new_file_id() -> str:
    """Return 'file-' and 32 hex digits: 16 of the time, 16 random."""
    return f"file-{time.time_ns():016x}{secrets.token_hex(8)}"


def from_row(row: Row[Any]) -> StoredFile:
    """Return the value of a row of `files`."""
    names = ("id", "owner", "purpose", "filename", "bytes", "lines", "sha256", "parts", "created_at", "expires_at")
    return StoredFile(**{name: getattr(row, name) for name in names}, is_counted=row.state != COUNTING)


def lock(connection: Connection, file_id: str, *, owner: str | None = None) -> StoredFile:
    """Return a file that nobody deletes, and of which nobody else makes a batch, until the transaction ends; raise `NotFound`."""
    query = select(files).where(files.c.id == file_id, files.c.state == PROCESSED, _seen_by(owner)).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"There is no file {file_id!r}; GET /v1/files lists those that exist", param="input_file_id")
    return from_row(row)


def _seen_by(owner: str | None) -> ColumnElement[bool]:
    """Return what is true for the files that `owner` may see: their own; None sees every file."""
    return files.c.id.is_not(None) if owner is None else files.c.owner == owner


class Files:
    """The files of one store. `owner` limits a call to the files of one API key: others are not found. Each call is a transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, *, filename: str, purpose: str, owner: str | None = None) -> str:
        """Make room for an upload and return the file's id."""
        file_id = new_file_id()
        values: dict[str, Any] = {"id": file_id, "owner": owner, "purpose": purpose, "filename": filename, "state": UPLOADING}

        def work(connection: Connection) -> None:
            row = insert(files).values(**values, created_at=now(), updated_at=now())
            connection.execute(row)

        self._database.write(work, repeatable=False)
        return file_id

    def append(self, file_id: str, number: int, body: bytes) -> None:
        """Store part `number` (from 0). Raises `Conflict` when the upload was given up."""
        assert 0 < len(body) <= PART_BYTES, f"a part of {len(body)} bytes"

        def work(connection: Connection) -> None:
            touched = update(files).where(files.c.id == file_id, files.c.state == UPLOADING).values(updated_at=now())
            if connection.execute(touched).rowcount == 0:
                raise Conflict("the upload was given up because nothing arrived for too long; send the file again")
            # A commit whose reply was lost is followed by a second run.
            connection.execute(delete(file_parts).where(file_parts.c.file_id == file_id, file_parts.c.number == number))
            connection.execute(insert(file_parts).values(file_id=file_id, number=number, body=body))

        self._database.write(work)

    def complete(
        self, file_id: str, *, size: int, lines: int, parts: int, sha256: str | None = None, expires_in_s: float | None = None
    ) -> StoredFile:
        """Show the file to everybody, until `expires_in_s` after its creation. Raises `Conflict` when the upload was given up."""

        def work(connection: Connection) -> StoredFile:
            connection.execute(
                update(files)
                .where(files.c.id == file_id, files.c.state == UPLOADING)
                .values(
                    state=PROCESSED,
                    bytes=size,
                    lines=lines,
                    parts=parts,
                    sha256=sha256,
                    updated_at=now(),
                    expires_at=None if expires_in_s is None else files.c.created_at + expires_in_s,
                )
            )
            row = connection.execute(select(files).where(files.c.id == file_id)).first()
            if row is None:
                raise Conflict("the upload was given up because nothing arrived for too long; send the file again")
            return from_row(row)

        return self._database.write(work)

    def abandon(self, file_id: str) -> None:
        """Delete what arrived of an upload that came to nothing."""
        self._database.write(
            lambda connection: connection.execute(delete(files).where(files.c.id == file_id, files.c.state == UPLOADING))
        )

    def get(self, file_id: str, *, owner: str | None = None) -> StoredFile:
        """Return one file. Raises `NotFound`."""
        query = select(files).where(files.c.id == file_id, files.c.state == PROCESSED, _seen_by(owner))
        row = self._database.read(lambda connection: connection.execute(query).first())
        if row is None:
            raise NotFound(f"There is no file {file_id!r}; GET /v1/files lists those that exist", param="file_id")
        return from_row(row)

    def list(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
        purpose: str | None = None,
        owner: str | None = None,
    ) -> list[StoredFile]:
        """Return files, those of answers too, by time of creation, from the one after `after`. Raises `NotFound` when that is unknown."""
        columns = (files.c.created_at, files.c.id)
        listed = select(files).where(files.c.state.in_(_LISTED), _seen_by(owner))
        query = listed.limit(limit)
        query = query.order_by(*(column.desc() if newest_first else column.asc() for column in columns))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if after is not None:
            last = self._database.read(lambda connection: connection.execute(listed.where(files.c.id == after)).first())
            if last is None:
                raise NotFound(f"There is no file {after!r}; GET /v1/files lists those that exist", param="after")
            place = (last.created_at, last.id)
            query = query.where(tuple_(*columns) < place if newest_first else tuple_(*columns) > place)
        return self._database.read(lambda connection: [from_row(row) for row in connection.execute(query)])

    def find_output(self, file_id: str) -> StoredFile | None:
        """Return a file of answers; None where the release that ended its batch didn't list it."""
        query = select(files).where(files.c.id == file_id, files.c.purpose == PURPOSE)
        row = self._database.read(lambda connection: connection.execute(query).first())
        return None if row is None else from_row(row)

    def claim_counting(self) -> StoredFile | None:
        """Take a file of answers whose bytes nobody counts; it is the caller's for `COUNT_LEASE_S` after each `go_on_counting`."""
        waits = and_(files.c.state == COUNTING, files.c.updated_at < now() - COUNT_LEASE_S)
        oldest = select(files).where(waits).order_by(files.c.updated_at).limit(1)

        def work(connection: Connection) -> StoredFile | None:
            row = connection.execute(oldest).first()
            if row is None:
                return None
            taken = update(files).where(files.c.id == row.id, waits).values(updated_at=now())
            return from_row(row) if connection.execute(taken).rowcount == 1 else None

        # Asked often, and there is seldom one: a write would wait in line for SQLite's only writer.
        if self._database.read(lambda connection: connection.execute(oldest).first()) is None:
            return None
        return self._database.write(work)

    def go_on_counting(self, file_id: str) -> bool:
        """Renew the claim; False when the file is gone."""
        touched = update(files).where(files.c.id == file_id, files.c.purpose == PURPOSE).values(updated_at=now())
        return self._database.write(lambda connection: connection.execute(touched).rowcount == 1)

    def set_size(self, file_id: str, size: int) -> None:
        """Note the bytes of a file of answers."""
        counted = update(files).where(files.c.id == file_id, files.c.purpose == PURPOSE)
        self._database.write(lambda connection: connection.execute(counted.values(bytes=size, state=COUNTED, updated_at=now())))

    def delete(self, file_id: str, *, owner: str | None = None) -> None:
        """Delete a file. Raises `NotFound`, and `Conflict` while a batch is being read from it; later its batches don't need it."""

        def work(connection: Connection) -> None:
            lock(connection, file_id, owner=owner)
            if connection.execute(select(ingests.c.batch_id).where(ingests.c.file_id == file_id)).first() is not None:
                raise Conflict(
                    "a batch is being read from this file; delete it when the batch is in_progress, or cancel the batch"
                )
            connection.execute(delete(files).where(files.c.id == file_id))

        self._database.write(work, repeatable=False)

    def part(self, file_id: str, number: int) -> bytes:
        """Return one part. Raises `NotFound`."""
        query = select(file_parts.c.body).where(file_parts.c.file_id == file_id, file_parts.c.number == number)
        body = self._database.read(lambda connection: connection.execute(query).scalar())
        if body is None:
            raise NotFound(f"no part {number} of file {file_id}", param="file_id")
        return bytes(body)

    def stream(self, file: StoredFile) -> Iterator[bytes]:
        """Yield the content, one part in memory; no transaction is open between parts. Raises `NotFound` once it is deleted."""
        for number in range(file.parts):
            yield self.part(file.id, number)

    def sweep(self, *, retention_s: float | None = None, limit: int = 20) -> int:
        """Delete uploads that nobody completed, and files that expired or are older than `retention_s`; return how many.

        A file that a batch is being read from is left for later.
        """
        # One query for each, so that each has its index: the files of batches that are over may be a million.
        reasons = [
            and_(ARRIVING, files.c.updated_at < now() - STALL_S),
            and_(EXPIRES, files.c.state == PROCESSED, files.c.expires_at <= now()),
        ]
        if retention_s is not None:
            reasons.append(and_(files.c.state == PROCESSED, files.c.created_at < now() - retention_s))
        is_read = exists().where(ingests.c.file_id == files.c.id)

        def find(connection: Connection) -> list[str]:
            found: list[str] = []
            for reason in reasons:
                query = select(files.c.id).where(reason, ~is_read).limit(limit)
                found.extend(connection.execute(query).scalars())
            return found[:limit]

        def work(connection: Connection, file_id: str) -> int:
            # One at a time: each of them may be gigabytes. Held first: whoever makes a batch of it holds it too, and PostgreSQL does
            # not ask anew whether it is read when a DELETE has waited for them.
            held = select(files.c.id).where(files.c.id == file_id, or_(*reasons)).with_for_update(skip_locked=True)
            if connection.execute(held).first() is None:
                return 0
            return connection.execute(delete(files).where(files.c.id == file_id, ~is_read)).rowcount

        ids = dict.fromkeys(self._database.read(find))
        return sum(self._database.write(lambda connection, one=file_id: work(connection, one)) for file_id in ids)  # type: ignore[misc]
