"""Celery on Redis loses a message when a worker dies between taking it and noting that it has. Messages may be lost, rows may not."""

from __future__ import annotations

import base64
import json
import random

from fault_ground import Ground, Say, ground, texts
from sqlalchemy import select

from headrace.broker import KEY_PREFIX, queue_name
from headrace.store import ChunkState
from headrace.store.tables import chunks

TITLE = "messages that Celery loses when a worker is killed"
CHUNK = 4


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Kill the one worker again and again while it takes messages as fast as it can; count those that no one knows any more."""
    kills, rows = (100, 30_000) if long else (2, 800)
    draw = random.Random(seed)
    with ground(chunk_size=CHUNK, dispatch_window=400, requeue_grace_s=2.0) as field:
        batch_id = field.service.submit(texts(rows))
        lost: set[str] = set()
        for number in range(kills):
            worker = field.service.ready(field.worker(concurrency=8))
            most = min(rows - 200, (number + 1) * rows // (kills + 1))
            goal = min(most, field.service.done(batch_id) + draw.randrange(1, 2 * rows // (kills + 1)))
            while field.service.done(batch_id) < goal:
                assert worker.process is not None
                assert worker.process.poll() is None, worker.log_tail()
            worker.kill9()
            lost |= _unknown_to_redis(field)
            if number % 10 == 9:
                say(f"kill {number + 1}: {len(lost)} messages lost so far, {field.service.done(batch_id)} rows")
        field.worker(concurrency=8)
        field.wait_over(batch_id, timeout_s=300)
        counts = field.judge(batch_id, texts(rows))
        return {**counts, "kills": kills, "messages": rows // CHUNK, "messages_lost": len(lost), **field.again_pct(rows)}


def _unknown_to_redis(field: Ground) -> set[str]:
    """Return the chunks that SQL takes for sent and waiting, and of which Redis has no message. No worker lives now."""
    query = select(chunks.c.id).where(chunks.c.state == ChunkState.QUEUED, chunks.c.sent_at.is_not(None))
    waiting = set(field.service.store._database.read(lambda connection: connection.scalars(query).all()))
    with field.link() as link:
        bodies = link.lrange(KEY_PREFIX + queue_name(field.settings.model), 0, -1)
        bodies += [json.dumps(json.loads(entry)[0]).encode() for entry in link.hvals(KEY_PREFIX + "unacked")]
    return waiting - {json.loads(base64.b64decode(json.loads(body)["body"]))[1]["chunk"]["chunk_id"] for body in bodies}
