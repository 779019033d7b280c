"""The spool: what is put on disk comes back whole or not at all, whoever died over it, and nobody takes what is another's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from echo_frontend import answer

from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs, TokenUsage
from headrace.errors import InvalidRequest, StorageFull, StoreUnavailable
from headrace.store import Claim
from worker.recorder import Verdict
from worker.spool import Entry, Spool, SpoolFull, orphans

MARK = "d1 0001"


def claim(number: int = 1, *, epoch: int = 1) -> Claim:
    return Claim(
        chunk_id=f"chunk_{number}", batch_id="batch", number=number, of=9, start=10 * number, stop=10 * number + 10, model="m",
        epoch=epoch, attempt=1, worker="w", lease_s=30.0,
    )  # fmt: skip


def entry(number: int = 1, rows: int = 3) -> Entry:
    return claim(number), [answer(f"prompt {i}", index=10 * number + i) for i in range(rows)]


def make(folder: Path, *, store: str = MARK, worker: str = "gpu@host#1", max_bytes: int = 10**6) -> Spool:
    return Spool(folder, store=store, worker=worker, max_bytes=max_bytes)


def left_in(folder: Path, *, store: str = MARK) -> list[Entry]:
    with orphans(folder, store=store) as found:
        return [item for orphan in found for item in orphan.entries()]


def test_what_is_appended_comes_back(tmp_path: Path) -> None:
    logprobs = (TokenLogprobs(token_id=1, logprob=float("-inf"), top=((1, -0.5),)),)
    rich = Completion(
        index=12, choices=(Choice(index=0, text="a\nb\x00 \u2028 🚰 \ud800", token_ids=(1, 2), finish_reason="stop", logprobs=logprobs),),
        usage=TokenUsage(prompt_tokens=1, completion_tokens=2), prompt_logprobs=logprobs, token_texts={1: " a", 7: (255,)}, queue_ms=0.1, run_ms=1e9, attempts=3,
    )  # fmt: skip
    failed = Completion(index=13, error=CompletionError(code="kv_capacity", message="no"))
    entries = [(claim(1, epoch=7), [rich, failed]), entry(2)]
    spool = make(tmp_path)
    spool.append(entries[:1])
    spool.append(entries[1:])
    spool.close()
    assert left_in(tmp_path) == entries
    assert left_in(tmp_path) == entries, "it is there until it is removed"


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "spool"
    spool = make(folder)
    assert list(folder.iterdir()) == [], "no outage, no file"
    spool.append([entry()])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert spool.path.stat().st_mode & 0o777 == 0o600


def test_a_living_workers_spool_is_its_own(tmp_path: Path) -> None:
    alive, dead = make(tmp_path, worker="alive"), make(tmp_path, worker="dead")
    alive.append([entry(1)])
    dead.append([entry(2)])
    dead.close()
    assert left_in(tmp_path) == [entry(2)]
    alive.clear()
    assert not alive.path.exists()
    assert dead.path.exists()


def test_two_workers_that_start_together_take_up_each_spool_once(tmp_path: Path) -> None:
    dead = make(tmp_path)
    dead.append([entry()])
    dead.close()
    with orphans(tmp_path, store=MARK) as first, orphans(tmp_path, store=MARK) as second:
        assert [len(first), len(second)] == [1, 0]
        first[0].path.unlink()
    assert left_in(tmp_path) == []


def test_a_record_that_this_release_cannot_read_is_passed_over(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.append([entry(1)])
    spool.close()
    body = b'{"claim":{"of_tomorrow":1},"completions":[]}'
    with spool.path.open("ab") as file:
        file.write(b"%08x %d %s\n" % (zlib.crc32(body), len(body), body))
    assert left_in(tmp_path) == [entry(1)]


@pytest.mark.parametrize("store", ["d2 0001", "d1 0002"], ids=["another database", "another schema"])
def test_a_spool_of_another_store_is_left_alone(tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture) -> None:
    foreign = make(tmp_path, store=store)
    foreign.append([entry()])
    foreign.close()
    assert left_in(tmp_path) == []
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["spool_foreign"]
    assert left_in(tmp_path, store=store) == [entry()]


@pytest.mark.parametrize("text", [b"", b"HEADRACE-SPO", b'HEADRACE-SPOOL {"format": 1'])
def test_a_file_that_a_crash_began_is_an_empty_orphan(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.spool").write_bytes(text)
    with orphans(tmp_path, store=MARK) as found:
        assert [(orphan.path.name, list(orphan.entries())) for orphan in found] == [("x.spool", [])]


@pytest.mark.parametrize("text", [b"notes of somebody\n", b"HEADRACE-SPOOL []\n", b'HEADRACE-SPOOL {"format": 2}\nx\n', b"\n"])
def test_a_file_that_is_no_spool_of_ours_is_left_alone(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.spool").write_bytes(text)
    assert left_in(tmp_path) == []
    assert (tmp_path / "x.spool").read_bytes() == text


def test_a_torn_record_is_passed_over_and_the_others_come_back(tmp_path: Path) -> None:
    """At every length that a crash can leave."""
    spool = make(tmp_path)
    spool.append([entry(1)])
    whole = spool.size
    spool.append([entry(2)])
    spool.close()
    data = spool.path.read_bytes()
    for size in range(whole, len(data)):
        spool.path.write_bytes(data[:size])
        with orphans(tmp_path, store=MARK) as [orphan]:
            assert list(orphan.entries()) in ([entry(1)], [entry(1), entry(2)])
            assert orphan.damaged == (whole < size < len(data) - 1)


def test_a_damaged_byte_costs_its_record_and_no_other(tmp_path: Path) -> None:
    spool = make(tmp_path)
    for number in range(1, 4):
        spool.append([entry(number)])
    spool.close()
    data = spool.path.read_bytes()
    start = data.index(b"\n") + 1
    dice = random.Random(3)
    for _ in range(200):
        place = dice.randrange(start, len(data))
        spool.path.write_bytes(data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :])
        found = left_in(tmp_path)
        assert len(found) >= 1
        assert all(item in [entry(number) for number in range(1, 4)] for item in found)


def test_the_bound_holds_and_what_is_there_stays(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=2000)
    kept = 3
    for number in range(kept):
        spool.append([entry(number, rows=1)])
    with pytest.raises(SpoolFull, match="HEADRACE_SPOOL_BYTES"):
        spool.append([entry(kept, rows=20)])
    assert spool.path.stat().st_size == spool.size <= 2000
    spool.close()
    assert left_in(tmp_path) == [entry(number, rows=1) for number in range(kept)]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_spool import entry, left_in, make
from worker.spool import SpoolFull
folder = Path(sys.argv[1])
spool = make(folder)
spool.append([entry(1)])
resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size + 100, resource.RLIM_INFINITY))
for _ in range(3):
    try:
        spool.append([entry(2)])
    except SpoolFull as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append([entry(3)])
spool.close()
assert left_in(folder) == [entry(1), entry(3)], left_in(folder)
"""


def test_a_record_that_a_full_disk_cut_short_is_cut_off_again(tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(tests=str(here)), str(tmp_path)], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{Path.cwd()}:{here.parent / 'support'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large") == 3


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_spool import entry, make
spool = make(Path(sys.argv[1]))
for number in range(1, 10**6):
    spool.append([entry(number)])
    print(number, flush=True)
"""


def test_what_was_promised_survives_kill_9(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environ = {"PYTHONPATH": f"{Path.cwd()}:{here.parent / 'support'}"}
    command = [sys.executable, "-c", KILLED.format(tests=str(here)), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        promised = 0
        while promised < 40:
            promised = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        for line in process.stdout.read().splitlines():
            promised = max(promised, int(line or 0))
    found = left_in(tmp_path)
    assert len(found) >= promised
    assert found == [entry(number) for number in range(1, len(found) + 1)]


def test_a_folder_that_others_can_read_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(InvalidRequest, match="chmod 700"):
        make(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="HEADRACE_SPOOL_DIR"):
        make(tmp_path / "file")


# With the recorder and the store


@pytest.mark.parametrize("error", [StoreUnavailable, StorageFull])
def test_rows_that_sql_does_not_take_are_on_disk_until_it_does(outage_bench, error: type) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(error)
    bench.answer(range(5))
    bench.recorder.save_waiting(age_s=30)
    assert bench.spool.size == 0, "they have not waited for long"
    bench.recorder.save_waiting(age_s=0)
    once = bench.spool.size
    bench.recorder.save_waiting(age_s=0)
    assert bench.spool.size == once > 0, "no row is saved twice"
    bench.answer(range(5, 8))
    bench.recorder.save_waiting(age_s=0)
    assert bench.spool.size > once
    bench.mend_store()
    assert bench.ledger.wait(5) == "recorded"
    bench.wait(lambda: bench.spool.size == 0)
    assert not bench.spool.path.exists()
    assert bench.indexes() == list(range(8))


def test_a_killed_workers_rows_are_recorded_by_the_next(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.die()
    bench.mend_store()
    assert bench.salvage() == 5
    assert bench.indexes() == list(range(5))
    assert bench.salvage() == 0
    bench.finish_by_another()
    assert bench.check().counts.completed == 8


def test_a_whole_chunk_in_a_spool_is_ended(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(8))
    bench.die()
    bench.mend_store()
    assert bench.salvage() == 8
    assert bench.check().status == "completed"


def test_rows_of_a_chunk_that_another_worker_took_count_where_it_has_none(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.die()
    bench.mend_store()
    other = bench.take_away()
    bench.store.record(other, [answer("the other's", index=2)])
    assert bench.salvage() == 4
    texts = [row.choices[0].text for row in bench.store.results(bench.batch_id)]
    assert texts == ["echo prompt 0", "echo prompt 1", "echo the other's", "echo prompt 3", "echo prompt 4"]
    held = bench.store.renew([other], 30)
    assert held == {other}, "the chunk is still the other's"
    bench.store.record(other, [answer("too late", index=0), *(answer(f"prompt {i}", index=i) for i in range(5, 8))])
    assert bench.store.finish_chunk(other)
    assert bench.check().counts.completed == 8


def test_a_worker_that_lived_through_the_outage_keeps_its_rows_of_a_chunk_that_was_taken(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.recorder.save_waiting(age_s=0)
    other = bench.take_away()
    bench.mend_store()
    assert bench.ledger.wait(5) == "fenced"
    bench.wait(lambda: bench.indexes() == list(range(5)))
    assert bench.store.renew([other], 30) == {other}


def test_they_are_kept_also_where_the_lease_keeper_finds_out_first(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.recorder.save_waiting(age_s=0)
    # A transaction that waits holds rows whose fate was open when it began; these come behind it.
    bench.answer(range(5, 7))
    bench.recorder.save_waiting(age_s=0)
    bench.take_away()
    bench.ledger.settle(Verdict.FENCED)
    bench.mend_store()
    bench.wait(lambda: bench.indexes() == list(range(7)))
    bench.wait(lambda: not bench.spool.path.exists())


def test_without_an_outage_a_zombies_rows_are_refused(outage_bench) -> None:
    bench = outage_bench(rows=8)
    bench.take_away()
    bench.answer(range(5))
    assert bench.ledger.wait(5) == "fenced"
    bench.wait(lambda: bench.recorder.rows_waiting == 0)
    assert bench.indexes() == []


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_rows_of_a_batch_that_is_over_change_nothing(outage_bench, end: str) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.die()
    bench.mend_store()
    bench.take_away(release=True)
    bench.store.cancel_batch(bench.batch_id)
    if end == "delete":
        bench.store.delete_batch(bench.batch_id)
    assert bench.salvage() == 0
    assert list(bench.spool.path.parent.iterdir()) == []
    if end == "cancel":
        assert bench.check().counts.failed == 8


def test_closing_in_an_outage_leaves_the_rows_to_the_next_worker(outage_bench, caplog: pytest.LogCaptureFixture) -> None:
    bench = outage_bench(rows=8)
    bench.break_store(StoreUnavailable)
    bench.answer(range(5))
    bench.recorder.close(timeout_s=0.3)
    assert "rows_left_in_spool" in [getattr(record, "event", "") for record in caplog.records]
    bench.mend_store()
    bench.salvage()
    assert bench.indexes() == list(range(5))


def test_a_batch_of_outages_leaves_no_file_behind(outage_bench, tmp_path: Path) -> None:
    """Saving and writing race: whatever the order, at the end all rows are in SQL and none on disk."""
    bench = outage_bench(rows=200)
    dice = random.Random(5)
    for index in range(200):
        if dice.random() < 0.1:
            bench.break_store(StoreUnavailable)
        bench.answer([index])
        if dice.random() < 0.5:
            bench.recorder.save_waiting(age_s=0)
        if dice.random() < 0.2:
            bench.mend_store()
    bench.mend_store()
    assert bench.ledger.wait(10) == "recorded"
    bench.wait(lambda: not bench.spool.path.exists())
    assert bench.indexes() == list(range(200))
