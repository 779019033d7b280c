"""The recorder: few transactions, nothing lost while the store is away, and no chunk suffers for another's trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from echo_frontend import answer

from headrace.completion import Completion
from headrace.config import GenerationConfig
from headrace.errors import StorageFull, StoreUnavailable
from headrace.store import Claim, RecordResult, Store
from worker.outage import Outage
from worker.recorder import Ledger, Recorder, Verdict
from worker.spool import Spool


class WatchedStore(Store):
    """Counts transactions, and fails when told to, before anything is written."""

    transactions = 0
    failing: Callable[[list[Claim]], Exception | None] = staticmethod(lambda claims: None)

    def record_many(self, items) -> list[RecordResult]:
        items = list(items)
        error = self.failing([claim for claim, _ in items])
        if error is not None:
            raise error
        self.transactions += 1
        return super().record_many(items)


@pytest.fixture
def store(settings) -> WatchedStore:
    store = WatchedStore(settings.database_url)
    store.migrate()
    yield store
    store.close()


def begin(store: WatchedStore, spool: Spool, *, flush_rows: int, flush_interval_s: float) -> Recorder:
    recorder = Recorder(store, flush_rows=flush_rows, flush_interval_s=flush_interval_s, spool=spool, outage=Outage())
    recorder.start()
    return recorder


@pytest.fixture
def spool(settings, store: WatchedStore) -> Spool:
    return Spool(settings.spool_dir, store=store.mark, worker="me", max_bytes=10**6)


@pytest.fixture
def recorder(store: WatchedStore, spool: Spool):
    recorder = begin(store, spool, flush_rows=32, flush_interval_s=0.1)
    yield recorder
    recorder.close(timeout_s=5)


def claims_of(store: Store, rows: int, *, chunk_size: int, lease_s: float = 30.0) -> tuple[str, list[Claim]]:
    batch = store.create_batch([f"prompt {i}" for i in range(rows)], GenerationConfig(), model="echo", chunk_size=chunk_size)
    refs = store.next_chunks(model="echo", limit=100, grace_s=60)
    claims = [store.claim_chunk(ref.chunk_id, worker="me", lease_s=lease_s) for ref in refs]
    assert all(claims)
    return batch.id, claims


def fill(ledger: Ledger, indexes) -> None:
    for index in indexes:
        ledger.add(answer(f"prompt {index}", index=index))


def indexes_in(store: Store, batch_id: str) -> list[int]:
    return [completion.index for completion in store.results(batch_id, limit=10_000)]


def test_rows_of_many_chunks_share_transactions(store: WatchedStore, recorder: Recorder) -> None:
    batch_id, claims = claims_of(store, 64, chunk_size=8)
    ledgers = [recorder.open(claim, owed=8) for claim in claims]
    opened = [ledger.__enter__() for ledger in ledgers]
    for offset in range(8):
        for ledger in opened:
            fill(ledger, [ledger.claim.start + offset])
    assert [ledger.wait(5) for ledger in opened] == [Verdict.RECORDED] * 8
    assert indexes_in(store, batch_id) == list(range(64))
    assert store.transactions <= 5, "64 rows of 8 chunks by 32: two or three transactions, not eight"
    assert recorder.rows_written == 64
    assert recorder.rows_waiting == 0


def test_a_lone_row_waits_for_the_interval_and_no_longer(store: WatchedStore, recorder: Recorder) -> None:
    _, [claim] = claims_of(store, 2, chunk_size=8)
    with recorder.open(claim, owed=2) as ledger:
        started = time.monotonic()
        fill(ledger, [0])
        assert ledger.wait_written(5)
        assert 0.05 < time.monotonic() - started < 4


def test_the_last_row_of_a_chunk_is_written_at_once(store: WatchedStore, spool: Spool) -> None:
    recorder = begin(store, spool, flush_rows=1000, flush_interval_s=60)
    _, [claim] = claims_of(store, 20, chunk_size=64)
    with recorder.open(claim, owed=20) as ledger:
        fill(ledger, range(20))
        assert ledger.wait(5) is Verdict.RECORDED
    recorder.close(timeout_s=5)


@pytest.mark.parametrize("error", [StoreUnavailable, StorageFull])
def test_an_outage_loses_nothing_and_writes_nothing_twice(store: WatchedStore, recorder: Recorder, error: type) -> None:
    batch_id, [claim] = claims_of(store, 40, chunk_size=64)
    back = threading.Event()
    store.failing = lambda claims: None if back.is_set() else error()
    with recorder.open(claim, owed=40) as ledger:
        fill(ledger, range(40))
        assert ledger.wait(0.5) is None
        assert store.results(batch_id) == []
        back.set()
        assert ledger.wait(5) is Verdict.RECORDED
    assert indexes_in(store, batch_id) == list(range(40))
    assert store.get_batch(batch_id).counts.completed == 40


def test_a_wrong_query_is_not_tried_for_ever_and_breaks_its_own_chunk_only(store: WatchedStore, recorder: Recorder) -> None:
    batch_id, [bad, good] = claims_of(store, 16, chunk_size=8)
    store.failing = lambda claims: RuntimeError("a bug") if bad in claims else None
    with recorder.open(bad, owed=8) as bad_ledger, recorder.open(good, owed=8) as good_ledger:
        for offset in range(8):
            fill(bad_ledger, [bad.start + offset])
            fill(good_ledger, [good.start + offset])
        assert bad_ledger.wait(5) is Verdict.BROKEN
        assert str(bad_ledger.error) == "a bug"
        assert good_ledger.wait(5) is Verdict.RECORDED
    assert indexes_in(store, batch_id) == list(range(good.start, good.stop))


def test_a_chunk_that_another_worker_took_is_fenced(store: WatchedStore, recorder: Recorder) -> None:
    batch_id, [old] = claims_of(store, 8, chunk_size=8, lease_s=0.05)
    time.sleep(0.1)
    new = store.claim_chunk(old.chunk_id, worker="other", lease_s=30)
    assert new is not None
    with recorder.open(old, owed=8) as ledger:
        fill(ledger, range(8))
        assert ledger.wait(5) is Verdict.FENCED
        fill(ledger, [0])
        assert recorder.rows_waiting == 0, "nobody wants its rows any more"
    assert store.results(batch_id) == []


def test_a_cancelled_batch_is_told_at_the_next_flush(store: WatchedStore, recorder: Recorder) -> None:
    batch_id, [claim] = claims_of(store, 8, chunk_size=8)
    with recorder.open(claim, owed=8) as ledger:
        fill(ledger, range(3))
        assert ledger.wait_written(5)
        store.cancel_batch(batch_id)
        fill(ledger, [3])
        assert ledger.wait(5) is Verdict.CANCELLED
    codes = [completion.error.code if completion.error else None for completion in store.results(batch_id)]
    assert codes[:3] == [None] * 3
    assert set(codes[4:]) == {"batch_cancelled"}
    assert len(codes) == 8


def test_a_settled_chunk_still_gets_its_rows_written(store: WatchedStore, recorder: Recorder) -> None:
    batch_id, [claim] = claims_of(store, 8, chunk_size=8)
    with recorder.open(claim, owed=8) as ledger:
        fill(ledger, range(5))
        ledger.settle(Verdict.DRAINED)
        assert ledger.wait(0) is Verdict.DRAINED
        assert ledger.wait_written(5)
    assert indexes_in(store, batch_id) == list(range(5))


def test_closing_writes_what_waits(store: WatchedStore, spool: Spool) -> None:
    recorder = begin(store, spool, flush_rows=1000, flush_interval_s=60)
    batch_id, [claim] = claims_of(store, 8, chunk_size=8)
    with recorder.open(claim, owed=8) as ledger:
        fill(ledger, range(7))
        recorder.close(timeout_s=5)
        assert ledger.recorded == 7
    assert indexes_in(store, batch_id) == list(range(7))


def test_closing_while_the_store_is_away_comes_to_an_end(store: WatchedStore, spool: Spool) -> None:
    recorder = begin(store, spool, flush_rows=4, flush_interval_s=0.01)
    _, [claim] = claims_of(store, 8, chunk_size=8)
    store.failing = lambda claims: StoreUnavailable()
    with recorder.open(claim, owed=8) as ledger:
        fill(ledger, range(8))
        started = time.monotonic()
        recorder.close(timeout_s=0.3)
        assert time.monotonic() - started < 10


def test_the_ledger_counts_what_is_in_sql(store: WatchedStore, recorder: Recorder) -> None:
    _, [claim] = claims_of(store, 3, chunk_size=8)
    with recorder.open(claim, owed=3) as ledger:
        ledger.add(answer("three words here", index=0))
        ledger.add(answer("REFUSE this", index=1))
        ledger.add(Completion(index=2))
        assert ledger.wait(5) is Verdict.RECORDED
        assert (ledger.recorded, ledger.failed, ledger.tokens) == (3, 1, 3)


def test_an_empty_chunk_is_recorded_at_once(recorder: Recorder, store: WatchedStore) -> None:
    _, [claim] = claims_of(store, 1, chunk_size=8)
    with recorder.open(claim, owed=0) as ledger:
        assert ledger.wait(0) is Verdict.RECORDED
