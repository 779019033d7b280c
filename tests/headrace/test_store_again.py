"""What happens to a batch before its time and after its end: taken over, refused, retried, deleted. On SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from store_driver import REFUSED, answer, check, count, execute, submit, take, work_off

from headrace.batch import BatchStatus, Item
from headrace.config import GenerationConfig
from headrace.errors import Conflict, NotFound, QueueFull
from headrace.store import Store
from headrace.store import batches as queries
from headrace.store.again import failed_prompts
from headrace.store.lifecycle import CLOSE_SLICE
from headrace.store.tables import batches, chunks, completions, prompts

TABLES = (batches, prompts, chunks, completions)


def test_a_submission_whose_process_was_killed_is_taken_over_by_the_next_with_its_key(store: Store) -> None:
    def killed() -> Iterator[str]:
        yield from (f"prompt {index}" for index in range(2500))
        with pytest.raises(Conflict):
            submit(store, 5, idempotency_key="k")
        execute(store, batches.update().values(updated_at=1.0))
        seen.append(submit(store, 5, idempotency_key="k").id)
        yield "one more"

    seen: list[str] = []
    with pytest.raises(Conflict, match="given up"):  # it was only slow: it writes nothing into the other's batch
        store.create_batch(killed(), GenerationConfig(), model="m", idempotency_key="k")
    assert [batch.id for batch in store.list_batches()] == seen
    assert submit(store, 5, idempotency_key="k").id == seen[0]
    assert check(store, seen[0]).counts.total == 5
    assert count(store, prompts) == 5


def test_results_have_the_names_that_prompts_came_with(store: Store) -> None:
    items = [Item(f"prompt {index}", custom_id=f"c{index}" if index % 7 else None) for index in range(40)]
    items[3] = Item(REFUSED, custom_id="refused")
    batch = store.create_batch(items, GenerationConfig(), model="m", chunk_size=10)
    claims = take(store)
    work_off(store, claims[:1] + claims[3:])
    for claim in claims[1:3]:
        store.release_chunk(claim)
    names = [item.custom_id for item in items]
    seen = list(store.stream_results(batch.id, page=8))
    assert [row.custom_id for row in seen] == [names[row.index] for row in seen]
    assert len(seen) == 20
    store.cancel_batch(batch.id)
    again = store.retry_batch(batch.id)
    work_off(store, take(store))
    assert [row.custom_id for row in store.results(again.id)] == names[10:30]


def test_no_more_than_so_many_open_prompts(store: Store) -> None:
    first = submit(store, 10, max_open_prompts=10, idempotency_key="k", refused=[3])
    assert store.count_open_prompts() == 9
    second = submit(store, 10, max_open_prompts=10)
    assert store.count_open_prompts() == 19
    with pytest.raises(QueueFull):
        submit(store, 1, max_open_prompts=10)
    assert submit(store, 10, max_open_prompts=10, idempotency_key="k", refused=[3]).id == first.id, "only asked again"
    assert count(store, batches) == 2
    store.cancel_batch(second.id)
    work_off(store, take(store))
    assert store.count_open_prompts() == 0
    submit(store, 1, max_open_prompts=1)


def test_a_batch_that_is_deleted_while_it_is_retried_leaves_no_half_of_it(store: Store) -> None:
    old = submit(store, 600)
    store.cancel_batch(old.id)

    def read() -> Iterator[str]:
        for prompt in failed_prompts(store._database, old.id):
            if not seen:
                store.delete_batch(old.id)
            seen.append(str(prompt))
            yield str(prompt)

    seen: list[str] = []
    with pytest.raises(NotFound):
        store.create_batch(read(), GenerationConfig(), model="m")
    assert count(store, batches) == count(store, prompts) == 0


def test_failed_prompts_are_retried_as_a_batch_of_their_own(store: Store) -> None:
    config = GenerationConfig(max_new_tokens=9)
    old = submit(store, 700, chunk_size=256, refused=[3], priority=4, metadata={"a": "b"}, gen_config=config)
    bad = {0, 5, 255, 256, 699} | set(range(300, 699, 2))
    with pytest.raises(Conflict, match="in_progress"):
        store.retry_batch(old.id)
    for claim in take(store):
        store.record(claim, [answer(p.index, error="engine_error" if p.index in bad else None) for p in store.pending(claim)])
        assert store.finish_chunk(claim)
    before = check(store, old.id)
    new = store.retry_batch(old.id, chunk_size=64, idempotency_key="again")
    assert store.retry_batch(old.id, chunk_size=64, idempotency_key="again").id == new.id
    assert (new.counts.total, new.gen_config, new.priority, new.model) == (len(bad), config, 4, "m")
    assert new.metadata == {"a": "b", "retry_of": old.id}
    asked = [item.prompt for claim in take(store) for item in store.pending(claim)]
    assert asked == [f"prompt {index}" for index in sorted(bad)], "without the one that was refused as it came in"
    assert store.get_batch(old.id) == before


def test_a_cancelled_batch_is_taken_up_again(store: Store) -> None:
    old = submit(store, 20, chunk_size=5)
    work_off(store, take(store, limit=1))
    store.cancel_batch(old.id)
    new = store.retry_batch(old.id)
    assert new.counts.total == 15
    work_off(store, take(store))
    assert check(store, new.id).status is BatchStatus.COMPLETED


def test_nothing_to_retry(store: Store) -> None:
    fine = submit(store, 3)
    work_off(store, take(store))
    refused = store.create_batch([REFUSED], GenerationConfig(), model="m")
    for batch in (fine, refused):
        with pytest.raises(Conflict, match="no failed prompt"):
            store.retry_batch(batch.id)
    with pytest.raises(NotFound):
        store.retry_batch("batch_" + "0" * 32)
    assert count(store, batches) == 2


def test_only_a_batch_that_is_over_is_deleted_and_nothing_of_it_stays(store: Store) -> None:
    batch = submit(store, 10, chunk_size=4, refused=[2])
    claims = take(store, limit=1)
    with pytest.raises(Conflict, match="cancel it first"):
        store.delete_batch(batch.id)
    store.cancel_batch(batch.id)
    with pytest.raises(Conflict):
        store.delete_batch(batch.id)
    store.record(claims[0], [answer(0)])
    other = submit(store, 2)
    store.delete_batch(batch.id)
    with pytest.raises(NotFound):
        store.delete_batch(batch.id)
    with pytest.raises(NotFound):
        store.results(batch.id)
    assert not store.record(claims[0], [answer(1)]).is_held
    assert store.finish_chunk(claims[0]) is False
    assert [count(store, table) for table in TABLES] == [1, 2, 1, 0]
    assert check(store, other.id).counts.total == 2


def test_a_deletion_that_broke_off_is_seen_by_nobody_and_ended_by_the_sweep(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "DELETE_SLICE", 4)
    batch = submit(store, 10, chunk_size=5, idempotency_key="k")
    work_off(store, take(store))
    reader = store.stream_results(batch.id, page=2)
    assert [next(reader).index, next(reader).index] == [0, 1]
    execute(store, batches.update().values(idempotency_key=None))
    store._database.write(lambda connection: queries.begin_delete(connection, batch.id))
    assert store._database.write(lambda connection: queries.delete_slice(connection, batch.id, start=0))
    assert count(store, completions) == 6
    for look in (store.get_batch, store.cancel_batch, store.delete_batch, store.retry_batch, lambda _: next(reader)):
        with pytest.raises(NotFound):
            look(batch.id)
    assert store.list_batches() == []
    assert submit(store, 1, idempotency_key="k").id != batch.id
    store.expire_batches()
    assert [count(store, table) for table in TABLES] == [1, 1, 1, 0]


def test_a_retry_of_a_batch_with_sixteen_pairs_has_no_more(store: Store) -> None:
    for pairs in (16, 15):
        old = submit(store, 1, metadata={str(number): "x" for number in range(pairs)})
        store.cancel_batch(old.id)
        assert len(store.retry_batch(old.id).metadata) == 16


def test_batches_are_kept_for_as_long_as_they_are_asked_to_be(store: Store) -> None:
    ids = [submit(store, 2).id for _ in range(4)]
    work_off(store, take(store, limit=3))
    execute(store, batches.update().where(batches.c.id.in_(ids[:2])).values(updated_at=1.0, created_at=1.0))
    execute(store, batches.update().where(batches.c.id == ids[3]).values(updated_at=1.0, created_at=1.0))
    assert store.delete_outlived(retention_s=60, limit=1) == 1
    assert store.delete_outlived(retention_s=60) == 1
    assert store.delete_outlived(retention_s=60) == 0
    assert {batch.id for batch in store.list_batches()} == set(ids[2:]), "the young one, and the one that is not over"


def test_a_long_cancel_is_gone_on_with(store: Store) -> None:
    batch = submit(store, 300, chunk_size=1)
    seen: list[tuple[BatchStatus, int]] = []

    def when_stopped() -> None:
        now = store.get_batch(batch.id)
        seen.append((now.status, now.counts.done))

    left = store.cancel_batch(batch.id, when_stopped=when_stopped, within_s=0)
    assert seen == [(BatchStatus.CANCELLING, 0)], "workers hear of it before anything is written"
    assert (left.status, left.counts.done) == (BatchStatus.CANCELLING, CLOSE_SLICE)
    assert store.next_chunks(model="m", limit=10, grace_s=0) == [], "nobody begins on what is still open"
    assert store.close_and_erase(stop=lambda: True) == 1
    assert check(store, batch.id).counts.done == 2 * CLOSE_SLICE
    assert store.close_and_erase() == 1
    assert check(store, batch.id).status is BatchStatus.CANCELLED
    assert {one.error.code for one in store.results(batch.id) if one.error} == {"batch_cancelled"}
    assert len(store.results(batch.id)) == 300
    assert store.close_and_erase() == 0


def test_a_long_deletion_is_gone_on_with(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "DELETE_SLICE", 100)
    batch = submit(store, 300)
    store.cancel_batch(batch.id)
    store.delete_batch(batch.id, within_s=0)
    with pytest.raises(NotFound):
        store.get_batch(batch.id)
    assert 0 < count(store, prompts) < 300
    store.close_and_erase()
    assert [count(store, table) for table in TABLES] == [0, 0, 0, 0]
