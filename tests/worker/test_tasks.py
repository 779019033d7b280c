"""One chunk through a worker, in process: what is computed, what is resumed, what is handed back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from celery.exceptions import Reject
from echo_frontend import EchoFrontend, answer
from worker_process import wait_for

from headrace.batch import BatchStatus
from headrace.config import GenerationConfig
from headrace.store import ChunkMessage, Store
from worker.runtime import Runtime
from worker.tasks import generate_chunk


def sent(store: Store, prompts, *, chunk_size: int = 64, **options) -> tuple[str, list[ChunkMessage]]:
    batch = store.create_batch(prompts, GenerationConfig(max_new_tokens=7), model="echo", chunk_size=chunk_size, **options)
    return batch.id, [store.chunk_message(ref) for ref in store.next_chunks(model="echo", limit=100, grace_s=60)]


class Started:
    """`generate_chunk` in a thread, as Celery's pool runs it."""

    def __init__(self, runtime: Runtime, message: ChunkMessage) -> None:
        self.lines: list[str] = []
        self.result: str | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(runtime, message))
        self._thread.start()

    def _run(self, runtime: Runtime, message: ChunkMessage) -> None:
        try:
            self.result = generate_chunk(runtime, message, self.lines.append)
        except BaseException as error:
            self.error = error

    def join(self) -> str:
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def test_a_chunk_is_answered_recorded_and_finished(runtime: Runtime, store: Store, engine: EchoFrontend) -> None:
    prompts = ["one two", [{"role": "user", "content": "three"}], "four five six"]
    batch_id, [message] = sent(store, prompts)
    line = generate_chunk(runtime, message, lambda _: None)
    assert line.startswith("3/3 rows · 6 tok · ")
    batch = store.get_batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.counts.completed, batch.usage.completion_tokens) == (3, 6)
    assert [completion.choices[0].text for completion in store.results(batch_id)] == [
        "echo one two",
        "echo three",
        "echo four five six",
    ]
    assert list(engine.seed_keys) == [f"{batch_id}:{index}" for index in range(3)]


def test_a_bad_prompt_in_the_middle_fails_alone(runtime: Runtime, store: Store) -> None:
    batch_id, [message] = sent(store, ["a", "REFUSE me", "c"])
    assert "3/3 rows · 1 failed" in generate_chunk(runtime, message, lambda _: None)
    rows = store.results(batch_id)
    assert [row.error.code if row.error else None for row in rows] == [None, "invalid_request", None]
    assert store.get_batch(batch_id).counts.failed == 1


def test_five_deliveries_of_a_message_compute_it_once(make_runtime, store: Store, engine: EchoFrontend) -> None:
    runtimes = [make_runtime(engine) for _ in range(5)]
    batch_id, [message] = sent(store, [f"p{i}" for i in range(20)])
    copies = [Started(runtime, ChunkMessage.from_dict(message.to_dict())) for runtime in runtimes]
    lines = [copy.join() for copy in copies]
    assert sum(line.startswith("20/20 rows") for line in lines) == 1
    assert sum(line.startswith("nothing to do") for line in lines) == 4
    assert len(engine.seen) == 20
    assert [row.index for row in store.results(batch_id)] == list(range(20))


def test_a_chunk_is_resumed_where_a_dead_worker_left_it(runtime: Runtime, store: Store, engine: EchoFrontend) -> None:
    batch_id, [message] = sent(store, [f"p{i}" for i in range(10)])
    claim = store.claim_chunk(message.chunk_id, worker="dead", lease_s=0.05)
    store.record_many([(claim, [answer(f"p{i}", index=i) for i in (0, 3, 4, 9)])])
    time.sleep(0.1)
    # The recorded rows extended the lease; nothing of this chunk is anybody's before it runs out.
    wait_for(
        lambda: generate_chunk(runtime, message, lambda _: None).startswith("6/6 rows"), timeout_s=5, what="the lease runs out"
    )
    assert [index for index, _ in engine.seen] == [1, 2, 5, 6, 7, 8]
    assert [row.choices[0].text for row in store.results(batch_id)] == [f"echo p{i}" for i in range(10)]


def test_draining_hands_back_what_is_not_done(make_runtime, store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    _, [message] = sent(store, [f"p{i}" for i in range(8)])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: len(engine.seen) == 8, timeout_s=5, what="all submitted")
    runtime.drain(0.3)
    assert "handed back" in chunk.join()
    assert sorted(engine.aborted) == list(range(8))
    assert store.count_in_flight(model="echo") == 0
    again = store.claim_chunk(message.chunk_id, worker="next", lease_s=30)
    assert again is not None
    assert again.attempt == 1, "a chunk that was handed back in good order is not charged for it"


def test_draining_lets_a_chunk_end_that_can(make_runtime, store: Store) -> None:
    runtime = make_runtime(EchoFrontend("echo", pause_s=0.5))
    batch_id, [message] = sent(store, ["a", "b"])
    chunk = Started(runtime, message)
    wait_for(runtime.recorder.ledgers, timeout_s=5, what="claimed")
    runtime.drain(10)
    assert chunk.join().startswith("2/2 rows")
    assert store.get_batch(batch_id).status is BatchStatus.COMPLETED


def test_a_draining_worker_takes_nothing(runtime: Runtime, store: Store) -> None:
    _, [message] = sent(store, ["a"])
    runtime.draining.set()
    with pytest.raises(Reject) as caught:
        generate_chunk(runtime, message, lambda _: None)
    assert caught.value.requeue
    assert store.claim_chunk(message.chunk_id, worker="other", lease_s=1) is not None


def test_a_lost_engine_ends_the_worker_and_records_no_prompt_as_failed(
    make_runtime, store: Store, engine: EchoFrontend
) -> None:
    runtime = make_runtime(engine, lease_s=2.0)
    troubles: list[str] = []
    runtime.on_trouble = troubles.append
    batch_id, [message] = sent(store, [f"p{i}" for i in range(4)])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: len(engine.seen) == 4, timeout_s=5, what="all submitted")
    engine.die()
    assert "the engine was lost" in chunk.join()
    wait_for(lambda: troubles, timeout_s=5, what="the process is asked to end")
    assert store.results(batch_id) == []
    assert store.count_in_flight(model="echo") == 0


def test_a_stuck_engine_is_noticed_but_an_idle_one_is_not(make_runtime, settings, store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    runtime.host._stall_s = 0.2
    time.sleep(0.3)
    assert runtime.host.trouble() is None
    time.sleep(0.3)
    assert runtime.host.trouble() is None
    _, [message] = sent(store, ["a"])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: engine.seen, timeout_s=5, what="submitted")
    assert runtime.host.trouble() is None
    wait_for(runtime.host.trouble, timeout_s=20, what="stuck")
    runtime.keep_leases()
    assert "the engine was lost" in chunk.join()


def test_a_worker_that_lost_its_lease_stops_computing(make_runtime, store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    batch_id, [message] = sent(store, [f"p{i}" for i in range(4)])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: len(engine.seen) == 4, timeout_s=5, what="all submitted")
    [ledger] = runtime.recorder.ledgers()
    store.release_chunk(ledger.claim)
    assert store.claim_chunk(message.chunk_id, worker="other", lease_s=30) is not None
    runtime.keep_leases()
    assert "another worker" in chunk.join()
    assert sorted(engine.aborted) == [0, 1, 2, 3]
    assert store.results(batch_id) == []


def test_cancelling_stops_the_engine(make_runtime: Callable[..., Runtime], store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    batch_id, [message] = sent(store, [f"p{i}" for i in range(4)])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: len(engine.seen) == 4, timeout_s=5, what="all submitted")
    store.cancel_batch(batch_id)
    runtime.keep_leases()
    chunk.join()
    assert sorted(engine.aborted) == [0, 1, 2, 3]
    assert store.get_batch(batch_id).status is BatchStatus.CANCELLED
    assert {row.error.code for row in store.results(batch_id)} == {"batch_cancelled"}


def test_cancelling_keeps_what_the_engine_has_answered(
    make_runtime: Callable[..., Runtime], store: Store, engine: EchoFrontend
) -> None:
    """Also what waits for its transaction when the worker hears of the cancel."""
    runtime = make_runtime(engine, flush_interval_s=60.0)
    batch_id, [message] = sent(store, [f"p{i}" for i in range(4)])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: len(engine.seen) == 4, timeout_s=5, what="all submitted")
    [ledger] = runtime.recorder.ledgers()
    for index in (0, 2):
        ledger.add(answer(f"p{index}", index=index))
    store.cancel_batch(batch_id)
    runtime.keep_leases()
    chunk.join()
    assert store.get_batch(batch_id).status is BatchStatus.CANCELLED
    assert [row.error and row.error.code for row in store.results(batch_id)] == [
        None, "batch_cancelled", None, "batch_cancelled",
    ]  # fmt: skip


def test_leases_are_renewed_while_the_engine_works(make_runtime, store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine, lease_s=1.0)
    _, [message] = sent(store, ["a"])
    engine.hold()
    chunk = Started(runtime, message)
    wait_for(lambda: engine.seen, timeout_s=5, what="submitted")
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        assert store.claim_chunk(message.chunk_id, worker="thief", lease_s=1) is None
        time.sleep(0.1)
    engine.release()
    assert chunk.join().startswith("1/1 rows")


def test_progress_is_told_while_it_runs(make_runtime, store: Store, monkeypatch) -> None:
    monkeypatch.setattr("worker.tasks.PROGRESS_S", 0.1)
    runtime = make_runtime(EchoFrontend("echo", pause_s=0.6))
    _, [message] = sent(store, ["secret words", "REFUSE"])
    chunk = Started(runtime, message)
    chunk.join()
    assert chunk.lines[0] == "0/2 rows"
    assert not any("secret" in line for line in chunk.lines)


def test_the_next_chunks_follow_by_themselves(runtime: Runtime, store: Store, broker) -> None:
    prompts = [f"p{i}" for i in range(30)]
    batch = store.create_batch(prompts, GenerationConfig(), model="echo", chunk_size=1)
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    generate_chunk(runtime, store.chunk_message(ref), lambda _: None)
    assert broker.count_waiting("echo") == runtime.settings.dispatch_window
    assert store.get_batch(batch.id).counts.done == 1


def test_the_worker_is_on_the_list_while_it_lives(make_runtime, store: Store, engine: EchoFrontend) -> None:
    runtime = make_runtime(engine)
    [info] = store.list_workers()
    assert (info.id, info.model) == (runtime.worker_id, "echo")
    assert info.stats["chunks_in_flight"] == 0
    runtime.drain(0)
    runtime.close()
    assert store.list_workers() == []


def test_chunks_on_their_way_are_taken_to_be_as_wide_as_the_last_one_whatever_was_left_of_it(
    make_runtime, store: Store, engine: EchoFrontend
) -> None:
    runtime = make_runtime(engine)
    engine.max_running = 100
    store.create_batch([f"p{number}" for number in range(10)], GenerationConfig(n=2), model="echo")
    [ref] = store.next_chunks(model="echo", limit=9, grace_s=60)
    message = store.chunk_message(ref)
    with runtime.working() as tell:
        tell(message)
        # All its answers are there already, so that it takes no room itself; each other brings ten prompts of two choices.
        assert runtime.takes_chunk(held=7)
        assert not runtime.takes_chunk(held=8)
