"""The tables. SQL is the truth about a batch; Redis only hints at what to do next.

    batches      one row a batch: what was asked for, where it stands, and running totals, so that progress is one row's read
    prompts      (batch_id, index): the prompts as JSON; no row, or one without a body, for a prompt that was refused at the rim
    chunks       a range of indexes that is sent, leased, counted and finished as one
    completions  (batch_id, index): the answer or the error of a prompt; written once, whoever delivers it how often
    workers      the workers' last word
    files        uploaded files, in `file_parts` of bounded size, and the names and sizes of the files of answers
    ingests      how far the file of a batch that is `validating` is read, and by whom: gone when the batch is open
    api_keys     who may call the API, and how much of it; a key itself is not here, only its hash
    lanes        whose turn it is: how far each owner got at each priority of a model (see `headrace.store.turns`)

Invariants, which the tests recount: a terminal batch has exactly `total` completions, one for each index; `completed` and
`failed` of a batch and of a chunk equal what a recount of `completions` gives; `open_chunks` counts queued and leased chunks.

Locks are taken in one order by everyone: batches by id, then chunks by id, then the rest. Times are Unix seconds of the
database's clock. Migrations build these tables; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text, text
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
    # Of an owner's request it begins with the owner's id, so that nobody meets another's keys.
    Column("idempotency_key", Text, unique=True),
    # The id of the API key that sent it; null where no key of the table did. No foreign key: keys are revoked, never deleted.
    Column("owner", String(64)),
    # Whose share of the workers it uses: `owner`, or '' for all that have none.
    Column("lane", String(64), nullable=False, server_default=text("''")),
    # How much of its lane's time it has used; the lowest is served next.
    Column("turn", Double, nullable=False, server_default=text("0")),
    # Prompts that were announced: they count against quotas until `total` is known.
    _counter("reserved"),
    # The file that its prompts were read from; null: they came in the request. No foreign key: a file may be deleted before its batches.
    Column("input_file_id", String(64), index=True),
    # How often its sender had sent the request when it was last answered: what finds it again where a reply was lost.
    Column("resent", Integer, nullable=False, server_default=text("0")),
    # SHA-256 over all that was asked for: the same key with another content is refused.
    Column("content_hash", String(64)),
    Column("status", String(16), nullable=False),
    Column("errors", Text, nullable=False, server_default=text("'[]'")),
    # 0 until every prompt is stored.
    _counter("total"),
    _counter("completed"),
    _counter("failed"),
    # The sum of its chunks'.
    _counter("begun"),
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
OPEN = text("status IN ('validating', 'in_progress', 'cancelling')")
# Literals, and used as they stand by the queries that need these indexes: SQLite takes a partial index for its own words only.
RUNNING = text("status = 'in_progress'")
GONE = text("status = 'deleting'")
Index("ix_batches_open", batches.c.expires_at, sqlite_where=OPEN, postgresql_where=OPEN)
Index("ix_batches_gone", batches.c.id, sqlite_where=GONE, postgresql_where=GONE)
Index("ix_batches_owner_created_at_id", batches.c.owner, batches.c.created_at, batches.c.id)
Index(
    "ix_batches_turn",
    *(batches.c.model, batches.c.priority, batches.c.lane, batches.c.turn, batches.c.created_at, batches.c.id),
    sqlite_where=RUNNING,
    postgresql_where=RUNNING,
)

prompts = Table(
    "prompts",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    # Null: refused at the rim, kept for its custom_id.
    Column("body", Text),
    # What its sender calls it.
    Column("custom_id", Text),
    # Null: the batch's.
    Column("gen_config", Text),
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
    # Minus the batch's priority. Which batch is served next is said by `batches.turn`.
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
    # Its prompts up to the last one that a worker has answered: engines begin them in their order, so these have been begun.
    _counter("begun"),
    _counter("prompt_tokens"),
    _counter("cached_tokens"),
    _counter("completion_tokens"),
    Index("uq_chunks_batch_id_number", "batch_id", "number", unique=True),
)
UNSENT = text("state = 'queued' AND sent_at IS NULL")
LEASED = text("state = 'leased'")
IN_FLIGHT = text("sent_at IS NOT NULL")
_LIVE = text("state IN ('queued', 'leased')")
Index("ix_chunks_unsent", chunks.c.batch_id, chunks.c.number, sqlite_where=UNSENT, postgresql_where=UNSENT)
Index("ix_chunks_leased", chunks.c.lease_until, sqlite_where=LEASED, postgresql_where=LEASED)
Index("ix_chunks_in_flight", chunks.c.model, chunks.c.sent_at, sqlite_where=IN_FLIGHT, postgresql_where=IN_FLIGHT)
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

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    # The first characters of the key, by which its holder knows it again.
    Column("prefix", String(16), nullable=False),
    # SHA-256 in hex. A key is 256 random bits: nobody finds it by trying, so a slow hash would only slow down every request.
    Column("hash", String(64), nullable=False, unique=True),
    # 'user': its own batches and files; 'admin': everybody's.
    Column("role", String(16), nullable=False, server_default=text("'user'")),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    # Exact to a minute: it isn't worth a write for each request.
    Column("last_used_at", Double),
    # Null: no limit of its own.
    Column("max_active_prompts", BigInteger),
    Column("max_active_batches", Integer),
    # Null: it chooses as it likes.
    Column("max_priority", Integer),
    # Its share of the workers beside the others of the same priority.
    Column("weight", Integer, nullable=False, server_default=text("1")),
)

lanes = Table(
    "lanes",
    metadata,
    Column("model", Text, primary_key=True),
    Column("priority", Integer, primary_key=True, autoincrement=False),
    Column("lane", String(64), primary_key=True),
    # Virtual time, in prompts by weight: where its last chunk began and ended.
    Column("began", Double, nullable=False, server_default=text("0")),
    Column("ended", Double, nullable=False, server_default=text("0")),
    # The `turn` of the batch that was served last, as it was then: a new batch begins here.
    Column("clock", Double, nullable=False, server_default=text("0")),
    # Of a model's own row (`turns.GRACE_ROW`): chunks that went before lower priorities.
    Column("passed_over", Integer, nullable=False, server_default=text("0")),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64)),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    # 'uploading' until the last part is there, then 'processed'. A file of answers, which has no parts: 'counting' until its size is
    # known, then 'counted'.
    Column("state", String(16), nullable=False),
    _counter("bytes"),
    # Line ends: what a batch of it announces before it is read.
    _counter("lines"),
    # Of the content: two uploads of it are one request under one idempotency key.
    Column("sha256", String(64)),
    Column("parts", Integer, nullable=False, server_default=text("0")),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("expires_at", Double),
    Index("ix_files_created_at_id", "created_at", "id"),
    Index("ix_files_owner_created_at_id", "owner", "created_at", "id"),
)
COUNTING = text("state = 'counting'")
Index("ix_files_counting", files.c.updated_at, sqlite_where=COUNTING, postgresql_where=COUNTING)
ARRIVING = text("state = 'uploading'")
Index("ix_files_arriving", files.c.updated_at, sqlite_where=ARRIVING, postgresql_where=ARRIVING)
EXPIRES = text("expires_at IS NOT NULL")
Index("ix_files_expires_at", files.c.expires_at, sqlite_where=EXPIRES, postgresql_where=EXPIRES)

file_parts = Table(
    "file_parts",
    metadata,
    Column("file_id", String(64), ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    # From 0; parts are cut anywhere, also inside a line or a character.
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)

ingests = Table(
    "ingests",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("file_id", String(64), nullable=False, index=True),
    Column("chunk_size", Integer, nullable=False),
    # The first byte that isn't read yet, lines read, and prompts stored; they change in the transaction that stores the prompts.
    Column("part", Integer, nullable=False, server_default=text("0")),
    Column("offset", Integer, nullable=False, server_default=text("0")),
    _counter("line"),
    _counter("rows"),
    # What is wrong with the file as a whole; once there is something, no more prompts are stored.
    Column("errors", Text, nullable=False, server_default=text("'[]'")),
    # As those of a chunk: the reader's right to go on.
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    # Claims since the last progress.
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("lease_until", Double, nullable=False, server_default=text("0")),
    Column("created_at", Double, nullable=False),
)
