"""A batch's life as a random walk, on SQLite and PostgreSQL: whatever senders, workers, users and clocks do in whatever order,
states follow the arrows, rows partition the prompts, the first answer stays, and the counters equal a recount.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule, run_state_machine_as_test
from store_driver import answer, check, lapse, outdate, submit

from headrace.batch import ARROWS, BatchStatus
from headrace.errors import Conflict
from headrace.store import Claim, RecordStatus, Store


def reachable(start: BatchStatus) -> set[BatchStatus]:
    """States that a batch seen in `start` may be seen in later."""
    found, todo = {start}, [start]
    while todo:
        fresh = ARROWS[todo.pop()] - found
        found |= fresh
        todo.extend(fresh)
    return found


class Life(RuleBasedStateMachine):
    """`store` is set on a subclass; every walk uses a model name of its own, so that it sees its own chunks only."""

    store: Store
    refs = Bundle("refs")
    claims = Bundle("claims")

    @initialize()
    def begin(self) -> None:
        self.model = f"m-{uuid.uuid4().hex}"
        self.statuses: dict[str, BatchStatus] = {}
        self.texts: dict[tuple[str, int], str] = {}
        self.epochs: dict[str, int] = {}
        self.serial = 0

    @rule(count=st.integers(1, 7), size=st.integers(1, 4), refused=st.sets(st.integers(0, 6)), priority=st.integers(-1, 1))
    def submit(self, count: int, size: int, refused: set[int], priority: int) -> None:
        batch = submit(
            self.store, count, model=self.model, chunk_size=size, refused=refused & set(range(count)), priority=priority
        )
        self.statuses[batch.id] = batch.status

    @rule(target=refs, limit=st.integers(1, 4), grace_s=st.sampled_from([0.0, 60.0]))
    def send(self, limit: int, grace_s: float) -> Any:
        return multiple(*self.store.next_chunks(model=self.model, limit=limit, grace_s=grace_s))

    @rule(target=claims, ref=refs)
    def claim(self, ref: Any) -> Any:
        claim = self.store.claim_chunk(ref.chunk_id, worker=f"w{self.serial}", lease_s=60)
        if claim is None:
            return multiple()
        assert claim.epoch > self.epochs.get(claim.chunk_id, 0)
        self.epochs[claim.chunk_id] = claim.epoch
        return claim

    @rule(entries=st.lists(st.tuples(claims, st.sets(st.integers(0, 3)), st.booleans()), min_size=1, max_size=3))
    def record(self, entries: list[tuple[Claim, set[int], bool]]) -> None:
        batches = {claim.batch_id for claim, _, _ in entries}
        before = {batch_id: {item.index for item in self.store.results(batch_id)} for batch_id in batches}
        rows = []
        for claim, offsets, fails in entries:
            self.serial += 1
            indexes = [claim.start + offset for offset in offsets if claim.start + offset < claim.stop]
            error = "engine_error" if fails else None
            rows.append((claim, [answer(index, f"text {self.serial}", error=error) for index in indexes]))
        for (claim, given), result in zip(rows, self.store.record_many(rows), strict=True):
            if claim.epoch < self.epochs[claim.chunk_id]:
                assert result.status is not RecordStatus.OK
                assert result.inserted == 0
            if result.status is RecordStatus.OK:
                now_there = {item.index for item in self.store.results(claim.batch_id)}
                assert {item.index for item in given} <= now_there
            if result.inserted == 0:
                continue
            for item in given:
                if item.index not in before[claim.batch_id] and item.choices:
                    self.texts.setdefault((claim.batch_id, item.index), item.choices[0].text)

    @rule(claim=claims)
    def finish(self, claim: Claim) -> None:
        pending = self.store.pending(claim)
        if self.store.finish_chunk(claim):
            assert pending == []

    @rule(claim=claims)
    def work_off(self, claim: Claim) -> None:
        self.serial += 1
        rows = [answer(item.index, f"text {self.serial}") for item in self.store.pending(claim)]
        if self.store.record(claim, rows).status is RecordStatus.OK:
            assert self.store.finish_chunk(claim)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        self.store.release_chunk(claim)

    @rule(held=st.lists(claims, max_size=3))
    def renew(self, held: list[Claim]) -> None:
        kept = self.store.renew(held, 60)
        assert kept <= set(held)
        assert all(claim.epoch == self.epochs[claim.chunk_id] for claim in kept)

    @rule(claim=claims)
    def lapse(self, claim: Claim) -> None:
        lapse(self.store, claim.chunk_id)

    @rule()
    def reconcile(self) -> None:
        self.store.requeue_lost(grace_s=60, model=self.model)
        self.store.expire_batches()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.statuses:
            return
        batch_id = data.draw(st.sampled_from(sorted(self.statuses)))
        was = self.store.get_batch(batch_id).status
        try:
            self.store.cancel_batch(batch_id)
            assert not was.is_terminal
        except Conflict:
            assert was.is_terminal

    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        if self.statuses:
            outdate(self.store, data.draw(st.sampled_from(sorted(self.statuses))))
            self.store.expire_batches()

    @invariant()
    def adds_up(self) -> None:
        for batch_id, was in getattr(self, "statuses", {}).items():
            batch = check(self.store, batch_id)
            assert batch.status in reachable(was), f"{was} → {batch.status}"
            self.statuses[batch_id] = batch.status

    def teardown(self) -> None:
        """Healthy workers take over: everything ends."""
        if not hasattr(self, "model"):
            return
        lapse(self.store, *self.epochs)
        self.store.expire_batches()
        while refs := self.store.next_chunks(model=self.model, limit=100, grace_s=0):
            for ref in refs:
                claim = self.store.claim_chunk(ref.chunk_id, worker="last", lease_s=60)
                assert claim is not None
                self.store.record(claim, [answer(item.index, "last") for item in self.store.pending(claim)])
                assert self.store.finish_chunk(claim)
        for batch_id in self.statuses:
            assert check(self.store, batch_id).status.is_terminal
            kept = {(batch_id, item.index): item.choices[0].text for item in self.store.results(batch_id) if item.choices}
            for key, text in self.texts.items():
                if key[0] == batch_id:
                    assert kept[key].startswith(text), "the first answer stays"
        assert self.store.count_in_flight(model=self.model) == 0


@pytest.fixture
def life(store: Store) -> type[Life]:
    return type("LifeHere", (Life,), {"store": store})


def test_a_random_life(life: type[Life]) -> None:
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        ),
    )
