"""The tables. SQL is the truth about a batch; Redis only hints at what to do next.

    batches      one row a batch: what was asked for, where it stands, and running totals, so that progress is one row's read
    prompts      (batch_id, index): the prompts as JSON; none for a prompt that was refused at the rim
    chunks       a range of indexes that is sent, leased, counted and finished as one
    completions  (batch_id, index): the answer or the error of a prompt; written once, whoever delivers it how often
    workers      the workers' last word

Invariants, which the tests recount: a terminal batch has exactly `total` completions, one for each index; `completed` and
`failed` of a batch and of a chunk equal what a recount of `completions` gives; `open_chunks` counts queued and leased chunks.

Locks are taken in one order by everyone: batches by id, then chunks by id, then the rest. Times are Unix seconds of the
database's clock. Migrations build these tables; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class now(FunctionElement[float]):  # noqa: N801  # reads as the SQL function that it is
    """The database's clock as Unix seconds: clocks of workers may be minutes apart, and leases must not notice."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    # Of the statement, not of the transaction: that one may have waited long for a lock. Not clock_timestamp(): being
    # volatile, it would keep the planner from the index on lease_until.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) AS DOUBLE PRECISION)"


def _counter(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", Text, nullable=False),
    Column("gen_config", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("idempotency_key", Text, unique=True),
    # SHA-256 over all that was asked for: the same key with another content is refused.
    Column("content_hash", String(64)),
    Column("status", String(16), nullable=False),
    Column("errors", Text, nullable=False, server_default=text("'[]'")),
    # 0 until every prompt is stored.
    _counter("total"),
    _counter("completed"),
    _counter("failed"),
    _counter("prompt_tokens"),
    _counter("cached_tokens"),
    _counter("completion_tokens"),
    Column("chunk_count", Integer, nullable=False, server_default=text("0")),
    Column("open_chunks", Integer, nullable=False, server_default=text("0")),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("started_at", Double),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("completed_at", Double),
    Column("failed_at", Double),
    # Set when the batch's time is up and its open chunks are being closed; it is EXPIRED when the last one is.
    Column("expiring_at", Double),
    Column("expired_at", Double),
    Column("cancelling_at", Double),
    Column("cancelled_at", Double),
    Column("updated_at", Double, nullable=False),
    Index("ix_batches_created_at_id", "created_at", "id"),
)
_OPEN = text("status IN ('validating', 'in_progress', 'cancelling')")
Index("ix_batches_open", batches.c.expires_at, sqlite_where=_OPEN, postgresql_where=_OPEN)

prompts = Table(
    "prompts",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)

chunks = Table(
    "chunks",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("chunk_count", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    Column("model", Text, nullable=False),
    # Copied from the batch, so that the next chunks to send are one index scan: served by ascending rank (minus the
    # batch's priority), then by age of the batch.
    Column("rank", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("state", String(16), nullable=False),
    # Not null while a message of it is in Redis or a worker holds it.
    Column("sent_at", Double),
    Column("worker", Text),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("lease_until", Double),
    Column("finished_at", Double),
    _counter("completed"),
    _counter("failed"),
    _counter("prompt_tokens"),
    _counter("cached_tokens"),
    _counter("completion_tokens"),
    Index("uq_chunks_batch_id_number", "batch_id", "number", unique=True),
)
_QUEUED = text("state = 'queued'")
_LEASED = text("state = 'leased'")
_SENT = text("sent_at IS NOT NULL")
_LIVE = text("state IN ('queued', 'leased')")
Index(
    "ix_chunks_queued",
    *(chunks.c.model, chunks.c.rank, chunks.c.created_at, chunks.c.batch_id, chunks.c.number),
    sqlite_where=_QUEUED,
    postgresql_where=_QUEUED,
)
Index("ix_chunks_leased", chunks.c.lease_until, sqlite_where=_LEASED, postgresql_where=_LEASED)
Index("ix_chunks_in_flight", chunks.c.model, chunks.c.sent_at, sqlite_where=_SENT, postgresql_where=_SENT)
Index("ix_chunks_open", chunks.c.batch_id, chunks.c.number, sqlite_where=_LIVE, postgresql_where=_LIVE)

completions = Table(
    "completions",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    # Null: the prompt was answered.
    Column("error_code", Text),
    Column("prompt_tokens", Integer, nullable=False, server_default=text("0")),
    Column("cached_tokens", Integer, nullable=False, server_default=text("0")),
    Column("completion_tokens", Integer, nullable=False, server_default=text("0")),
    Column("queue_ms", Double, nullable=False, server_default=text("0")),
    Column("run_ms", Double, nullable=False, server_default=text("0")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("worker", Text),
    Column("recorded_at", Double, nullable=False),
    Column("body", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("heartbeat_at", Double, nullable=False),
    Column("stats", Text, nullable=False),
)
