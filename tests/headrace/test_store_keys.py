"""API keys and their limits, on SQLite and PostgreSQL: what is stored of a key, who has a batch, and that no limit is ever passed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update
from store_driver import answers, check, execute, submit, take, work_off

from headrace.config import GenerationConfig
from headrace.errors import Conflict, InvalidRequest, NotFound, QueueFull, QuotaExceeded, StorageFull
from headrace.store import Role, Store
from headrace.store.admission import size_of
from headrace.store.tables import api_keys, batches


def test_a_key_is_shown_once_and_stored_as_a_hash(store: Store) -> None:
    made = store.keys.create("ci", max_active_prompts=5, max_active_batches=2, weight=3)
    assert len(made.text) == 46
    assert made.text.startswith(made.key.prefix)
    (row,) = store._database.read(lambda connection: connection.execute(select(api_keys)).all())
    assert made.text not in repr(row)
    assert made.text[9:] not in repr(row)
    assert len(row.hash) == 64
    (listed,) = store.keys.list()
    assert listed == made.key
    assert (listed.name, listed.role, listed.max_active_prompts, listed.max_active_batches, listed.weight) == (
        "ci",
        Role.USER,
        5,
        2,
        3,
    )
    assert made.text not in repr(listed)
    assert store.keys.create("other").text != made.text


def test_a_key_opens_until_it_is_revoked(store: Store) -> None:
    assert not store.keys.any()
    made = store.keys.create("ci", role=Role.ADMIN)
    assert store.keys.any()
    found = store.keys.authenticate(made.text)
    assert found is not None
    assert (found.id, found.role) == (made.key.id, Role.ADMIN)
    for wrong in ("", "hr_", made.text[:-1], made.text + "x", made.text.upper(), "\udcff", "'; DROP TABLE api_keys; --"):
        assert store.keys.authenticate(wrong) is None
    with pytest.raises(NotFound):
        store.keys.revoke("nobody")
    assert store.keys.revoke("ci").revoked_at is not None
    assert store.keys.authenticate(made.text) is None
    with pytest.raises(NotFound):
        store.keys.revoke(made.key.id)
    assert store.keys.any(), "a revoked key does not open the door to everybody"


def test_a_key_is_replaced_under_its_name(store: Store) -> None:
    old = store.keys.create("ci")
    with pytest.raises(Conflict):
        store.keys.create("ci")
    store.keys.revoke("ci")
    new = store.keys.create("ci")
    assert store.keys.authenticate(old.text) is None
    assert store.keys.authenticate(new.text) is not None


def test_of_many_who_take_a_name_at_once_one_gets_it(store: Store) -> None:
    def create(number: int) -> str:
        try:
            return store.keys.create(f"ci-{number // 6}").key.name
        except Conflict as error:
            return error.message

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(create, range(60)))
    for number in range(10):
        of_name = told[6 * number : 6 * number + 6]
        assert of_name.count(f"ci-{number}") == 1
        assert sum(f"named 'ci-{number}' already" in line for line in of_name) == 5
    assert sorted(key.name for key in store.keys.list()) == [f"ci-{number}" for number in range(10)]


def test_the_last_use_is_noted_by_the_minute(store: Store) -> None:
    made = store.keys.create("ci")
    assert made.key.last_used_at is None
    store.keys.authenticate(made.text)
    (first,) = store.keys.list()
    assert first.last_used_at == pytest.approx(time.time(), abs=30)
    store.keys.authenticate(made.text)
    assert store.keys.list() == [first]
    execute(store, update(api_keys).values(last_used_at=1.0))
    store.keys.authenticate(made.text)
    assert store.keys.list()[0].last_used_at > 1.0  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"name": "a\nb"}, {"name": " a"}, {"name": "x" * 65}, {"weight": 0}, {"weight": 1001}, {"max_active_prompts": 0},
     {"max_active_batches": -1}, {"max_active_prompts": 2**31},
     {"max_priority": 1001}, {"max_priority": -1001}],
)  # fmt: skip
def test_what_can_not_be_a_key(store: Store, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        store.keys.create(**{"name": "ci", **wrong})  # type: ignore[arg-type]
    assert store.keys.list() == []


def test_batches_have_an_owner(store: Store) -> None:
    one, two = store.keys.create("one").key.id, store.keys.create("two").key.id
    mine, other, nobodys = submit(store, 2, owner=one), submit(store, 2, owner=two), submit(store, 2)
    assert [store.owner_of(batch.id) for batch in (mine, other, nobodys)] == [one, two, None]
    assert [batch.id for batch in store.list_batches(owner=one)] == [mine.id]
    assert {batch.id for batch in store.list_batches()} == {mine.id, other.id, nobodys.id}
    with pytest.raises(NotFound):
        store.list_batches(owner=one, after=other.id)
    with pytest.raises(NotFound):
        store.owner_of("batch_none")


def test_two_owners_may_use_the_same_idempotency_key(store: Store) -> None:
    one, two = store.keys.create("one").key.id, store.keys.create("two").key.id
    first = submit(store, 2, owner=one, idempotency_key="k")
    assert submit(store, 2, owner=one, idempotency_key="k").id == first.id
    second = submit(store, 2, owner=two, idempotency_key="k")
    third = submit(store, 2, idempotency_key="k")
    assert len({first.id, second.id, third.id}) == 3


def test_a_retry_belongs_to_the_owner_of_what_is_retried(store: Store) -> None:
    owner = store.keys.create("one").key.id
    batch = submit(store, 2, owner=owner)
    store.cancel_batch(batch.id)
    again = store.retry_batch(batch.id)
    assert store.owner_of(again.id) == owner


def test_a_limit_on_prompts_holds_and_is_named(store: Store) -> None:
    owner = store.keys.create("one", max_active_prompts=10).key.id
    first = submit(store, 6, owner=owner, reserved=6, refused=[5])
    with pytest.raises(QuotaExceeded, match=r"max_active_prompts: .* 10 active prompts and has 5;"):
        submit(store, 6, owner=owner, reserved=6)
    assert submit(store, 50).counts.total == 50, "others are not limited"
    submit(store, 5, owner=owner, reserved=5)
    with pytest.raises(InvalidRequest, match="split"):
        submit(store, 11, owner=owner, reserved=11)
    (claim,) = (claim for claim in take(store) if claim.batch_id == first.id)
    store.record(claim, answers(range(2)))
    submit(store, 2, owner=owner, reserved=2)
    with pytest.raises(QuotaExceeded):
        submit(store, 1, owner=owner, reserved=1)
    assert len(store.list_batches(owner=owner)) == 3, "what was refused left nothing behind"


def test_a_limit_holds_for_senders_who_do_not_say_how_many_will_come(store: Store) -> None:
    owner = store.keys.create("one", max_active_prompts=10).key.id
    submit(store, 10, owner=owner)
    with pytest.raises(QuotaExceeded):
        submit(store, 1, owner=owner)
    assert len(store.list_batches(owner=owner)) == 1
    assert store._database.read(lambda connection: connection.execute(select(batches.c.id)).all()).__len__() == 1


def test_a_limit_on_batches_holds_and_ends_with_the_batch(store: Store) -> None:
    owner = store.keys.create("one", max_active_batches=1).key.id
    first = submit(store, 2, owner=owner, idempotency_key="k")
    with pytest.raises(QuotaExceeded, match=r"max_active_batches: .* 1 active batches and has 1;"):
        submit(store, 2, owner=owner)
    assert submit(store, 2, owner=owner, idempotency_key="k").id == first.id, "only asked again, and not counted twice"
    work_off(store, take(store))
    check(store, first.id)
    submit(store, 2, owner=owner)


def test_a_key_may_ask_for_priorities_up_to_its_own(store: Store) -> None:
    owner = store.keys.create("one", max_priority=0).key.id
    assert [submit(store, 1, owner=owner, priority=priority).priority for priority in (0, -5)] == [0, -5]
    with pytest.raises(InvalidRequest, match="priority of at most 0, and this one asks for 1") as caught:
        submit(store, 1, owner=owner, priority=1)
    assert caught.value.param == "priority"
    assert len(store.list_batches(owner=owner)) == 2, "nothing of the refused one stays"
    assert submit(store, 1, owner=store.keys.create("free").key.id, priority=1000).priority == 1000
    both = store.keys.create("two", max_priority=3, max_active_batches=1).key.id
    submit(store, 1, owner=both, priority=3)
    with pytest.raises(QuotaExceeded):
        submit(store, 1, owner=both, priority=3)


def test_what_is_announced_counts_while_it_is_being_stored(store: Store) -> None:
    owner = store.keys.create("one", max_active_prompts=10).key.id

    def prompts() -> Iterator[str]:
        with pytest.raises(QuotaExceeded):
            submit(store, 5, owner=owner, reserved=5)
        yield from ("a",) * 6

    store.create_batch(prompts(), GenerationConfig(), model="m", owner=owner, reserved=6)


@pytest.mark.parametrize("reserved", [3, 0], ids=["announced", "not announced"])
def test_many_at_once_never_pass_a_limit(store: Store, reserved: int) -> None:
    owner = store.keys.create("one", max_active_prompts=10, max_active_batches=5).key.id

    def send(_: int) -> bool:
        try:
            submit(store, 3, owner=owner, reserved=reserved)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        taken = sum(pool.map(send, range(24)))
    assert taken == len(store.list_batches(owner=owner, limit=100))
    assert 1 <= taken <= 3
    if reserved:
        assert taken == 3


def test_many_at_once_never_pass_the_limit_on_batches(store: Store) -> None:
    owner = store.keys.create("one", max_active_batches=4).key.id

    def send(_: int) -> bool:
        try:
            submit(store, 1, owner=owner)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(send, range(24))) == 4


def test_the_bound_on_all_prompts_counts_what_is_announced(store: Store) -> None:
    def prompts() -> Iterator[str]:
        with pytest.raises(QueueFull):
            submit(store, 1, max_open_prompts=5)
        yield from ("a",) * 5

    store.create_batch(prompts(), GenerationConfig(), model="m", reserved=5, max_open_prompts=5)


def test_no_batch_comes_in_when_the_database_is_too_large_or_its_disk_too_full(store: Store) -> None:
    store.check_room(max_bytes=1e18, min_free_bytes=0)
    size = size_of(store._database)
    submit(store, 2000)
    assert size_of(store._database) > size > 0
    with pytest.raises(StorageFull, match="HEADRACE_MAX_DATABASE_BYTES"):
        store.check_room(max_bytes=size, min_free_bytes=0)
    if store._database.is_sqlite:
        with pytest.raises(StorageFull, match="HEADRACE_MIN_FREE_BYTES"):
            store.check_room(max_bytes=1e18, min_free_bytes=1e18)
