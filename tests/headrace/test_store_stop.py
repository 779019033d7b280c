"""Cancelling, expiring and giving up, on SQLite and PostgreSQL: at any moment, and always to the last row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import update
from store_driver import answers, check, chunk_rows, count, execute, lapse, outdate, send, submit, take, work_off

from headrace.batch import Batch, BatchStatus
from headrace.config import GenerationConfig
from headrace.errors import Conflict
from headrace.store import Claim, RecordStatus, Store
from headrace.store.tables import batches, completions, prompts

Moment = Callable[[Store, Batch], list[Claim]]


def codes(store: Store, batch_id: str) -> list[str | None]:
    return [None if item.error is None else item.error.code for item in store.results(batch_id)]


def nothing_sent(_store: Store, _batch: Batch) -> list[Claim]:
    return []


def all_sent(store: Store, _batch: Batch) -> list[Claim]:
    send(store)
    return []


def one_held(store: Store, _batch: Batch) -> list[Claim]:
    return take(store, limit=1)


def one_half_recorded(store: Store, _batch: Batch) -> list[Claim]:
    claims = take(store, limit=1)
    store.record(claims[0], answers([0, 2]))
    return claims


def one_recorded_not_finished(store: Store, _batch: Batch) -> list[Claim]:
    claims = take(store, limit=1)
    store.record(claims[0], answers(range(4)))
    return claims


def one_done_two_held(store: Store, _batch: Batch) -> list[Claim]:
    first, *others = take(store)
    work_off(store, [first])
    return others


def all_held(store: Store, _batch: Batch) -> list[Claim]:
    return take(store)


def one_lapsed(store: Store, _batch: Batch) -> list[Claim]:
    (claim,) = take(store, limit=1)
    lapse(store, claim.chunk_id)
    return []


MOMENTS = [
    nothing_sent,
    all_sent,
    one_held,
    one_half_recorded,
    one_recorded_not_finished,
    one_done_two_held,
    all_held,
    one_lapsed,
]


def by_record(store: Store, claim: Claim) -> None:
    assert store.record(claim, answers([claim.stop - 1])).status is RecordStatus.CANCELLED


def by_empty_record(store: Store, claim: Claim) -> None:
    assert store.record(claim, []).status is RecordStatus.CANCELLED


def by_renew(store: Store, claim: Claim) -> None:
    assert store.renew([claim], 60) == set()


def by_finish(store: Store, claim: Claim) -> None:
    store.finish_chunk(claim)


def by_release(store: Store, claim: Claim) -> None:
    store.release_chunk(claim)


def by_dying(store: Store, claim: Claim) -> None:
    assert store.expire_batches() == 1, "the sweep leaves a live worker's chunk to it"
    assert store.get_batch(claim.batch_id).status is BatchStatus.CANCELLING
    lapse(store, claim.chunk_id)
    store.expire_batches()


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_batch_can_be_cancelled_at_any_moment(store: Store, moment: Moment) -> None:
    batch = submit(store, 12, chunk_size=4)
    bystander = submit(store, 4, model="other")
    held = moment(store, batch)
    before = codes(store, batch.id)
    stopped = store.cancel_batch(batch.id)
    assert stopped.status is (BatchStatus.CANCELLING if held else BatchStatus.CANCELLED)
    if held:
        assert store.cancel_batch(batch.id).status is BatchStatus.CANCELLING, "asking twice does no harm"
    assert send(store) == []
    for claim in held:
        by_record(store, claim)
    done = check(store, batch.id)
    assert done.status is BatchStatus.CANCELLED
    assert done.cancelling_at <= done.cancelled_at  # type: ignore[operator]
    after = codes(store, batch.id)
    assert len(after) == 12
    assert set(after) <= {None, "batch_cancelled"}
    assert after.count(None) >= before.count(None)
    with pytest.raises(Conflict, match="cancelled"):
        store.cancel_batch(batch.id)
    assert check(store, bystander.id).status is BatchStatus.IN_PROGRESS


@pytest.mark.parametrize(
    "way", [by_record, by_empty_record, by_renew, by_finish, by_release, by_dying], ids=lambda way: way.__name__
)
def test_a_worker_learns_of_the_end_by_whatever_it_says_next(store: Store, way: Callable[[Store, Claim], None]) -> None:
    batch = submit(store, 8, chunk_size=4)
    (claim,) = take(store, limit=1)
    store.record(claim, answers([0]))
    assert store.cancel_batch(batch.id).status is BatchStatus.CANCELLING
    way(store, claim)
    assert check(store, batch.id).status is BatchStatus.CANCELLED
    assert store.record(claim, answers([1, 2])).status is RecordStatus.CANCELLED
    assert store.results(batch.id)[0].error is None, "what was recorded is kept"
    assert codes(store, batch.id)[1:3] == ["batch_cancelled"] * 2


def test_answers_that_were_ready_are_kept_when_the_batch_is_cancelled(store: Store) -> None:
    batch = submit(store, 4)
    (claim,) = take(store)
    store.cancel_batch(batch.id)
    assert store.record(claim, answers(range(4))).inserted == 4
    done = check(store, batch.id)
    assert (done.status, done.counts.completed) == (BatchStatus.CANCELLED, 4)


def test_what_is_over_stays_over(store: Store) -> None:
    batch = submit(store, 4)
    work_off(store, take(store))
    with pytest.raises(Conflict, match="completed"):
        store.cancel_batch(batch.id)
    outdate(store, batch.id)
    assert store.expire_batches() == 0
    assert check(store, batch.id).status is BatchStatus.COMPLETED


def test_cancelled_while_it_comes_in(store: Store) -> None:
    def cancelled_half_way() -> Iterator[str]:
        for i in range(5000):
            if i == 3000:
                (batch,) = store.list_batches()
                assert store.cancel_batch(batch.id).status is BatchStatus.CANCELLING
                assert store.expire_batches() == 1, "a sweep leaves it to its sender"
            yield f"prompt {i}"

    batch = store.create_batch(cancelled_half_way(), GenerationConfig(), model="m")
    assert batch.status is BatchStatus.CANCELLED
    assert check(store, batch.id).counts.failed == 5000


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_batch_expires_at_any_moment(store: Store, moment: Moment) -> None:
    batch = submit(store, 12, chunk_size=4)
    held = moment(store, batch)
    assert store.expire_batches() == 0
    outdate(store, batch.id)
    assert store.expire_batches() == 1
    done = check(store, batch.id)
    assert done.status is BatchStatus.EXPIRED
    assert done.expired_at is not None
    assert set(codes(store, batch.id)) <= {None, "batch_expired"}
    for claim in held:
        assert store.record(claim, answers([claim.start])).status is RecordStatus.CANCELLED
        assert store.renew([claim], 60) == set()
        assert not store.finish_chunk(claim)
    assert send(store) == []
    assert store.expire_batches() == 0


def test_a_chunk_in_the_middle_is_not_touched_by_the_end_of_its_neighbours(store: Store) -> None:
    batch = submit(store, 20, chunk_size=4, refused=[9])
    claims = take(store)
    work_off(store, [claims[1], claims[3]])
    for claim in (claims[0], claims[2], claims[4]):
        lapse(store, claim.chunk_id)
    assert store.cancel_batch(batch.id).status is BatchStatus.CANCELLED
    done = check(store, batch.id)
    assert (done.counts.completed, done.counts.failed) == (8, 12)
    assert codes(store, batch.id)[8:12] == ["batch_cancelled", "invalid_request", "batch_cancelled", "batch_cancelled"]


def test_expiring_is_taken_up_where_a_crash_left_it(store: Store) -> None:
    batch = submit(store, 12, chunk_size=4)
    (claim,) = take(store, limit=1)
    execute(store, update(batches).where(batches.c.id == batch.id).values(expiring_at=1.0))
    assert send(store) == []
    assert store.claim_chunk(chunk_rows(store, batch.id)[1].id, worker="w", lease_s=60) is None
    assert store.record(claim, answers([0])).status is RecordStatus.CANCELLED
    assert store.expire_batches() == 1
    assert check(store, batch.id).status is BatchStatus.EXPIRED
    assert codes(store, batch.id) == [None] + ["batch_expired"] * 11


def test_cancelling_is_taken_up_where_a_crash_left_it(store: Store) -> None:
    batch = submit(store, 12, chunk_size=4)
    execute(store, update(batches).where(batches.c.id == batch.id).values(status="cancelling", cancelling_at=1.0))
    assert store.expire_batches() == 1
    assert check(store, batch.id).status is BatchStatus.CANCELLED


def test_more_chunks_than_one_slice_are_closed(store: Store) -> None:
    batch = submit(store, 400, chunk_size=1)
    assert store.cancel_batch(batch.id).status is BatchStatus.CANCELLED
    assert check(store, batch.id).counts.failed == 400


@pytest.mark.parametrize("was_cancelled", [False, True])
def test_a_batch_whose_sender_died_is_given_up(store: Store, was_cancelled: bool) -> None:
    batch = submit(store, 10, refused=[3], idempotency_key="k")
    # As a crash between two slices leaves it.
    status = "cancelling" if was_cancelled else "validating"
    execute(store, batches.update().values(status=status, total=0, failed=0, chunk_count=0, open_chunks=0, content_hash=None))
    with pytest.raises(Conflict):
        submit(store, 10, refused=[3], idempotency_key="k")
    store.expire_batches()
    assert not store.get_batch(batch.id).status.is_terminal, "its sender may only be slow"
    execute(store, batches.update().values(updated_at=1.0))
    assert store.expire_batches() >= 1
    over = store.get_batch(batch.id)
    assert over.status is (BatchStatus.CANCELLED if was_cancelled else BatchStatus.FAILED)
    assert over.errors[0]["code"] == "submission_interrupted"
    assert count(store, prompts) == count(store, completions) == 0
    assert submit(store, 10, refused=[3], idempotency_key="k").id != batch.id
