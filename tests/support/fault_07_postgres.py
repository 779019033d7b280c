"""PostgreSQL is restarted, killed, moved, locked, made read-only and filled with connections, every few seconds, under load.

What is waited for heals by itself; a programming error does not, and is raised at once.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from fault_ground import Ground, Say, ground, rest, texts
from servers import PostgresServer
from sqlalchemy import exc, text
from store_driver import execute
from worker_process import HeadraceProcess, wait_for

TITLE = "PostgreSQL restarted, killed, moved, locked, read-only, out of connections"
LONG_S = 300.0
BATCH = 2000


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Let faults fall on the server while two workers answer; in the long form for five minutes."""
    rows = 24_000 if long else 400
    draw = random.Random(seed)
    with ground(chunk_size=16, dispatch_window=32) as field:
        crew = [field.worker(pause_s=1.0 if long else 0.5) for _ in range(2)]
        sizes = [BATCH] * (rows // BATCH) + ([rows % BATCH] if rows % BATCH else [])
        batches = {field.service.submit(texts(size)): size for size in sizes}
        for worker in crew:
            field.service.ready(worker)
        monkey = _Monkey(field, crew, draw, longest_s=5.0 if long else 0.5)
        until = time.monotonic() + LONG_S
        deck = [] if long else ["spool", "locked"]
        while deck or (long and time.monotonic() < until):
            rest(draw.uniform(5, 20) if long else 0.5, lambda: None)
            if not deck:
                deck = sorted(monkey.faults)
                draw.shuffle(deck)
            kind = deck.pop()
            monkey.faults[kind]()
            monkey.counts[kind] += 1
            say(f"{kind}, {sum(field.service.done(batch_id) for batch_id in batches)} rows")
            if long and time.monotonic() > until:
                break
        field.wait_over(*batches, timeout_s=600)
        judged = [field.judge(batch_id, texts(size)) for batch_id, size in batches.items()]
        logs = "".join(path.read_text(errors="replace") for path in field.folder.glob("gpu*.log"))
        spools = list((field.folder / "spool").glob("*.spool"))
        assert not spools, f"answers are left in {spools}"
        assert logs.count("[spool_replayed]") >= monkey.left_on_disk, "a killed worker's answers were not taken up"
        wrong = _programming_errors(field, crew[0])
        return {
            "rows": sum(counts["rows"] for counts in judged), "lost": 0, "doubled": 0, "failed": sum(c["failed"] for c in judged),
            "faults": sum(monkey.counts.values()), **{f"fault_{kind}": count for kind, count in sorted(monkey.counts.items())},
            "outages_waited_for": logs.count("[store_outage]"), "spools_replayed": logs.count("[spool_replayed]"), **wrong,
            **field.again_pct(rows),
        }  # fmt: skip


class _Monkey:
    """Does one kind of harm to the server at a time, and ends it."""

    def __init__(self, field: Ground, crew: list[HeadraceProcess], draw: random.Random, *, longest_s: float) -> None:
        """`longest_s`: for how long the server is down at most."""
        assert field.postgres is not None
        self._field = field
        self._server: PostgresServer = field.postgres
        self._crew = crew
        self._draw = draw
        self._longest_s = longest_s
        self.counts: Counter[str] = Counter()
        self.left_on_disk = 0
        self.faults: dict[str, Callable[[], None]] = {
            "fast": self._fast, "immediate": self._immediate, "kill": self._kill, "moved": self._moved, "readonly": self._readonly,
            "connections": self._connections, "locked": self._locked, "cut": self._cut, "spool": self._spool,
        }  # fmt: skip

    def _down(self) -> None:
        time.sleep(self._draw.uniform(0, self._longest_s))
        self._server.start()

    def _fast(self) -> None:
        self._server.stop()
        self._down()

    def _immediate(self) -> None:
        """As a host that is switched off in order: no goodbye, and recovery at the next start."""
        os.kill(self._server.pid, signal.SIGQUIT)
        wait_for(lambda: not self._server.is_running, timeout_s=20, what="the server is down")
        self._down()

    def _kill(self) -> None:
        self._server.kill9()
        self._down()

    def _moved(self) -> None:
        """A failover: the server is gone, and another one has its data and its address; at first it is read-only."""
        self._server.kill9()
        old = self._server.data
        new = old.with_name(f"data{self.counts['moved'] + 2}")
        shutil.copytree(old, new, copy_function=_copy_with_owner, ignore=shutil.ignore_patterns("postmaster.pid"))
        _own(old, new)
        shutil.rmtree(old)
        self._server.data = new
        with self._refusing_writes():
            self._server.start()
            time.sleep(self._draw.uniform(0.5, 2))
            self._server.stop()
        self._server.start()

    def _readonly(self) -> None:
        self._server.stop()
        with self._refusing_writes():
            self._down()
            time.sleep(self._draw.uniform(0.5, 3))
            self._server.stop()
        self._server.start()

    @contextlib.contextmanager
    def _refusing_writes(self) -> Iterator[None]:
        options = self._server._options
        self._server._options = (*options, "default_transaction_read_only=on")
        try:
            yield
        finally:
            self._server._options = options

    def _connections(self) -> None:
        """Somebody else takes every connection that there is."""
        taken: list[psycopg.Connection] = []
        until = time.monotonic() + self._draw.uniform(2, 4)
        try:
            while time.monotonic() < until:
                with contextlib.suppress(psycopg.OperationalError):
                    taken.append(psycopg.connect(self._server.dsn(), connect_timeout=2))
                    continue
                if taken:
                    with contextlib.suppress(psycopg.Error):
                        taken[0].execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
                        taken[0].commit()
                time.sleep(0.02)
        finally:
            for link in taken:
                link.close()

    def _locked(self) -> None:
        """Somebody holds a lock that every transaction needs, now and then for longer than the lock timeout."""
        hold_s = self._draw.choice([3, 24]) if self.counts.total() > 3 else 1.5
        with psycopg.connect(self._field.settings.database_url.replace("+psycopg", "")) as link:
            link.execute("LOCK TABLE chunks IN ACCESS EXCLUSIVE MODE")
            time.sleep(hold_s)

    def _cut(self) -> None:
        for _ in range(5):
            self._server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
            time.sleep(0.3)

    def _spool(self) -> None:
        """In the middle of an outage a worker is killed; the next one finds its answers on disk."""
        self._server.kill9()
        with contextlib.suppress(AssertionError):  # where all were idle
            wait_for(self._holders, timeout_s=10, what="answers are on disk")
        holders = self._holders()
        self.left_on_disk += bool(holders)
        place = self._draw.choice(holders or range(len(self._crew)))
        self._crew[place].kill9()
        self._crew[place] = self._field.worker(pause_s=0.5)
        time.sleep(1)
        self._server.start()
        self._field.service.ready(self._crew[place])

    def _holders(self) -> list[int]:
        """Return the places of the workers that have answers on disk."""
        names = [path.name for path in (self._field.folder / "spool").glob("*.spool")]
        return [place for place, worker in enumerate(self._crew) if any(f"_{worker.pid}-" in name for name in names)]


def _copy_with_owner(source: str, target: str) -> str:
    shutil.copy2(source, target)
    owner = Path(source).stat()
    os.chown(target, owner.st_uid, owner.st_gid)
    return target


def _own(old: Path, new: Path) -> None:
    """Give the copy's folders the owner of the original's: PostgreSQL may run as another user."""
    owner = old.stat()
    for folder, _, _ in os.walk(new):
        os.chown(folder, owner.st_uid, owner.st_gid)


def _programming_errors(field: Ground, worker: HeadraceProcess) -> dict[str, int | float]:
    """Wrong SQL is tried once, by the store and by a worker's recorder."""
    runs = 0

    def wrong(connection: object) -> None:
        nonlocal runs
        runs += 1
        connection.execute(text("SELEKT 1"))  # type: ignore[attr-defined]

    started = time.monotonic()
    with contextlib.suppress(exc.ProgrammingError):
        field.service.store._database.write(wrong)
    assert (runs, time.monotonic() - started < 1) == (1, True)
    function = "CREATE FUNCTION bug() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM 1 / 0; RETURN NEW; END $$"
    execute(field.service.store, text(function))
    execute(field.service.store, text("CREATE TRIGGER bug BEFORE INSERT ON completions EXECUTE FUNCTION bug()"))
    paths = [field.folder / path.name for path in field.folder.glob("gpu*.log")]
    before = {path: path.stat().st_size for path in paths}

    def new_text() -> str:
        return "".join(path.read_bytes()[before[path] :].decode(errors="replace") for path in paths)

    batch_id = field.service.submit(texts(8))
    wait_for(lambda: "[record_failed]" in new_text(), timeout_s=20, what="the wrong query is told", process=worker)
    said = new_text()
    assert "[store_retry]" not in said, "a programming error was tried again"
    assert "[store_outage]" not in said, "a programming error was waited for"
    execute(field.service.store, text("DROP TRIGGER bug ON completions"))
    field.wait_over(batch_id, timeout_s=60)
    field.judge(batch_id, texts(8))
    return {"bad_sql_runs": runs, "bad_sql_waited_for": 0}
