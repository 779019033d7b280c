"""Shares as their owners see them: a real worker, a real Redis with a small window, and batches that want it all at the same time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from service import Service
from worker_process import wait_for

from headrace.broker import dispatch
from headrace.config import GenerationConfig

CHUNKS = 200


def store_batch(service: Service, count: int = CHUNKS, **options: object) -> str:
    prompts = [f"prompt {index}" for index in range(count)]
    return service.store.create_batch(prompts, GenerationConfig(), model="echo", chunk_size=1, **options).id


def recorded_at(service: Service, *batch_ids: str) -> list[str]:
    """Return the batches in the order in which their answers were written."""
    from sqlalchemy import select

    from headrace.store.tables import completions

    query = select(completions.c.batch_id).where(completions.c.batch_id.in_(batch_ids)).order_by(completions.c.recorded_at)
    return list(service.store._database.read(lambda connection: connection.execute(query).scalars().all()))


@pytest.fixture
def service(echo_service, sqlite_url: str) -> Service:
    return echo_service(sqlite_url, dispatch_window=8, flush_interval_s=0.02, flush_rows=1)


def test_batches_and_owners_have_their_shares(service: Service) -> None:
    one, three = (service.store.keys.create(f"weight {weight}", weight=weight).key.id for weight in (1, 3))
    with service.worker(concurrency=4, environ={"ECHO_PAUSE_S": "0.02"}) as worker:
        service.ready(worker)
        twins = [store_batch(service), store_batch(service)]
        dispatch(service.store, service.broker, service.settings, "echo")
        wait_for(lambda: service.done(twins[0]) >= 40, timeout_s=60, what="the twins are on their way", process=worker)
        small = store_batch(service, 10)
        service.wait_over(small, worker)
        assert max(service.done(twin) for twin in twins) < 0.75 * CHUNKS, "ten prompts don't wait for four hundred"
        for batch_id in twins:
            service.wait_over(batch_id, worker, timeout_s=120)
            service.assert_exactly_once(batch_id, CHUNKS)
        order = recorded_at(service, *twins)
        for place in range(20, 2 * CHUNKS, 20):
            assert abs(order[:place].count(twins[0]) - place / 2) <= 8 + place * 0.02, "side by side, within the window"

        light, heavy = store_batch(service, owner=one), store_batch(service, owner=three)
        dispatch(service.store, service.broker, service.settings, "echo")
        service.wait_over(heavy, worker, timeout_s=120)
        service.wait_over(light, worker, timeout_s=120)
        order = recorded_at(service, light, heavy)
        both = order[: len(order) - order[::-1].index(heavy)]
        assert both.count(light) / both.count(heavy) == pytest.approx(1 / 3, rel=0.1)


def test_a_worker_leaves_to_others_what_its_engine_could_only_let_wait(echo_service, sqlite_url: str, tmp_path: Path) -> None:
    service = echo_service(sqlite_url, dispatch_window=200, chunk_size=1)
    tally = tmp_path / "tally"
    full = {"ECHO_MAX_RUNNING": "8", "ECHO_PAUSE_S": "10", "ECHO_TALLY": str(tally)}
    with service.worker(concurrency=32, environ=full) as worker:
        service.ready(worker)
        batch_id = store_batch(service, 60)
        dispatch(service.store, service.broker, service.settings, "echo")
        wait_for(
            lambda: tally.exists() and tally.read_bytes().count(b"s") >= 10, timeout_s=30, what="it has work", process=worker
        )
        time.sleep(1)
        assert tally.read_bytes() == b"s" * 10, "eight run, and two wait for the first slot"
        assert service.broker.count_waiting("echo") == 50
        with service.worker(concurrency=32) as other:
            service.wait_over(batch_id, other)
        service.assert_exactly_once(batch_id, 60)
    assert tally.read_bytes().count(b"s") == 10, "the other worker did the rest"
