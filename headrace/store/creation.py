"""How a batch comes in: prompts are written as they arrive, in slices, and nobody sees a chunk of it before the last is stored.

A million prompts in one transaction would keep every other writer out for half a minute; the whole list in memory would be
gigabytes. So the batch is `validating` while slices are committed, and one last transaction makes its chunks and opens it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, delete, insert, select, update

from headrace.batch import BatchStatus, Item, window_seconds
from headrace.completion import CompletionError
from headrace.config import GenerationConfig, Prompt
from headrace.errors import HeadraceError, InvalidRequest, NotStored
from headrace.settings import MAX_CHUNK_SIZE
from headrace.store.admission import admit
from headrace.store.lifecycle import advance, lock_batch, settle
from headrace.store.results import insert_rows, to_row
from headrace.store.session import Database, insert_new
from headrace.store.tables import batches, chunks, now, prompts
from headrace.store.values import ChunkState, refusal, to_json

SLICE_ROWS: Final = 2000
SLICE_CHARS: Final = 4 * 1024 * 1024
SILENCE_S: Final = 15.0
"""A submission of which no slice arrived for so long is taken over by the next one with its idempotency key: its sender or the
process that stored it was killed. Slices of a living one come many times a second."""
_OPEN_TO_PROMPTS = (BatchStatus.VALIDATING.value, BatchStatus.CANCELLING.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a caller asks for, the prompts apart."""

    gen_config: GenerationConfig
    model: str
    chunk_size: int = 64
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    completion_window: str = "24h"
    endpoint: str = "/v1/batches"
    idempotency_key: str | None = None
    owner: str | None = None
    """The API key that sends it."""
    reserved: int = 0
    """Prompts that it announces, counted against limits before they are stored; 0: not known yet."""
    max_open_prompts: int | None = None
    """While so many prompts of all batches are open, nothing more is taken."""

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_size <= MAX_CHUNK_SIZE:
            raise InvalidRequest(f"chunk_size must be from 1 to {MAX_CHUNK_SIZE}, not {self.chunk_size}", param="chunk_size")
        window_seconds(self.completion_window)

    @property
    def stored_key(self) -> str | None:
        """The idempotency key as it is stored: of an owner's request with the owner's id, so that two owners never meet."""
        is_shared = self.idempotency_key is None or self.owner is None
        return self.idempotency_key if is_shared else f"{self.owner} {self.idempotency_key}"

    def header(self) -> dict[str, Any]:
        """Return what counts, beside the prompts, as the content of a request."""
        return {
            "gen_config": self.gen_config.to_dict(), "model": self.model, "metadata": dict(sorted(self.metadata.items())),
            "priority": self.priority, "completion_window": self.completion_window, "endpoint": self.endpoint,
        }  # fmt: skip


class Entry(NamedTuple):
    """One element of a batch as it is stored."""

    position: int
    body: str | None
    """The prompt as JSON; None: refused."""
    error: CompletionError | None = None
    custom_id: str | None = None
    gen_config: str | None = None
    """Its own config as JSON."""

    @property
    def size(self) -> int:
        """Characters, roughly."""
        return len(self.body or "") + len(self.custom_id or "") + len(self.gen_config or "")


def entry_of(index: int, item: Prompt | CompletionError | Item, default: GenerationConfig) -> Entry:
    """Return the entry of one element; a config that is the batch's `default` isn't written down again."""
    own = item if isinstance(item, Item) else Item(item)
    config = None if own.gen_config is None or own.gen_config == default else _config_json(own.gen_config)
    if isinstance(own.prompt, CompletionError):
        return Entry(index, None, own.prompt, own.custom_id, config)
    return Entry(index, to_json(own.prompt), None, own.custom_id, config)


# Few: a config may be as large as its line, and these stay in memory.
@lru_cache(maxsize=16)
def _config_json(config: GenerationConfig) -> str:
    return to_json(config.to_dict())


@dataclass(slots=True)
class _Intake:
    """Reads the prompts once, and keeps of them what fits in a few bytes each."""

    order: Order
    total: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    """Prompts refused at the rim, by chunk number from 0."""
    digest: Any = None

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(to_json(self.order.header()).encode())

    def slices(self, items: Iterable[Prompt | CompletionError | Item]) -> Iterator[list[Entry]]:
        """Yield what is to be stored in slices of bounded size."""
        batch: list[Entry] = []
        size = 0
        for index, item in enumerate(items):
            entry = entry_of(index, item, self.order.gen_config)
            if entry.error is not None:
                chunk = index // self.order.chunk_size
                self.refused[chunk] = self.refused.get(chunk, 0) + 1
                self.digest.update(to_json([entry.error.code, entry.error.message]).encode())
            self.digest.update((entry.body or "").encode())
            if entry.custom_id is not None or entry.gen_config is not None:
                self.digest.update(to_json([entry.custom_id, entry.gen_config]).encode())
            self.digest.update(b"\n")
            size += entry.size
            self.total = index + 1
            batch.append(entry)
            if len(batch) >= SLICE_ROWS or size >= SLICE_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def new_batch_id() -> str:
    """Return 'batch_' and 32 hex digits: 16 of the time, so that rows of one batch lie together in every index, 16 random."""
    return f"batch_{time.time_ns():016x}{secrets.token_hex(8)}"


def create(database: Database, items: Iterable[Prompt | CompletionError | Item], order: Order) -> str:
    """Store a batch and return its id; of two calls with one idempotency key and the same content the second stores nothing.

    Raises `InvalidRequest` (no prompts; the key was used with another content), `NotStored` (the key's first request is still being
    stored), `QueueFull`, `QuotaExceeded`, `StorageFull`, `StoreUnavailable`, and whatever `items` raises; nothing stays behind then.
    """
    batch_id = new_batch_id()
    intake = _Intake(order)
    existing = database.write(lambda connection: open_batch(connection, batch_id, order))
    if existing is not None:
        return _same_as(existing, intake, items)
    try:
        for rows in intake.slices(items):
            database.write(lambda connection, rows=rows: _store(connection, batch_id, rows))  # type: ignore[misc]
        database.write(lambda connection: _seal(connection, batch_id, intake))
    except BaseException:
        # What can't be removed now is given up by the sweep, after `STALL_S`.
        with contextlib.suppress(HeadraceError):
            database.write(lambda connection: connection.execute(delete(batches).where(batches.c.id == batch_id)))
        raise
    return batch_id


def open_batch(connection: Connection, batch_id: str, order: Order, **columns: Any) -> Row[Any] | None:
    """Insert the batch's row, with further `columns`; return the other batch that has its idempotency key, if there is one."""
    header = order.header()
    if order.idempotency_key is not None:
        connection.execute(
            delete(batches).where(
                batches.c.idempotency_key == order.stored_key,
                batches.c.status == BatchStatus.VALIDATING.value,
                # A batch that is read from a file needs no sender.
                batches.c.input_file_id.is_(None),
                batches.c.updated_at < now() - SILENCE_S,
            )
        )
    connection.execute(
        insert_new(connection, batches).values(
            **{**header, "gen_config": to_json(header["gen_config"]), "metadata": to_json(header["metadata"])},
            **columns,
            id=batch_id,
            owner=order.owner,
            lane=order.owner or "",
            idempotency_key=order.stored_key,
            reserved=order.reserved,
            status=BatchStatus.VALIDATING.value,
            created_at=now(),
            updated_at=now(),
            expires_at=now() + window_seconds(order.completion_window),
        )
    )
    if order.idempotency_key is not None:
        same_key = select(batches).where(batches.c.idempotency_key == order.stored_key, batches.c.id != batch_id)
        if (existing := connection.execute(same_key).first()) is not None:
            return existing
    # After the key: who only repeats a request that was accepted is not refused.
    most = order.max_open_prompts
    admit(connection, batch_id, owner=order.owner, prompts=order.reserved, priority=order.priority, max_open_prompts=most)
    return None


def _same_as(existing: Row[Any], intake: _Intake, items: Iterable[Prompt | CompletionError | Item]) -> str:
    if existing.content_hash is None:
        raise NotStored("the first request with this idempotency key is still being stored; send it again in a moment")
    for _ in intake.slices(items):
        pass
    if intake.digest.hexdigest() != existing.content_hash:
        raise InvalidRequest("this idempotency key was used with another request; take a new key", param="idempotency_key")
    return str(existing.id)


def _store(connection: Connection, batch_id: str, rows: list[Entry]) -> None:
    touched = connection.execute(
        update(batches).where(batches.c.id == batch_id, batches.c.status.in_(_OPEN_TO_PROMPTS)).values(updated_at=now())
    )
    if touched.rowcount == 0:
        raise NotStored("the batch was given up because no prompt arrived for too long; send it again")
    store_entries(connection, batch_id, rows)


def store_entries(connection: Connection, batch_id: str, rows: Sequence[Entry]) -> None:
    """Insert prompts, and the failed completions of those that were refused."""
    # A refused one that nobody named has nothing to remember.
    named = [row for row in rows if row.error is None or row.custom_id is not None]
    if named:
        connection.execute(
            insert_new(connection, prompts),
            [
                {
                    "batch_id": batch_id,
                    "index": row.position,
                    "body": row.body,
                    "custom_id": row.custom_id,
                    "gen_config": row.gen_config,
                }
                for row in named
            ],
        )
    refused = [refusal(row.position, row.error) for row in rows if row.error is not None]
    if refused:
        at = connection.execute(select(now())).scalar_one()
        insert_rows(connection, [to_row(batch_id, completion, recorded_at=at, worker=None) for completion in refused])


def _seal(connection: Connection, batch_id: str, intake: _Intake) -> None:
    """Make the chunks and open the batch; end it at once if every prompt was refused. A second run changes nothing."""
    if intake.total == 0:
        raise InvalidRequest("a batch needs at least one prompt", param="prompts")
    row = lock_batch(connection, batch_id)
    if row is None or row.status not in _OPEN_TO_PROMPTS:
        if row is not None and row.total > 0:
            return
        raise NotStored("the batch was given up because no prompt arrived for too long; send it again")
    if row.total > 0:
        return
    seal(connection, row, total=intake.total, chunk_size=intake.order.chunk_size, refused=intake.refused)
    connection.execute(update(batches).where(batches.c.id == batch_id).values(content_hash=intake.digest.hexdigest()))


def seal(connection: Connection, batch: Row[Any], *, total: int, chunk_size: int, refused: Mapping[int, int]) -> None:
    """Make the chunks of a locked batch whose prompts are stored, and open it. `refused`: prompts refused, by chunk number from 0."""
    if total > batch.reserved:  # it had not said how many would come
        admit(connection, batch.id, owner=batch.owner, prompts=total, priority=batch.priority)
    rows = list(_chunk_rows(batch, total, chunk_size, refused))
    for start in range(0, len(rows), SLICE_ROWS):
        connection.execute(insert(chunks), rows[start : start + SLICE_ROWS])
    connection.execute(
        update(batches)
        .where(batches.c.id == batch.id)
        .values(
            total=total,
            failed=sum(refused.values()),
            chunk_count=len(rows),
            open_chunks=sum(chunk["state"] == ChunkState.QUEUED for chunk in rows),
        )
    )
    advance(connection, batch.id, BatchStatus.IN_PROGRESS)
    settle(connection, batch.id)


def _chunk_rows(batch: Row[Any], total: int, size: int, refused: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    count = -(-total // size)
    for number in range(count):
        start, stop = number * size, min(total, (number + 1) * size)
        failed = refused.get(number, 0)
        is_done = failed == stop - start
        yield {
            "id": f"{batch.id.replace('batch_', 'chunk_', 1)}_{number + 1:07d}",
            "batch_id": batch.id,
            "number": number + 1,
            "chunk_count": count,
            "start": start,
            "stop": stop,
            "model": batch.model,
            "rank": -batch.priority,
            "created_at": batch.created_at,
            "state": (ChunkState.DONE if is_done else ChunkState.QUEUED).value,
            "finished_at": batch.created_at if is_done else None,
            "failed": failed,
        }
