"""The bytes of a batch's files: counted by one at a time, taken over from who was killed, and never of a batch that is gone."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from store_driver import execute, submit, take, work_off

from headrace.batch import CHAT, ROWS
from headrace.errors import NotFound
from headrace.output_files import count, count_next, pages
from headrace.store import Store
from headrace.store import batches as batch_queries
from headrace.store.files import COUNT_LEASE_S
from headrace.store.tables import files


def never() -> bool:
    return False


def finished(store: Store, count: int = 3, *, endpoint: str = CHAT) -> str:
    batch_id = submit(store, count, endpoint=endpoint).id
    work_off(store, take(store))
    return batch_id


def test_only_a_batch_in_openais_format_has_files_and_only_when_it_is_over(store: Store) -> None:
    finished(store, endpoint=ROWS)
    submit(store, 3, endpoint=CHAT)
    assert store.files.list() == []
    assert not count_next(store, stop=never)


def test_one_counts_and_who_was_killed_over_it_is_followed_by_another(store: Store) -> None:
    batch = store.get_batch(finished(store))
    claimed = store.files.claim_counting()
    assert claimed is not None
    assert (claimed.lines, claimed.bytes, claimed.is_counted) == (3, 0, False)
    assert store.files.claim_counting() is None, "somebody is at it"
    assert store.files.go_on_counting(claimed.id)
    execute(store, update(files).values(updated_at=files.c.updated_at - COUNT_LEASE_S - 1))
    assert count_next(store, stop=never)
    [stored] = store.files.list()
    assert (stored.bytes, stored.is_counted) == (len(b"".join(pages(store, batch, "output"))), True)
    assert not count_next(store, stop=never)


def test_a_batch_that_is_deleted_while_it_is_counted_leaves_nothing(store: Store) -> None:
    batch_id = finished(store)
    claimed = store.files.claim_counting()
    assert claimed is not None
    assert count(store, claimed, stop=lambda: True) is None
    store.delete_batch(batch_id)
    assert not store.files.go_on_counting(claimed.id)
    assert count(store, claimed) is None
    store.files.set_size(claimed.id, 5)
    assert store.files.list() == []
    store.announce_outputs(batch_id)
    assert store.files.list() == []


def test_a_batch_that_is_deleted_while_its_file_is_read_is_not_taken_for_the_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends early looks like a whole one, and a row whose name is gone like another's."""
    monkeypatch.setattr("headrace.output_files.PAGE", 2)
    monkeypatch.setattr(batch_queries, "DELETE_SLICE", 3)
    batch_id = finished(store, 6)
    claimed = store.files.claim_counting()
    assert claimed is not None
    reader = pages(store, store.get_batch(batch_id), "output")
    next(reader)
    store._database.write(lambda connection: batch_queries.begin_delete(connection, batch_id))
    store._database.write(lambda connection: batch_queries.delete_slice(connection, batch_id, start=0))
    with pytest.raises(NotFound):
        next(reader)
    with pytest.raises(NotFound):
        store.output_rows(batch_id, "output", after=2)
    assert count(store, claimed) is None


def test_a_count_ends_where_its_batch_is_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.output_files.PAGE", 2)
    batch_id = finished(store, 6)
    claimed = store.files.claim_counting()
    assert claimed is not None

    def stop() -> bool:
        if batch_id in {batch.id for batch in store.list_batches()}:
            store.delete_batch(batch_id)
        return False

    assert count(store, claimed, stop=stop) is None
    assert store.files.list() == []
