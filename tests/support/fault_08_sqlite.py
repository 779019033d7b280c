"""Fault 8: SQLite under sixteen writers, kill -9 in the middle of commits, a disk that fills up, and a reader that stays for an hour.

The first, the second and the reader share one database; the disk that fills up is a small tmpfs of its own with a whole service on it
(`python fault_08_sqlite.py FOLDER TIMES`, started in a mount namespace). Nothing here is specific to a fault frame but `run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from servers import RedisServer
from service import Service
from store_driver import check, submit, take, work_off
from worker_process import QUICK, wait_for

from headrace.batch import BatchStatus
from headrace.settings import Settings
from headrace.store import Store

TITLE = "SQLite: 16 writers, kill -9 inside commits, disk full, a reader that stays"
SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
WRITERS = 16
READER_S = float(os.environ.get("FAULT_READER_S", "3600"))
"""How long the reader stays in the long form."""


def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """Let it all fall on one file; return the counts."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-fault-08-"))
    url = f"sqlite:///{folder / 'db'}"
    counts: dict[str, int | float] = {"lost": 0, "doubled": 0}
    with Store(url, create=True) as store:
        submit(store, 10)
        with _reader(folder / "db", counts):
            started = time.monotonic()
            counts |= _writers(url, processes=WRITERS if long else 2, rows=256 if long else 16)
            say(f"{WRITERS} writers: {counts}")
            counts |= _victims(store, url, kills=200 if long else 5, seed=seed)
            say(f"killed inside commits: {counts}")
            counts |= _full_disk(times=10 if long else 1, say=say)
            while long and time.monotonic() - started < READER_S:
                batch = submit(store, 64)
                work_off(store, take(store))
                assert check(store, batch.id).status is BatchStatus.COMPLETED
                time.sleep(5)
            counts["reader_s"] = round(time.monotonic() - started)
        counts["batches"] = _recount(store)
    with contextlib.closing(sqlite3.connect(folder / "db")) as link:
        assert link.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (counts["rows"],) = link.execute("SELECT count(*) FROM completions").fetchone()
    shutil.rmtree(folder)
    return counts


@contextlib.contextmanager
def _reader(path: Path, counts: dict[str, int | float]) -> Iterator[None]:
    """Keep one read transaction open: it goes on seeing what it saw, nobody waits for it, and its log is given up when it ends."""
    log = path.with_name(path.name + "-wal")
    query = "SELECT (SELECT count(*) FROM completions), (SELECT count(*) FROM prompts)"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as link:
        link.execute("BEGIN")
        seen = link.execute(query).fetchone()
        yield
        assert link.execute(query).fetchone() == seen, "the snapshot of an open reader has changed"
        link.execute("COMMIT")
        counts["log_with_reader_mib"] = round(log.stat().st_size / 2**20, 1)
        busy, *_ = link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (busy, log.stat().st_size) == (0, 0), "the log stays though nobody reads it any more"


def _script(name: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return subprocess.Popen(
        [*prefix, sys.executable, str(SUPPORT / name), *map(str, arguments)],
        env={**environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}", "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}: {out}"
    return dict(json.loads(out.splitlines()[-1]))


def _writers(url: str, *, processes: int, rows: int) -> dict[str, int | float]:
    share = WRITERS // processes
    models = [[f"m{number}" for number in range(first, first + share)] for first in range(0, WRITERS, share)]
    started = time.monotonic()
    results = [_result(process) for process in [_script("store_writers.py", url, rows, *names) for names in models]]
    seconds = time.monotonic() - started
    return {
        "writers": WRITERS, "writers_rows": WRITERS * rows, "writers_s": round(seconds, 1),
        "longest_write_s": max(result["longest_write_s"] for result in results),
    }  # fmt: skip


def _victims(store: Store, url: str, *, kills: int, seed: int) -> dict[str, int | float]:
    """Kill writers inside their commits, then work off what is left as the reconciler does."""
    batch = submit(store, kills * 60, chunk_size=30)
    counts = _result(_script("sqlite_victims.py", url, kills, seed))
    assert 0 < store.get_batch(batch.id).counts.done < kills * 60, "they were killed in the middle of the work"

    def over() -> bool:
        store.requeue_lost(grace_s=0)
        while claims := take(store):
            work_off(store, claims)
        return store.get_batch(batch.id).status.is_terminal

    wait_for(over, timeout_s=30, what="the rest is worked off")
    done = check(store, batch.id)
    assert (done.status, done.counts.completed) == (BatchStatus.COMPLETED, kills * 60)
    return counts


def _recount(store: Store) -> int:
    batches = [batch for page in _pages(store) for batch in page]
    for batch in batches:
        check(store, batch.id)
    return len(batches)


def _pages(store: Store) -> Iterator[list[Any]]:
    after = None
    while page := store.list_batches(after=after, limit=100):
        yield page
        after = page[-1].id


def _full_disk(*, times: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """A whole service whose database is on a disk of 48 MB."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-fault-08-disk-"))
    shell = 'mount -t tmpfs -o size=48m none "$1" && shift && exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh", str(folder))
    try:
        probe = subprocess.run([*prefix, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
        if probe is None or probe.returncode != 0:
            say("no tmpfs can be mounted here: the full disk is left to tests/headrace/test_store_faults.py")
            return {"disk_full": 0}
        return _result(_script(Path(__file__).name, folder, times, prefix=prefix))
    finally:
        shutil.rmtree(folder)


def fill_and_free(disk: Path, times: int) -> dict[str, int | float]:
    """Fill the disk under a working service and free it again; each time it stops, says why, and goes on. Its spool is there, too."""
    work = Path(tempfile.mkdtemp(prefix="headrace-fault-08-work-"))
    total = 300 * times + 100
    with RedisServer() as redis:
        settings = Settings(
            model="echo", engine_frontend="echo_frontend:EchoFrontend", database_url=f"sqlite:///{disk}/db", redis_url=redis.url,
            home=work, spool_dir=disk / "spool", **{**QUICK, "chunk_size": 16},
        )  # fmt: skip
        service = Service(settings, work)
        with service.worker(concurrency=2, environ={"ECHO_PAUSE_S": "0.3"}) as worker:
            service.ready(worker)
            batch_id = service.submit([f"prompt {index} " + "x" * 1000 for index in range(total)])
            for _ in range(times):
                goal = service.done(batch_id) + 50
                wait_for(lambda goal=goal: service.done(batch_id) >= goal, timeout_s=60, what=f"{goal} rows", process=worker)
                told = len(worker.log_tail(10**8))
                _fill(disk)
                wait_for(
                    lambda told=told: {"storage_full", "[spool_full]"} <= set(_words(worker.log_tail(10**8)[told:])), timeout_s=60,
                    what="the worker says that the disk is full, and that its spool is", process=worker,
                )  # fmt: skip
                (disk / "ballast").unlink()
            batch = service.wait_over(batch_id, worker, timeout_s=120)
        assert batch.status is BatchStatus.COMPLETED
        assert batch.counts.failed == 0
        service.assert_exactly_once(batch_id, total)
        check(service.store, batch_id)
        service.close()
    with contextlib.closing(sqlite3.connect(disk / "db")) as link:
        assert link.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    shutil.rmtree(work)
    return {"disk_full": times, "disk_full_rows": total}


def _words(text: str) -> list[str]:
    return text.replace("'", " ").split()


def _fill(disk: Path) -> None:
    """Leave no byte free, and no pages in SQLite's log that the next rows could be written over."""
    with contextlib.closing(sqlite3.connect(disk / "db", timeout=10, isolation_level=None)) as link:
        wait_for(lambda: link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, timeout_s=20, what="an empty log")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


if __name__ == "__main__":
    print(json.dumps(fill_and_free(Path(sys.argv[1]), int(sys.argv[2]))))
