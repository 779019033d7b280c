"""Completions: written once each, counted as they are written, read back by index.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import Connection, Row, Table, select, update

from headrace.completion import Completion, TokenUsage
from headrace.crash import crash_point
from headrace.store import chunks as chunk_queries
from headrace.store.lifecycle import close_chunks, is_stopping
from headrace.store.outputs import names_of
from headrace.store.ranges import read_page
from headrace.store.session import insert_new
from headrace.store.tables import batches, chunks, completions, now
from headrace.store.values import ChunkState, Claim, RecordResult, RecordStatus, decode_answer, encode_answer

Entry = tuple[Claim, Sequence[Completion]]


@dataclass(slots=True)
class _Tally:
    """What a set of rows adds to the counters."""

    completed: int = 0
    failed: int = 0
    begun: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        if row["error_code"] is None:
            self.completed += 1
        else:
            self.failed += 1
        self.prompt_tokens += row["prompt_tokens"]
        self.cached_tokens += row["cached_tokens"]
        self.completion_tokens += row["completion_tokens"]

    def merge(self, other: _Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def rows(self) -> int:
        return self.completed + self.failed

    def increments(self, table: Table) -> dict[str, Any]:
        return {name: table.c[name] + getattr(self, name) for name in self.__slots__}


def to_row(batch_id: str, completion: Completion, *, recorded_at: float, worker: str | None) -> dict[str, Any]:
    """Return the completion as a row of the table."""
    return {
        "batch_id": batch_id,
        "index": completion.index,
        "error_code": None if completion.error is None else completion.error.code,
        "prompt_tokens": completion.usage.prompt_tokens,
        "cached_tokens": completion.usage.cached_tokens,
        "completion_tokens": completion.usage.completion_tokens,
        "queue_ms": completion.queue_ms,
        "run_ms": completion.run_ms,
        "attempts": completion.attempts,
        "worker": worker,
        "recorded_at": recorded_at,
        "body": encode_answer(completion.choices, completion.error, completion.prompt_logprobs, completion.token_texts),
    }


def from_row(row: Row[Any], names: Mapping[int, str]) -> Completion:
    """Undo `to_row`; `names` has, by index, what senders call their prompts."""
    answer = decode_answer(row.body)
    index = row._mapping["index"]  # noqa: SLF001  # public, for names that a tuple has too
    return Completion(
        index=index,
        custom_id=names.get(index),
        choices=answer.choices,
        usage=TokenUsage(
            prompt_tokens=row.prompt_tokens, cached_tokens=row.cached_tokens, completion_tokens=row.completion_tokens
        ),
        prompt_logprobs=answer.prompt_logprobs,
        token_texts=answer.token_texts,
        error=answer.error,
        queue_ms=row.queue_ms,
        run_ms=row.run_ms,
        attempts=row.attempts,
    )


def insert_rows(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Insert the rows that are not there yet; return the (batch_id, index) of exactly those."""
    if not rows:
        return set()
    statement = insert_new(connection, completions).returning(completions.c.batch_id, completions.c.index)
    return {(batch_id, index) for batch_id, index in connection.execute(statement, list(rows))}


def record(connection: Connection, entries: Sequence[Entry]) -> list[RecordResult]:
    """Write the completions of several claims; a claim that is void takes nothing from the others. Results in `entries` order."""
    crash_point("before_flush")
    held = chunk_queries.lock(connection, [claimed.chunk_id for claimed, _ in entries])
    verdicts = {claimed: _judge(held, claimed) for claimed, _ in entries}
    tallies = _write(connection, [entry for entry in entries if verdicts[entry[0]].writes], held)
    _move_on(connection, held, verdicts)
    return [
        RecordResult(claim=claimed, status=verdicts[claimed].status, inserted=tallies[claimed].rows) for claimed, _ in entries
    ]


def record_late(connection: Connection, entries: Sequence[Entry]) -> list[RecordResult]:
    """Write completions whatever became of their claims, and leave leases and chunks as they are. Results in `entries` order.

    An answer is one of its prompt under whichever claim it was computed; the epoch keeps a void claim from moving the chunk, and
    (batch, index) keeps a row from being written or counted twice. A closed chunk has all its rows.
    """
    held = chunk_queries.lock(connection, [claimed.chunk_id for claimed, _ in entries])
    open_states = (ChunkState.QUEUED, ChunkState.LEASED)
    open_ones = {chunk_id for chunk_id, row in held.chunks.items() if row.state in open_states}
    tallies = _write(connection, [entry for entry in entries if entry[0].chunk_id in open_ones], held)
    return [
        RecordResult(
            claim=claimed,
            status=RecordStatus.OK if claimed.chunk_id in open_ones else RecordStatus.CANCELLED,
            inserted=tallies[claimed].rows,
        )
        for claimed, _ in entries
    ]


def _write(connection: Connection, entries: Sequence[Entry], held: chunk_queries.Held) -> defaultdict[Claim, _Tally]:
    """Insert the rows that are missing and count them; return what each claim has added."""
    rows: dict[tuple[str, int], tuple[Claim, dict[str, Any]]] = {}
    for claimed, answers in entries:
        for answer in answers:
            assert claimed.start <= answer.index < claimed.stop, f"index {answer.index} is not of {claimed.chunk_id}"
            row = to_row(claimed.batch_id, answer, recorded_at=held.at, worker=claimed.worker)
            rows.setdefault((claimed.batch_id, answer.index), (claimed, row))
    tallies: defaultdict[Claim, _Tally] = defaultdict(_Tally)
    begun: dict[str, int] = {chunk_id: row.begun for chunk_id, row in held.chunks.items()}
    for key in insert_rows(connection, [row for _, row in rows.values()]):
        claimed, row = rows[key]
        tally, index = tallies[claimed], key[1]
        tally.add(row)
        tally.begun += max(0, index + 1 - claimed.start - begun[claimed.chunk_id])
        begun[claimed.chunk_id] = max(begun[claimed.chunk_id], index + 1 - claimed.start)
    crash_point("mid_flush")
    _count(connection, tallies)
    return tallies


class _Verdict(Enum):
    """What happens to the rows of a claim, and to its chunk."""

    EXTEND = "extend"
    """Written; the worker goes on."""
    KEEP = "keep"
    """Done already, the reply to an earlier commit was lost: written (which does nothing), the chunk is left alone."""
    CLOSE = "close"
    """The batch is stopping: what is ready is kept, the rest gets the batch's error."""
    GONE = "gone"
    """The chunk was closed."""
    FENCED = "fenced"

    @property
    def writes(self) -> bool:
        return self in (_Verdict.EXTEND, _Verdict.KEEP, _Verdict.CLOSE)

    @property
    def status(self) -> RecordStatus:
        if self in (_Verdict.EXTEND, _Verdict.KEEP):
            return RecordStatus.OK
        return RecordStatus.FENCED if self is _Verdict.FENCED else RecordStatus.CANCELLED


def _judge(held: chunk_queries.Held, claimed: Claim) -> _Verdict:
    row = held.chunks.get(claimed.chunk_id)
    if row is None:
        return _Verdict.FENCED
    if row.state == ChunkState.CANCELLED:
        return _Verdict.GONE
    if row.epoch != claimed.epoch:
        return _Verdict.FENCED
    if row.state == ChunkState.DONE:
        return _Verdict.KEEP
    return _Verdict.CLOSE if is_stopping(held.batches[row.batch_id]) else _Verdict.EXTEND


def _count(connection: Connection, tallies: Mapping[Claim, _Tally]) -> None:
    of_batches: dict[str, _Tally] = {}
    for claimed, tally in tallies.items():
        if tally.rows:
            connection.execute(update(chunks).where(chunks.c.id == claimed.chunk_id).values(tally.increments(chunks)))
            of_batches.setdefault(claimed.batch_id, _Tally()).merge(tally)
    for batch_id, tally in of_batches.items():
        connection.execute(
            update(batches).where(batches.c.id == batch_id).values(**tally.increments(batches), updated_at=now())
        )


def _move_on(connection: Connection, held: chunk_queries.Held, verdicts: Mapping[Claim, _Verdict]) -> None:
    for claimed, verdict in verdicts.items():
        if verdict is _Verdict.EXTEND:
            chunk_queries.extend(connection, claimed, claimed.lease_s)
        elif verdict is _Verdict.CLOSE:
            counted = connection.execute(select(chunks).where(chunks.c.id == claimed.chunk_id)).all()
            close_chunks(connection, held.batches[claimed.batch_id], counted)


def page(connection: Connection, batch_id: str, *, after: int, limit: int) -> list[Completion]:
    """Return up to `limit` completions with an index above `after`, by index."""
    query = select(completions).where(completions.c.batch_id == batch_id)
    rows = read_page(connection, query, completions.c.index, batch_id=batch_id, after=after, limit=limit)
    names = names_of(connection, batch_id, [row._mapping["index"] for row in rows])  # noqa: SLF001  # as in `from_row`
    return [from_row(row, names) for row in rows]
