"""Every message comes ten times, out of order, some while their chunk is at work and some long after it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from fault_ground import Ground, Say, ground, texts
from worker_process import wait_for

from headrace.store import ChunkRef

TITLE = "ten copies of every message, reordered and late"
COPIES_AT_ONCE = 7


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Publish by hand: seven copies at once, two while the workers are at it, the tenth (ten minutes) after the batch is over."""
    chunks, late_s = (1_000, 600.0) if long else (40, 0.0)
    draw, rows, started = random.Random(seed), chunks * 16, time.monotonic()
    with ground(dispatch_window=20_000, requeue_grace_s=3600.0) as field:
        batch_id = field.service.submit(texts(rows), send=False)
        refs = field.service.store.next_chunks(model="echo", limit=chunks, grace_s=3600)
        assert len(refs) == chunks
        sent = _publish(field, draw, list(refs) * COPIES_AT_ONCE)
        for worker in [field.worker(pause_s=0.3, concurrency=8) for _ in range(2)]:
            field.service.ready(worker)
        for part in (4, 2):
            wait_for(lambda rows=rows // part: field.service.done(batch_id) >= rows, timeout_s=120, what="under way")
            sent += _publish(field, draw, refs)
        field.wait_over(batch_id, timeout_s=300)
        early = field.computed()
        say(f"over after {time.monotonic() - started:.0f} s; the last copies come after {late_s:.0f} s")
        time.sleep(max(0.0, late_s - (time.monotonic() - started)))
        sent += _publish(field, draw, refs)
        wait_for(lambda: field.left_in_redis() == 0, timeout_s=120, what="the last copies are taken")
        assert field.computed() == early, "a copy that came after the end was computed"
        again = field.again_pct(rows)
        assert again["started_again_pct"] <= 1, again
        return {**field.judge(batch_id, texts(rows)), "chunks": chunks, "messages": sent, **again}


def _publish(field: Ground, draw: random.Random, refs: Sequence[ChunkRef]) -> int:
    """Send these messages in an order of chance."""
    known = {ref.chunk_id: field.service.store.chunk_message(ref) for ref in set(refs)}
    for ref in draw.sample(refs, len(refs)):
        field.service.broker.enqueue(known[ref.chunk_id])
    return len(refs)
