"""The store under many writers, kills, restarts and full disks: what was acknowledged stays, and work goes on afterwards."""

from __future__ import annotations

import logging
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import PostgresServer, wait_until
from sqlalchemy import event, exc, text
from store_driver import answers, check, execute, outdate, pragma, send, submit, take, work_off

from headrace.batch import BatchStatus
from headrace.errors import InvalidRequest, StorageFull, StoreUnavailable
from headrace.store import RecordStatus, Store, open_store
from headrace.store.session import Database

SUPPORT = Path(__file__).parents[1] / "support"


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(i)` in `count` threads that start together; raise what any of them raises."""
    barrier = threading.Barrier(count)

    def run(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_eight_threads_work_on_one_batch(store: Store) -> None:
    batch = submit(store, 400, chunk_size=10)
    refs = send(store)

    def worker(i: int) -> int:
        done = 0
        for ref in random.Random(i).sample(refs, len(refs)):
            claim = store.claim_chunk(ref.chunk_id, worker=f"w{i}", lease_s=60)
            if claim is not None:
                rows = answers(range(claim.start, claim.stop))
                done += sum(store.record(claim, part).inserted for part in (rows[:6], rows[4:], rows))
                assert store.finish_chunk(claim)
        return done

    assert sum(in_threads(8, worker)) == 400
    done = check(store, batch.id)
    assert (done.status, done.counts.completed) == (BatchStatus.COMPLETED, 400)


def test_the_same_rows_from_eight_threads_at_once_count_once(store: Store) -> None:
    batch = submit(store, 64)
    (claim,) = take(store)
    rows = answers(range(64))
    inserted = in_threads(8, lambda i: sum(store.record(claim, random.Random(i).sample(rows, 64)).inserted for _ in range(3)))
    assert sum(inserted) == 64
    assert in_threads(8, lambda _: store.finish_chunk(claim)) == [True] * 8
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_one_of_many_claimants_wins(store: Store) -> None:
    submit(store, 10, chunk_size=1)
    for ref in send(store):
        claims = in_threads(8, lambda i, ref=ref: store.claim_chunk(ref.chunk_id, worker=f"w{i}", lease_s=60))  # type: ignore[misc]
        assert sum(claim is not None for claim in claims) == 1


def test_many_dispatchers_send_no_chunk_twice(store: Store) -> None:
    submit(store, 60, chunk_size=1)
    sent = [
        ref.chunk_id for refs in in_threads(6, lambda _: [r for _ in range(10) for r in send(store, limit=2)]) for ref in refs
    ]
    assert len(sent) == len(set(sent)) <= 60
    assert len(sent) + len(send(store)) == 60


def test_everything_at_once_waits_for_nobody_for_ever(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Record, renew, cancel, sweep and dispatch over the same batches, in any order: no deadlock, no error, and all adds up."""
    caplog.set_level(logging.INFO)
    batches = [submit(store, 40, chunk_size=5) for _ in range(6)]
    claims = take(store)
    stop = threading.Event()

    def record(i: int) -> None:
        dice = random.Random(i)
        for _ in range(15):
            some = dice.sample(claims, 6)
            results = store.record_many([(claim, answers(dice.sample(range(claim.start, claim.stop), 3))) for claim in some])
            assert {result.status for result in results} <= {RecordStatus.OK, RecordStatus.CANCELLED}

    def others(i: int) -> None:
        dice = random.Random(i)
        while not stop.is_set():
            store.renew(dice.sample(claims, 5), 60)
            send(store)
            store.expire_batches()

    def end_four() -> None:
        for cancelled, expired in (batches[:2], batches[2:4]):
            time.sleep(0.05)
            store.cancel_batch(cancelled.id)
            outdate(store, expired.id)
            store.expire_batches()

    def role(i: int) -> None:
        if i == 7:
            end_four()
        elif i < 5:
            record(i)
        else:
            others(i)

    timer = threading.Timer(0.7, stop.set)
    timer.start()
    in_threads(8, role)
    timer.join()
    store.renew(claims, 60)
    work_off(store, [claim for claim in claims if claim.batch_id not in {batch.id for batch in batches[:4]}])
    statuses = [check(store, batch.id).status for batch in batches]
    assert statuses == [BatchStatus.CANCELLED, BatchStatus.EXPIRED] * 2 + [BatchStatus.COMPLETED] * 2
    retries = [record.getMessage() for record in caplog.records if getattr(record, "event", "") == "store_retry"]
    assert retries == [], "locks were taken in different orders"


def test_kill_9_at_any_moment_loses_and_doubles_nothing(store: Store, store_url: str) -> None:
    batch = submit(store, 2000, chunk_size=30)
    dice = random.Random(7)
    for _ in range(3):
        before, deadline = store.get_batch(batch.id).counts.done, time.monotonic() + 30
        with subprocess.Popen([sys.executable, SUPPORT / "store_worker.py", store_url], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            # Into its stride: on busy cores its first chunk may take longer than all that a fixed pause would give it.
            while store.get_batch(batch.id).counts.done == before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        check(store, batch.id)
    assert 0 < store.get_batch(batch.id).counts.done < 2000, "it was killed in the middle"

    def over() -> bool:
        # As the reconciler: the dead left several chunks, and each one's lease runs out at its own time.
        store.requeue_lost(grace_s=0)
        while claims := take(store):
            work_off(store, claims)
        return store.get_batch(batch.id).status.is_terminal

    wait_until(over, timeout_s=10)
    done = check(store, batch.id)
    assert (done.status, done.counts.completed) == (BatchStatus.COMPLETED, 2000)
    if store_url.startswith("sqlite"):
        assert pragma(store, "integrity_check") == "ok"


def test_a_postgres_that_restarts_is_not_noticed(postgres_server: PostgresServer, postgres_url: str) -> None:
    with Store(postgres_url, create=True) as store:
        batch = submit(store, 4)
        (ref,) = send(store)
        in_threads(4, lambda _: store.ping())  # several connections wait in the pool
        postgres_server.restart()
        claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
        assert claim is not None, "a claim is not tried twice: its connection was tested before"
        assert store.record(claim, answers(range(2))).inserted == 2
        postgres_server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        work_off(store, [claim])
        assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_a_postgres_that_is_down_is_unavailable_until_it_is_back(postgres_server: PostgresServer, postgres_url: str) -> None:
    with Store(postgres_url, create=True) as store:
        batch = submit(store, 4)
        (claim,) = take(store)
        store.record(claim, answers(range(2)))
        postgres_server.kill9()
        calls: Sequence[Callable[[], Any]] = (
            store.ping,
            lambda: store.get_batch(batch.id),
            lambda: store.record(claim, answers([3])),
            lambda: store.claim_chunk(claim.chunk_id, worker="w", lease_s=1),
        )
        for call in calls:
            with pytest.raises(StoreUnavailable):
                call()
        postgres_server.start()
        store.ping()
        work_off(store, [claim])
        assert check(store, batch.id).counts.completed == 4


def test_a_postgres_that_runs_out_of_space_is_full_until_it_has_some(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with Store(postgres_url, create=True) as store:
        batch = submit(store, 4)
        (claim,) = take(store)
        # What the server says when a write fails with ENOSPC, said by a trigger.
        execute(
            store,
            text(
                "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$"
            ),
        )
        execute(store, text("CREATE TRIGGER no_space BEFORE INSERT ON completions EXECUTE FUNCTION no_space()"))
        with pytest.raises(StorageFull):
            store.record(claim, answers([0]))
        execute(store, text("DROP TRIGGER no_space ON completions"))
        work_off(store, [claim])
        assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_an_sqlite_file_that_may_not_grow_is_full_until_it_may(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'db'}", create=True) as store:
        batch = submit(store, 200, chunk_size=200)
        (claim,) = take(store)
        limit = {"pages": int(pragma(store, "page_count"))}

        @event.listens_for(store._database.writer, "begin")
        def _limit(connection: Any) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count={limit['pages']}").close()

        rows = answers(range(200), "x" * 2000)
        with pytest.raises(StorageFull):
            store.record(claim, rows)
        with pytest.raises(StorageFull):
            submit(store, 3000)
        assert check(store, batch.id).counts.done == 0
        assert [found.id for found in store.list_batches() if found.status is BatchStatus.IN_PROGRESS] == [batch.id]
        limit["pages"] = 1_000_000
        assert store.record(claim, rows).inserted == 200
        assert store.finish_chunk(claim)
        assert check(store, batch.id).status is BatchStatus.COMPLETED


FULL_DISK = """
import sys
from pathlib import Path
from store_driver import answers, check, pragma, submit, take
from headrace.errors import StorageFull
from headrace.store import Store
disk = Path(sys.argv[1])
with Store(f"sqlite:///{disk / 'db'}", create=True) as store:
    batch = submit(store, 200, chunk_size=200)
    (claim,) = take(store)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    full = 0
    for _ in range(3):
        try:
            store.record(claim, answers(range(200), "x" * 2000))
        except StorageFull:
            full += 1
    assert full == 3, full
    assert check(store, batch.id).counts.done == 0
    ballast.unlink()
    assert store.record(claim, answers(range(200), "x" * 2000)).inserted == 200
    assert store.finish_chunk(claim)
    assert check(store, batch.id).status == "completed"
    assert pragma(store, "integrity_check") == "ok"
print("survived")
"""


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    shell = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'
    probe = [*mount, "sh", "-c", shell, "sh", str(tmp_path), "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted in a user namespace here; max_page_count stands in for it, above")
    command = [*mount, "sh", "-c", shell, "sh", str(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": f"{SUPPORT}:{Path.cwd()}"})
    assert done.stdout == "survived\n", done.stderr


def test_a_writer_waits_for_another_process(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'db'}", create=True) as store:
        other = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, lambda: other.execute("COMMIT"))
        timer.start()
        started = time.monotonic()
        submit(store, 1)
        assert time.monotonic() - started >= 0.25
        timer.join()
        other.close()


def test_our_own_bugs_are_raised_at_once_and_undone(store: Store) -> None:
    batch = submit(store, 4)
    runs = []

    def wrong(connection: Any) -> None:
        runs.append(1)
        connection.execute(text("UPDATE batches SET total = 99"))
        connection.execute(text("SELECT 1 / nothing FROM batches, batches"))

    with pytest.raises(exc.DBAPIError):
        store._database.write(wrong)
    assert len(runs) == 1
    assert check(store, batch.id).counts.total == 4


def test_an_error_of_the_database_tells_no_prompt(store: Store) -> None:
    """It goes into a log with its traceback, and SQLAlchemy's own words quote what was to be stored."""

    def insert(connection: Any) -> None:
        values = {"batch_id": "no such batch", "index": 0, "body": "a prompt nobody else shall see"}
        connection.execute(text('INSERT INTO prompts (batch_id, "index", body) VALUES (:batch_id, :index, :body)'), values)

    with pytest.raises(exc.IntegrityError) as raised:
        store._database.write(insert)
    assert "INSERT INTO prompts" in str(raised.value)
    assert "nobody else" not in str(raised.value)


def test_a_transaction_that_lost_a_deadlock_runs_again(postgres_url: str) -> None:
    with Store(postgres_url, create=True) as store:
        one, two = (submit(store, 1).id for _ in range(2))
        both_hold = threading.Barrier(2)
        runs = []

        def cross(order: list[str]) -> None:
            first_run = threading.Event()

            def work(connection: Any) -> None:
                runs.append(order)
                lock = text("UPDATE batches SET priority = priority + 1 WHERE id = :id")
                connection.execute(lock, {"id": order[0]})
                if not first_run.is_set():
                    first_run.set()
                    both_hold.wait()
                connection.execute(lock, {"id": order[1]})

            store._database.write(work)

        in_threads(2, lambda i: cross([one, two][:: 1 if i else -1]))
        assert len(runs) == 3, "one of the two was undone and ran a second time"
        assert [store.get_batch(batch_id).priority for batch_id in (one, two)] == [2, 2]


def test_a_database_without_our_tables_says_how_to_make_them(store_url: str) -> None:
    with Store(store_url) as store:
        with pytest.raises(StoreUnavailable, match="headrace migrate"):
            submit(store, 1)
        with pytest.raises(StoreUnavailable, match="headrace migrate"):
            store.check_schema()
    with pytest.raises(StoreUnavailable, match="headrace migrate"):
        open_store(store_url)
    with open_store(store_url, create=True) as store:
        store.check_schema()


@pytest.mark.parametrize(
    "url", ["mysql://root@localhost/db", "nonsense", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_a_url_that_can_not_work_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Database(url)
    assert refused.value.param == "database_url"


def test_a_password_is_never_in_a_message() -> None:
    with Store("postgresql://someone:secret@127.0.0.1:1/db") as store, pytest.raises(StoreUnavailable) as error:
        store.ping()
    assert "secret" not in str(error.value)
    assert "127.0.0.1" in str(error.value)


def test_an_sqlite_path_means_the_same_file_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store("sqlite:///deep/er/headrace.db", create=True) as store:
        monkeypatch.chdir("/")
        submit(store, 1)
    assert (tmp_path / "deep" / "er" / "headrace.db").is_file()


def test_sqlite_is_opened_as_it_must_be(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'db'}", create=True) as store:
        assert [pragma(store, name) for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")] == [
            "wal",
            2,
            1,
            30_000,
        ]
        with pytest.raises(StoreUnavailable, match="readonly"):
            store._database.read(lambda connection: connection.execute(text("DELETE FROM batches")))
