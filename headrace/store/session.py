"""Engines and transactions: how SQLite and PostgreSQL are opened, what is retried, and which of our errors a fault becomes.

    fault                                            becomes            tried again
    disk full                                        StorageFull        no: space doesn't come back in a second
    locked, deadlock, serialization                  StoreUnavailable   yes, the transaction is known to be undone
    connection refused or lost, server going down    StoreUnavailable   yes, where running it twice does no harm
    no such table or column                          StoreUnavailable   no: the schema is not migrated
    anything else                                    itself             no: it is our bug, and would fail again

This module knows no table and no batch.
"""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, Table, create_engine, event, exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from headrace.errors import HeadraceError, InvalidRequest, StorageFull, StoreUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS: Final = 5
BUSY_TIMEOUT_MS: Final = 30_000
STATEMENT_TIMEOUT_MS: Final = 60_000
_POSTGRES_ARGS: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "application_name": "headrace",
    # The server, too, is to notice that we vanished: a session that it holds for us keeps the locks of its transaction.
    "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c idle_in_transaction_session_timeout=60000 -c lock_timeout=20000 "
    "-c tcp_keepalives_idle=5 -c tcp_keepalives_interval=3 -c tcp_keepalives_count=3 -c tcp_user_timeout=15000",
    # A peer that vanished without a word is noticed within half a minute instead of two hours.
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_SQLITE_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_SQLITE_GONE = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PROTOCOL})
_PG_FULL = "53100"
_PG_UNDONE = frozenset({"40001", "40P01", "55P03"})
_PG_GONE = frozenset({"57P01", "57P02", "57P03", "57P04", "53300", "53200", "25006", "57014"})
_PG_SCHEMA = frozenset({"42P01", "42703", "3D000"})


class Fault(Enum):
    """What an error of the database means to us."""

    FULL = "full"
    UNDONE = "undone"
    LOST = "lost"
    SCHEMA = "schema"
    BUG = "bug"


class Database:
    """One database, through an engine that writes and one that reads. Thread-safe; nothing is connected before first use."""

    def __init__(self, url: str, *, pool_size: int = 20) -> None:
        """Open `sqlite:///PATH` or `postgresql+psycopg://…`; raise `InvalidRequest` for any other URL."""
        self.url = _checked(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        # SQLite lets one writer in at a time and lets the others poll: threads of one process wait in line here instead,
        # because a poller among sixteen may be overtaken for seconds.
        self._turn: AbstractContextManager[Any] = threading.Lock() if self.is_sqlite else nullcontext()
        if self.is_sqlite:
            self.writer = _sqlite_engine(self.url, begin="BEGIN IMMEDIATE", query_only=False, pool_size=2)
            self.reader = _sqlite_engine(self.url, begin="BEGIN", query_only=True, pool_size=pool_size)
        else:
            self.writer = create_engine(
                self.url,
                hide_parameters=True,
                connect_args=_POSTGRES_ARGS,
                pool_pre_ping=True,
                pool_recycle=1800,
                pool_size=pool_size,
                max_overflow=10,
            )
            self.reader = self.writer.execution_options(isolation_level="AUTOCOMMIT")

    def write(self, work: Callable[[Connection], T], *, repeatable: bool = True) -> T:
        """Run `work` in one transaction and commit it; on a transient fault run it again, from the start.

        `repeatable=False`: a commit whose reply was lost must not be followed by a second run. Raises `StorageFull` and
        `StoreUnavailable`.
        """

        def once() -> T:
            with self._turn, self.writer.begin() as connection:
                return work(connection)

        return self._attempt(once, repeatable=repeatable)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which writes nothing. Raises `StoreUnavailable`."""

        def once() -> T:
            with self.reader.connect() as connection:
                return work(connection)

        return self._attempt(once, repeatable=True)

    def change_schema(self, work: Callable[[Connection], None]) -> None:
        """Run `work` in one transaction of a connection of its own, without timeouts."""
        engine = schema_engine(self.url)

        def once() -> None:
            with self._turn, engine.begin() as connection:
                work(connection)

        self._attempt(once, repeatable=True)
        self.close()  # prepared statements and snapshots of the old schema

    def _attempt(self, once: Callable[[], T], *, repeatable: bool) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return once()
            except (exc.DBAPIError, exc.TimeoutError) as error:
                fault = self.classify(error)
                if fault is Fault.BUG:
                    raise
                again = fault is Fault.UNDONE or (fault is Fault.LOST and repeatable)
                if not again or attempt == ATTEMPTS - 1:
                    raise self._translated(error, fault) from error
                pause_s = random.uniform(0.5, 1.0) * 0.05 * 2**attempt  # noqa: S311  # jitter
                log.info(
                    "The database failed (%s); the transaction is tried again in %.2f s", fault.value, pause_s,
                    extra={"event": "store_retry", "fault": fault.value, "attempt": attempt + 1},
                )  # fmt: skip
                time.sleep(pause_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def classify(self, error: Exception) -> Fault:
        """Say what `error` means."""
        if isinstance(error, exc.TimeoutError):
            return Fault.LOST
        if not isinstance(error, exc.DBAPIError):
            return Fault.BUG
        return self._classify_sqlite(error) if self.is_sqlite else _classify_postgres(error)

    def _classify_sqlite(self, error: exc.DBAPIError) -> Fault:
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code is None:
            return Fault.BUG
        if code & 0xFF == sqlite3.SQLITE_FULL:
            return Fault.FULL
        if code & 0xFF in _SQLITE_BUSY:
            return Fault.UNDONE
        if code & 0xFF in _SQLITE_GONE:
            # A full disk shows as an I/O error where SQLite grows its shared-memory or journal file.
            return Fault.FULL if _is_disk_full(self.url) else Fault.LOST
        return Fault.SCHEMA if "no such table" in str(error.orig) or "no such column" in str(error.orig) else Fault.BUG

    def _translated(self, error: Exception, fault: Fault) -> HeadraceError:
        where = self.url.render_as_string(hide_password=True)
        cause = str(getattr(error, "orig", error)).strip().splitlines()
        detail = f" ({where}: {cause[0] if cause else type(error).__name__})"
        if fault is Fault.FULL:
            return StorageFull(f"{StorageFull.__doc__}{detail}")
        if fault is Fault.SCHEMA:
            return StoreUnavailable(f"The database has not the tables of this release; run `headrace migrate`.{detail}")
        return StoreUnavailable(f"{StoreUnavailable.__doc__}{detail}")

    def close(self) -> None:
        """Close every connection; the database can be used again afterwards."""
        self.writer.dispose()
        self.reader.dispose()


def insert_new(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return INSERT … ON CONFLICT DO NOTHING for the connection's dialect."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    return postgresql.insert(table).on_conflict_do_nothing()


def schema_engine(url: URL) -> Engine:
    """Return an engine for migrations: one connection, no timeouts, and on SQLite no foreign keys (its tables are rebuilt)."""
    if url.get_backend_name() != "sqlite":
        return create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    return _sqlite_engine(url, begin="BEGIN IMMEDIATE", query_only=False, foreign_keys=False, pool_size=None)


def absolute_url(text: str) -> str:
    """Return the URL, password included, as it is from every working directory; raise `InvalidRequest` for what is no such URL."""
    return _checked(text).render_as_string(hide_password=False)


def _checked(text: str) -> URL:
    try:
        url = make_url(text)
    except exc.ArgumentError:
        raise InvalidRequest(
            "the database URL is not one of SQLAlchemy's, such as sqlite:///headrace.db", param="database_url"
        ) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        if isinstance(password := url.query.get("password"), str):
            # From here on it is where `render_as_string` hides it.
            url = url.difference_update_query(["password"]).set(password=password)
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise InvalidRequest(f"the database must be sqlite or postgresql, not {backend}", param="database_url")
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        # Each of its connections would be a database of its own.
        raise InvalidRequest("an SQLite database must be a file: sqlite:///PATH", param="database_url")
    return url.set(drivername="sqlite+pysqlite", database=str(Path(url.database).absolute()))


def _sqlite_engine(url: URL, *, begin: str, query_only: bool, pool_size: int | None, foreign_keys: bool = True) -> Engine:
    pool = {"poolclass": NullPool} if pool_size is None else {"pool_size": pool_size, "max_overflow": 30}
    # hide_parameters: an error of the database goes into a log, and what it quotes of a statement's values are prompts and answers.
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, hide_parameters=True, **pool)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours to say, below
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",  # NORMAL may lose the last commits in a power cut
            f"foreign_keys={'ON' if foreign_keys else 'OFF'}",
            "journal_size_limit=67108864",
            "cache_size=-8000",
            f"query_only={'ON' if query_only else 'OFF'}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads first and writes later gets SQLITE_BUSY at once, whatever the timeout.
        connection.exec_driver_sql(begin)

    return engine


def _classify_postgres(error: exc.DBAPIError) -> Fault:
    state = str(getattr(error.orig, "sqlstate", None) or "")
    if state == _PG_FULL:
        return Fault.FULL
    if state in _PG_UNDONE:
        return Fault.UNDONE
    if state in _PG_SCHEMA:
        return Fault.SCHEMA
    if state in _PG_GONE or state.startswith("08") or error.connection_invalidated:
        return Fault.LOST
    # A connection that can't be made, or breaks, carries no state.
    return Fault.LOST if not state and isinstance(error, exc.OperationalError | exc.InterfaceError) else Fault.BUG


def _is_disk_full(url: URL) -> bool:
    try:
        return shutil.disk_usage(Path(url.database or ".").parent).free < 1 << 20
    except OSError:
        return False
