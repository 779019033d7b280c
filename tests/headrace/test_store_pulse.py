"""The figures an operator is alarmed by, on SQLite and PostgreSQL: that they add up, and that a stall shows and nothing else does."""

from __future__ import annotations

from sqlalchemy import update
from store_driver import execute, lapse, send, submit, take, work_off

from headrace.store import Store
from headrace.store.pulse import STALL_S
from headrace.store.tables import chunks, now


def wait(store: Store, seconds: float) -> None:
    """Let everything that was sent have been sent so long ago."""
    execute(store, update(chunks).where(chunks.c.sent_at.is_not(None)).values(sent_at=now() - seconds))


def test_every_open_chunk_is_counted_once(store: Store) -> None:
    assert store.pulses.read() == {}
    batch = submit(store, 50, chunk_size=10)
    submit(store, 7, model="other", chunk_size=10, completion_window="1h")
    pulse = store.pulses.read()["m"]
    assert (pulse.batches, pulse.open_prompts) == ({"in_progress": 1}, 50)
    assert (pulse.unsent, pulse.sent, pulse.held, pulse.lapsed) == (5, 0, 0, 0)
    assert 86_300 < pulse.deadline_s <= 86_400
    assert 3_500 < store.pulses.read()["other"].deadline_s <= 3_600
    done, held, lapsed = take(store, limit=3)
    send(store, limit=1)
    work_off(store, [done])
    lapse(store, lapsed.chunk_id)
    pulse = store.pulses.read()["m"]
    assert (pulse.open_prompts, pulse.unsent, pulse.sent, pulse.held, pulse.lapsed) == (40, 1, 1, 1, 1)
    store.cancel_batch(batch.id)
    assert store.pulses.read()["m"].batches == {"cancelling": 1}
    store.finish_chunk(held)
    store.expire_batches()
    assert set(store.pulses.read()) == {"other"}, "what is over doesn't show"


def test_a_stall_is_chunks_that_wait_and_nobody_who_has_any(store: Store) -> None:
    submit(store, 30, chunk_size=10)
    assert not store.pulses.read()["m"].is_stalled, "nothing was sent: Redis may be away"
    send(store, limit=2)
    assert not store.pulses.read()["m"].is_stalled
    wait(store, STALL_S + 10)
    pulse = store.pulses.read()["m"]
    assert pulse.is_stalled
    assert STALL_S + 9 < pulse.oldest_sent_s < STALL_S + 60
    [claim] = take(store, limit=1)
    assert not store.pulses.read()["m"].is_stalled, "a worker has one: the others wait for it"
    lapse(store, claim.chunk_id)
    assert store.pulses.read()["m"].is_stalled
