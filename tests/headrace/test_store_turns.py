"""Fair sharing, on SQLite and PostgreSQL: who is served next, that nobody starves, and that no query reads what it need not."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, event, select, text, update
from store_driver import check, execute, send, submit, take, work_off

from headrace.batch import CHAT
from headrace.store import Store
from headrace.store.tables import api_keys, batches, chunks, lanes, now
from headrace.store.turns import GRACE_OF, forget_idle


def key_of_weight(store: Store, name: str, weight: int) -> str:
    """Store a key's row and return its id."""
    row = {"id": f"key_{name}", "name": name, "prefix": name, "hash": name, "weight": weight, "created_at": now()}
    execute(store, api_keys.insert().values(row))
    return f"key_{name}"


def give(store: Store, batch_id: str, owner: str) -> None:
    """Let the batch be `owner`'s."""
    execute(store, update(batches).where(batches.c.id == batch_id).values(owner=owner, lane=owner))


def served(store: Store, count: int, *, step: int = 8) -> list[str]:
    """Send `count` chunks as `dispatch` does and return their batches in the order of sending."""
    order: list[str] = []
    while len(order) < count:
        refs = store.next_chunks(model="m", limit=min(step, count - len(order)), grace_s=1e9)
        if not refs:
            break
        order += [ref.batch_id for ref in refs]
    return order


def test_two_batches_of_200_chunks_go_side_by_side(store: Store) -> None:
    one, two = submit(store, 200, chunk_size=1), submit(store, 200, chunk_size=1)
    order = served(store, 400)
    assert Counter(order) == {one.id: 200, two.id: 200}
    for place in range(1, 401):
        assert abs(order[:place].count(one.id) - order[:place].count(two.id)) <= 1, place
    assert served(store, 1) == []


def test_a_small_batch_sent_behind_a_large_one_is_done_early(store: Store) -> None:
    large = submit(store, 1000, chunk_size=1)
    assert set(served(store, 200)) == {large.id}
    small = submit(store, 10, chunk_size=1)
    order = served(store, 30)
    assert order.count(small.id) == 10
    assert [place for place, batch_id in enumerate(order) if batch_id == small.id][-1] <= 20


def test_a_new_batch_has_no_turns_saved_up(store: Store) -> None:
    """It shares from now on; it doesn't get first what the old one had in an hour."""
    old = submit(store, 600, chunk_size=1)
    served(store, 300)
    submit(store, 300, chunk_size=1)
    assert 48 <= served(store, 100).count(old.id) <= 52


def test_owners_share_by_weight_however_many_batches_they_send(store: Store) -> None:
    weights = {"one": 1, "two": 2, "five": 5}
    owners = {key_of_weight(store, name, weight): weight for name, weight in weights.items()}
    owner_of: dict[str, str] = {}
    for owner, count in zip(owners, (10, 1, 3), strict=True):
        for _ in range(count):
            batch = submit(store, 600 // count, chunk_size=1)
            give(store, batch.id, owner)
            owner_of[batch.id] = owner
    got = Counter(owner_of[batch_id] for batch_id in served(store, 400))
    for owner, weight in owners.items():
        assert got[owner] == pytest.approx(400 * weight / 8, rel=0.1), got
    of_the_first = Counter(batch_id for batch_id in served(store, 160) if owner_of[batch_id] == "key_one")
    assert max(of_the_first.values()) - min(of_the_first.values()) <= 1, "its ten batches share its part evenly"


def test_chunks_of_different_sizes_share_prompts_and_not_chunks(store: Store) -> None:
    fine, coarse = submit(store, 300, chunk_size=2), submit(store, 300, chunk_size=10)
    got = Counter(served(store, 60))
    assert got[fine.id] * 2 == pytest.approx(got[coarse.id] * 10, rel=0.1)


def test_an_owner_who_was_away_begins_where_the_others_are(store: Store) -> None:
    busy, back = key_of_weight(store, "busy", 1), key_of_weight(store, "back", 1)
    large = submit(store, 600, chunk_size=1)
    give(store, large.id, busy)
    first = submit(store, 4, chunk_size=1)
    give(store, first.id, back)
    served(store, 204)
    again = submit(store, 200, chunk_size=1)
    give(store, again.id, back)
    assert 48 <= served(store, 100).count(again.id) <= 52


def test_a_low_priority_is_slowed_down_and_not_stopped(store: Store) -> None:
    high = submit(store, 2000, chunk_size=4, priority=5)
    lows = [submit(store, 100, chunk_size=4, priority=priority) for priority in (0, -5)]
    order = served(store, 20 * GRACE_OF)
    got = Counter(order)
    assert set(order[: GRACE_OF - 1]) == {high.id}
    assert sum(got[low.id] for low in lows) == pytest.approx(20, abs=2), "one chunk of sixteen, together"
    assert abs(got[lows[0].id] - got[lows[1].id]) <= 1


def test_a_batch_that_is_cancelled_gives_its_turn_away(store: Store) -> None:
    gone, stays = submit(store, 50, chunk_size=1), submit(store, 50, chunk_size=1)
    served(store, 10)
    store.cancel_batch(gone.id)
    assert set(served(store, 20)) == {stays.id}
    work_off(store, [claim for claim in take(store) if claim.batch_id == stays.id])
    check(store, stays.id)


def test_what_is_sent_again_is_not_charged_again(store: Store) -> None:
    one, two = submit(store, 100, chunk_size=1), submit(store, 100, chunk_size=1)
    served(store, 20)
    execute(store, update(chunks).where(chunks.c.batch_id == one.id, chunks.c.sent_at.is_not(None)).values(sent_at=1.0))
    assert [ref.batch_id for ref in send(store, limit=10)] == [one.id] * 10, "what was lost goes first"
    assert abs(served(store, 40).count(two.id) - 20) <= 1


def test_several_senders_deal_out_each_chunk_once_and_fairly(store: Store) -> None:
    made = [submit(store, 120, chunk_size=1) for _ in range(3)]

    def sender(_: int) -> list[str]:
        found: list[str] = []
        while len(found) < 45 and (refs := store.next_chunks(model="m", limit=3, grace_s=1e9)):
            found += [ref.chunk_id for ref in refs]
        return found

    with ThreadPoolExecutor(4) as pool:
        sent = [chunk_id for ids in pool.map(sender, range(4)) for chunk_id in ids]
    assert len(sent) == len(set(sent)) == 180
    sizes = store._database.read(
        lambda connection: connection.execute(
            select(chunks.c.batch_id).where(chunks.c.sent_at.is_not(None))
        ).scalars().all()
    )  # fmt: skip
    assert all(abs(count - 60) <= 1 for count in Counter(sizes).values())
    assert set(sizes) == {batch.id for batch in made}


def test_lanes_are_forgotten_when_nobody_waits_in_them(store: Store) -> None:
    submit(store, 4, priority=3)
    claims = take(store)

    def count() -> int:
        return len(store._database.read(lambda connection: connection.execute(select(lanes)).all()))

    store.expire_batches()
    assert count() == 1
    work_off(store, claims)
    assert store._database.write(forget_idle) == 1
    assert count() == 0


def plans(store: Store, work: Any) -> dict[str, list[str]]:
    """Run `work` and return the plan of each statement in it, as if the tables were too large to be read whole."""
    statements: dict[str, Any] = {}
    engines = {store._database.writer, store._database.reader} if store._database.is_sqlite else {store._database.writer}

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, executemany: bool) -> None:
        statements.setdefault(statement, parameters[0] if executemany else parameters)

    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    work()
    for engine in engines:
        event.remove(engine, "before_cursor_execute", note)
    is_sqlite = store._database.is_sqlite

    def explain(connection: Connection) -> dict[str, list[str]]:
        if not is_sqlite:
            connection.execute(text("SET LOCAL enable_seqscan = off"))
        found = {}
        for statement, parameters in statements.items():
            if statement.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE") and "advisory" not in statement:
                prefix = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
                found[statement] = [str(row[-1]) for row in connection.exec_driver_sql(prefix + statement, parameters)]
        return found

    return store._database.write(explain)


def test_no_query_of_a_dispatch_reads_a_whole_table(store: Store) -> None:
    for priority in range(3):
        submit(store, 40, chunk_size=1, priority=priority)
    found = plans(store, lambda: store.next_chunks(model="m", limit=8, grace_s=60))
    assert len(found) >= 6
    scans = ("SCAN batches", "SCAN chunks", "SCAN other", "Seq Scan on batches", "Seq Scan on chunks")
    for statement, plan in found.items():
        assert not [line for line in plan if any(scan in line for scan in scans)], (statement, plan)
    lines = "\n".join(line for plan in found.values() for line in plan)
    for index in ("ix_batches_turn", "ix_chunks_unsent"):
        assert index in lines, lines
    # The search for what is unsent needs no filter beyond its index: a batch whose chunks are all sent costs one step.
    unsent = [plan for statement, plan in found.items() if "FROM chunks" in statement and "sent_at IS NULL" in statement]
    assert unsent
    assert all("TEMP B-TREE" not in line for plan in unsent for line in plan)


def test_no_query_of_a_sweep_reads_what_is_over(store: Store) -> None:
    """Every worker sweeps every few seconds; batches that are over stay for as long as their owner likes."""
    first = submit(store, 4, endpoint=CHAT)
    work_off(store, take(store))
    store.delete_batch(first.id)

    def sweep() -> None:
        store.expire_batches()
        store.delete_outlived(retention_s=60.0)
        store.files.sweep(retention_s=60.0)
        store.files.claim_counting()
        store.count_open_prompts()

    found = plans(store, sweep)
    assert len(found) >= 10
    narrow = ("ix_batches_open", "ix_batches_gone", "ix_batches_created_at_id", "ix_files_arriving", "ix_files_expires_at",
              "ix_files_counting", "ix_files_created_at_id")  # fmt: skip
    scans = ("SCAN batches", "SCAN files", "Seq Scan on batches", "Seq Scan on files")
    for statement, plan in found.items():
        lines = [line for line in plan if any(scan in line for scan in scans)]
        assert not [line for line in lines if not any(index in line for index in narrow)], (statement, plan)
