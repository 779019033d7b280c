"""The store's chunks, on SQLite and PostgreSQL: sent, claimed, recorded once, finished, handed back, lost."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import update
from store_driver import answer, answers, check, chunk_rows, execute, lapse, send, submit, take, work_off

from headrace.batch import BatchStatus
from headrace.store import Claim, RecordStatus, Store
from headrace.store.tables import chunks


def claim_one(store: Store, chunk_id: str, worker: str = "w") -> Claim:
    claim = store.claim_chunk(chunk_id, worker=worker, lease_s=60)
    assert claim is not None
    return claim


def test_a_batch_from_first_chunk_to_last(store: Store) -> None:
    batch = submit(store, 10, chunk_size=4)
    claims = take(store)
    assert [(claim.start, claim.stop, claim.epoch, claim.attempt, claim.number, claim.of) for claim in claims] == [
        (0, 4, 1, 1, 1, 3),
        (4, 8, 1, 1, 2, 3),
        (8, 10, 1, 1, 3, 3),
    ]
    assert store.get_batch(batch.id).started_at is not None
    work_off(store, claims[:2])
    middle = check(store, batch.id)
    assert (middle.status, middle.counts.completed, middle.completed_at) == (BatchStatus.IN_PROGRESS, 8, None)
    work_off(store, claims[2:])
    done = check(store, batch.id)
    assert done.status is BatchStatus.COMPLETED
    assert done.created_at <= done.in_progress_at <= done.started_at <= done.finalizing_at <= done.completed_at  # type: ignore[operator]


def test_higher_priority_first_and_within_a_priority_by_turns(store: Store) -> None:
    batches = [submit(store, 4, chunk_size=2, priority=priority) for priority in (0, 5, 0, 5, -1)]
    submit(store, 4, model="other", priority=9)
    want = [(batches[i].id, start) for pair in ((1, 3), (0, 2), (4,)) for start in (0, 2) for i in pair]
    one_by_one = [(ref.batch_id, ref.start) for _ in range(5) for ref in send(store, limit=2)]
    assert one_by_one == want
    assert send(store) == []


def test_a_chunk_is_sent_again_only_after_its_grace(store: Store) -> None:
    submit(store, 4, chunk_size=2)
    first = send(store)
    assert send(store) == []
    assert store.count_in_flight(model="m") == store.count_in_flight(model="m", grace_s=60) == 2
    execute(store, update(chunks).where(chunks.c.id == first[0].chunk_id).values(sent_at=1.0))
    assert store.count_in_flight(model="m") == 2
    assert store.count_in_flight(model="m", grace_s=60) == 1
    assert send(store) == first[:1]
    assert store.count_in_flight(model="m", grace_s=60) == 2


def test_what_was_not_sent_after_all_is_sent_next(store: Store) -> None:
    submit(store, 6, chunk_size=2)
    refs = send(store)
    claim = claim_one(store, refs[0].chunk_id)
    store.unsend(refs)
    assert send(store) == refs[1:], "a chunk that a worker holds stays with it"
    assert store.renew([claim], 60) == {claim}


def test_in_flight_are_sent_and_held_chunks(store: Store) -> None:
    submit(store, 10, chunk_size=2)
    assert store.count_in_flight(model="m") == 0
    refs = send(store, limit=3)
    claims = [claim_one(store, ref.chunk_id) for ref in refs[:2]]
    assert store.count_in_flight(model="m") == 3
    work_off(store, claims[:1])
    assert store.count_in_flight(model="m") == 2
    store.release_chunk(claims[1])
    assert store.count_in_flight(model="m") == 1
    assert store.count_in_flight(model="other") == 0


def test_a_live_lease_keeps_others_out_and_a_lapsed_one_lets_them_in(store: Store) -> None:
    batch = submit(store, 4)
    (ref,) = send(store)
    zombie = store.claim_chunk(ref.chunk_id, worker="zombie", lease_s=60)
    assert zombie is not None
    assert store.claim_chunk(ref.chunk_id, worker="heir", lease_s=60) is None
    store.record(zombie, answers([0, 1]))  # also extends the lease
    lapse(store, ref.chunk_id)
    heir = claim_one(store, ref.chunk_id, "heir")
    assert (heir.epoch, heir.attempt) == (2, 2)
    assert [item.index for item in store.pending(heir)] == [2, 3], "what the zombie wrote in time is not done again"
    late = store.record(zombie, answers([2, 3], "zombie"))
    assert (late.status, late.inserted, late.is_held) == (RecordStatus.FENCED, 0, False)
    assert store.renew([zombie, heir], 60) == {heir}
    store.release_chunk(zombie)
    store.record(heir, answers([2, 3], "heir"))
    assert not store.finish_chunk(zombie), "all rows are there, but it is the heir's to say so"
    assert check(store, batch.id).status is BatchStatus.IN_PROGRESS
    assert store.finish_chunk(heir)
    assert [item.choices[0].text for item in store.results(batch.id)] == ["yes 0", "yes 1", "heir 2", "heir 3"]
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_a_lapsed_holder_goes_on_where_it_was_while_nobody_took_the_chunk(store: Store) -> None:
    batch = submit(store, 4)
    (claim,) = take(store)
    lapse(store, claim.chunk_id)
    assert store.requeue_lost(grace_s=60) == 1
    assert store.count_in_flight(model="m") == 0
    assert store.record(claim, answers([0])).status is RecordStatus.OK
    assert store.claim_chunk(claim.chunk_id, worker="other", lease_s=60) is None, "its lease lives again"
    assert store.count_in_flight(model="m") == 1
    lapse(store, claim.chunk_id)
    assert [ref.chunk_id for ref in send(store)] == [claim.chunk_id], "a lapsed chunk is due at once"
    assert store.renew([claim], 60) == {claim}
    work_off(store, [claim])
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_ten_deliveries_of_everything_count_once(store: Store) -> None:
    batch = submit(store, 12, chunk_size=4)
    for ref in send(store):
        claims = [store.claim_chunk(ref.chunk_id, worker=f"w{i}", lease_s=60) for i in range(10)]
        claim = claims[0]
        assert claim is not None
        assert claims[1:] == [None] * 9
        rows = answers(range(ref.start, ref.stop))
        assert [store.record(claim, [*rows, *rows]).inserted for _ in range(10)] == [4] + [0] * 9
        assert [store.finish_chunk(claim) for _ in range(10)] == [True] * 10
        assert store.claim_chunk(ref.chunk_id, worker="w", lease_s=60) is None
        again = store.record(claim, rows)
        assert (again.status, again.inserted) == (RecordStatus.OK, 0), "the reply to the first commit may have been lost"
    assert [row.state for row in chunk_rows(store, batch.id)] == ["done"] * 3, "a late record wakes no chunk"
    done = check(store, batch.id)
    assert (done.status, done.counts.completed) == (BatchStatus.COMPLETED, 12)


def test_what_is_begun_is_seen_by_the_last_answer_of_each_chunk(store: Store) -> None:
    batch_id = submit(store, 20, chunk_size=10, refused=[19]).id
    one, two = take(store)

    def seen() -> tuple[int, int]:
        batch = check(store, batch_id)
        return batch.begun, batch.running

    assert seen() == (0, 0)
    store.record(one, answers([2]))
    assert seen() == (3, 1), "three are begun; of these one is done, and the refused one counts as done too"
    store.record_many([(two, answers([14])), (one, answers([6, 4]))])
    assert seen() == (12, 7)
    store.record_many([(one, answers([6, 1])), (one, answers([7, 1]))])
    assert seen() == (13, 6), "one chunk's rows in two entries, some of them a second time"
    lapse(store, two.chunk_id)
    again = store.claim_chunk(two.chunk_id, worker="v", lease_s=60)
    assert again is not None
    store.record_late([(two, answers([16])), (again, answers([15]))])
    assert seen() == (15, 6), "two claims on one chunk"
    work_off(store, [one, again])
    assert seen() == (19, 0)


def test_the_first_answer_stays(store: Store) -> None:
    batch = submit(store, 2)
    (claim,) = take(store)
    store.record(claim, [answer(0, "first")])
    store.record(claim, [answer(0, error="engine_error"), answer(1, "second")])
    assert [item.choices[0].text for item in store.results(batch.id)] == ["first 0", "second 1"]
    assert check(store, batch.id).counts.failed == 0


def test_one_transaction_for_many_claims_and_one_void_claim_among_them(store: Store) -> None:
    one, two, three = (submit(store, 4) for _ in range(3))
    a, b, c = take(store)
    lapse(store, b.chunk_id)
    heir = claim_one(store, b.chunk_id, "heir")
    store.cancel_batch(three.id)
    results = store.record_many(
        [(c, answers([0])), (a, answers([0, 1])), (b, answers([0])), (heir, answers([3])), (a, answers([1, 2]))]
    )
    assert [(result.claim, result.status, result.is_held) for result in results] == [
        (c, RecordStatus.CANCELLED, False),
        (a, RecordStatus.OK, True),
        (b, RecordStatus.FENCED, False),
        (heir, RecordStatus.OK, True),
        (a, RecordStatus.OK, True),
    ]
    assert [check(store, batch.id).counts.completed for batch in (one, two, three)] == [3, 1, 1]
    assert store.record_many([]) == []


def test_a_chunk_is_done_only_when_all_its_rows_are_there(store: Store) -> None:
    batch = submit(store, 4)
    (claim,) = take(store)
    store.record(claim, answers([0, 1, 3]))
    assert not store.finish_chunk(claim)
    assert check(store, batch.id).status is BatchStatus.IN_PROGRESS
    assert [item.index for item in store.pending(claim)] == [2]
    store.record(claim, answers([2]))
    assert store.finish_chunk(claim)
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_failed_prompts_fail_alone(store: Store) -> None:
    batch = submit(store, 3)
    (claim,) = take(store)
    store.record(claim, [answer(0), answer(1, error="context_length_exceeded"), answer(2, error="poison_prompt")])
    assert store.finish_chunk(claim)
    done = check(store, batch.id)
    assert (done.status, done.counts.completed, done.counts.failed) == (BatchStatus.COMPLETED, 1, 2)


def test_a_chunk_handed_back_keeps_its_rows_and_is_not_charged(store: Store) -> None:
    batch = submit(store, 4)
    (claim,) = take(store)
    store.record(claim, answers([0, 1]))
    store.release_chunk(claim)
    store.release_chunk(claim)
    assert store.record(claim, answers([2], "late")).status is RecordStatus.FENCED
    (again,) = take(store, worker="next")
    assert again.attempt == 1
    assert [item.index for item in store.pending(again)] == [2, 3]
    work_off(store, [again])
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_attempts_count_claims_that_were_lost(store: Store) -> None:
    submit(store, 4)
    attempts = []
    for _ in range(3):
        (claim,) = take(store)
        attempts.append(claim.attempt)
        lapse(store, claim.chunk_id)
    assert attempts == [1, 2, 3]


def test_what_is_lost_is_requeued_for_its_model_or_for_all(store: Store) -> None:
    for model in ("m", "n"):
        submit(store, 4, model=model, chunk_size=2)
        refs = send(store, model=model)
        claim = claim_one(store, refs[0].chunk_id)
        lapse(store, claim.chunk_id)
        execute(store, update(chunks).where(chunks.c.id == refs[1].chunk_id).values(sent_at=1.0))
    assert store.requeue_lost(grace_s=60, model="m") == 2
    assert (store.count_in_flight(model="m"), store.count_in_flight(model="n")) == (0, 2)
    assert store.requeue_lost(grace_s=60) == 2
    assert store.requeue_lost(grace_s=60) == 0


def test_an_index_outside_the_claim_is_our_bug(store: Store) -> None:
    batch = submit(store, 4, chunk_size=2)
    claim = take(store)[0]
    with pytest.raises(AssertionError):
        store.record(claim, answers([0, 2]))
    assert check(store, batch.id).counts.done == 0, "the whole transaction is undone"


def test_workers_are_known_by_their_last_word(store: Store) -> None:
    assert not store.heartbeat("w1")
    store.register_worker("w1", host="h1", model="m", stats={"pid": 7})
    store.register_worker("w2", host="h2", model="n")
    assert store.heartbeat("w1", {"pid": 8})
    assert store.heartbeat("w1")
    one, two = store.list_workers()
    assert (one.id, one.host, one.model, one.stats) == ("w1", "h1", "m", {"pid": 8})
    assert one.heartbeat_at >= one.started_at
    assert 0 <= one.age_s < 5
    assert [worker.id for worker in store.list_workers(model="n")] == [two.id]
    time.sleep(1.1)
    store.heartbeat("w2")
    assert [worker.id for worker in store.list_workers(max_age_s=1.0)] == ["w2"]
    store.register_worker("w1", host="h9", model="m")
    assert [(worker.id, worker.host) for worker in store.list_workers()] == [("w2", "h2"), ("w1", "h9")]
    store.remove_worker("w1")
    assert [worker.id for worker in store.list_workers()] == ["w2"]
