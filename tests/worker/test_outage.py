"""A worker whose database is away: it takes nothing more, loses nothing, and stops where its spool has no more room."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from echo_frontend import EchoFrontend, answer
from outage_bench import FailingStore
from worker_process import wait_for

from headrace.config import GenerationConfig
from headrace.errors import StorageFull, StoreUnavailable
from headrace.settings import Settings
from headrace.store import ChunkMessage
from worker.outage import Outage
from worker.runtime import Runtime
from worker.tasks import generate_chunk


@pytest.fixture
def store(settings: Settings) -> Iterator[FailingStore]:
    store = FailingStore(settings.database_url)
    store.migrate()
    yield store
    store.close()


class Work:
    """A chunk in a thread, as Celery's pool runs it."""

    def __init__(self, runtime: Runtime, message: ChunkMessage) -> None:
        self.line = ""
        self._thread = threading.Thread(target=self._run, args=(runtime, message))
        self._thread.start()

    def _run(self, runtime: Runtime, message: ChunkMessage) -> None:
        self.line = generate_chunk(runtime, message, lambda _: None)

    def join(self) -> str:
        self._thread.join(15)
        assert not self._thread.is_alive()
        return self.line


def sent(store: FailingStore, count: int) -> tuple[str, ChunkMessage]:
    batch = store.create_batch([f"p{i}" for i in range(count)], GenerationConfig(), model="echo")
    [ref] = store.next_chunks(model="echo", limit=9, grace_s=60)
    return batch.id, store.chunk_message(ref)


def test_a_worker_whose_store_is_away_takes_no_chunk(make_runtime, store: FailingStore, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    batch_id, message = sent(store, 4)
    assert runtime.takes_chunk(held=0)
    store.error = StoreUnavailable
    chunk = Work(runtime, message)
    wait_for(lambda: not runtime.takes_chunk(held=0), timeout_s=5, what="the outage is known")
    wait_for(lambda: runtime.stats()["spool_bytes"], timeout_s=5, what="the answers are on disk")
    store.error = None
    assert chunk.join().startswith("4/4 rows")
    wait_for(lambda: runtime.takes_chunk(held=0), timeout_s=5, what="it takes chunks again")
    assert runtime.stats()["spool_bytes"] == 0
    assert store.get_batch(batch_id).counts.completed == 4


@pytest.mark.parametrize("error", [StoreUnavailable, StorageFull])
def test_where_the_spool_is_full_work_stops_and_nothing_is_lost(
    make_runtime, store: FailingStore, engine: EchoFrontend, error: type, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = make_runtime(engine, spool_bytes=100)
    batch_id, message = sent(store, 8)
    store.error = error
    engine.hold()
    chunk = Work(runtime, message)
    wait_for(lambda: len(engine.seen) == 8, timeout_s=5, what="submitted")
    [ledger] = runtime.recorder.ledgers()
    for index in range(3):
        ledger.add(answer(f"p{index}", index=index))
    wait_for(lambda: "spool_full" in [getattr(r, "event", "") for r in caplog.records], timeout_s=8, what="it is said")
    wait_for(lambda: len(engine.aborted) == 8, timeout_s=5, what="the engine is free")
    store.error = None
    assert "handed back" in chunk.join()
    assert [row.index for row in store.results(batch_id)] == [0, 1, 2], "what was answered is recorded"
    again = store.claim_chunk(message.chunk_id, worker="next", lease_s=30)
    assert again is not None, "the rest is anybody's at once"
    assert again.attempt == 1, "and nobody is charged for it"


def test_a_chunk_that_is_answered_waits_where_the_spool_is_full(
    make_runtime, store: FailingStore, engine: EchoFrontend
) -> None:
    runtime = make_runtime(engine, spool_bytes=100)
    batch_id, message = sent(store, 4)
    store.error = StorageFull
    chunk = Work(runtime, message)
    time.sleep(2.5)
    store.error = None
    assert chunk.join().startswith("4/4 rows")
    assert store.get_batch(batch_id).counts.completed == 4


def test_a_closing_worker_does_not_wait_for_its_store_for_ever(make_runtime, store: FailingStore, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine, spool_bytes=100)
    _, message = sent(store, 2)
    store.error = StoreUnavailable
    engine.hold()
    chunk = Work(runtime, message)
    wait_for(lambda: len(engine.seen) == 2, timeout_s=5, what="submitted")
    started = time.monotonic()
    runtime.drain(0.2)
    chunk.join()
    assert time.monotonic() - started < 12
    store.error = None


def test_only_what_can_heal_is_waited_for() -> None:
    outage, calls = Outage(), []

    def wrong() -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        outage.ride_out(wrong, what="a test")
    assert (calls, outage.is_on) == ([1], False)


def test_an_outage_is_known_while_somebody_waits_and_no_longer() -> None:
    outage, seen = Outage(), []

    def away_twice() -> str:
        seen.append(outage.is_on)
        if len(seen) < 3:
            raise StoreUnavailable
        return "back"

    assert outage.ride_out(away_twice, what="a test") == "back"
    assert (seen, outage.is_on) == ([False, True, True], False)
    with pytest.raises(StoreUnavailable):
        outage.ride_out(lambda: _raise(StoreUnavailable()), what="a test", give_up=lambda: True)
    assert not outage.is_on


def _raise(error: Exception) -> None:
    raise error
