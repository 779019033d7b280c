"""Several reconcilers at once: every worker runs one. They are killed and frozen, Redis is flushed, and nobody floods it."""

from __future__ import annotations

import random
import time
from collections import Counter

import psutil
from fault_ground import Ground, Say, ground, rest, texts
from fault_senders import LoggedBroker, environ_of, sendings
from worker_process import HeadraceProcess

from headrace.broker import TASK_RECONCILE, queue_name

TITLE = "several reconcilers, killed and frozen: no chunk is missed, and Redis is not flooded"
MOST_POINTERS = 3.0
"""Messages for each chunk, over the whole run."""
RECONCILERS = 3


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Harm reconcilers until the batch is over, then count what they have sent."""
    rows = 20_000 if long else 480
    draw = random.Random(seed)
    prompts = texts(rows)
    with ground(chunk_size=16, dispatch_window=24) as field:
        log = field.folder / "sent"
        field.service.broker = LoggedBroker(field, log)
        environ = dict(environ_of(log))
        crew = [field.service.ready(field.worker(pause_s=0.5, environ=environ)) for _ in range(RECONCILERS)]
        batch_id = field.service.submit(prompts)
        harm: Counter[str] = Counter()
        while field.service.done(batch_id) < rows and (long or sum(harm.values()) < 4):
            kind = ("kill", "freeze", "flush", "twice")[sum(harm.values()) % 4]
            _harm(field, kind, crew, draw, environ)
            harm[kind] += 1
            say(f"{kind}, {field.service.done(batch_id)} rows")
            rest(draw.uniform(2, 5) if long else 0.5, lambda: field.service.done(batch_id) == rows)
        field.wait_over(batch_id, timeout_s=300)
        counts = field.judge(batch_id, prompts)
        chunks, pointers = -(-rows // 16), len(sendings(log))
        assert pointers <= MOST_POINTERS * chunks, f"{pointers} messages were sent for {chunks} chunks"
        # Three sweeps of an idle service send nothing.
        time.sleep(3 * field.settings.reconcile_interval_s)
        assert len(sendings(log)) == pointers
        return {
            **counts, "reconcilers": RECONCILERS, **{f"harm_{kind}": count for kind, count in harm.items()}, "chunks": chunks,
            "messages": pointers, "messages_for_a_chunk": round(pointers / chunks, 2), "allowed": MOST_POINTERS,
            **field.again_pct(rows),
        }  # fmt: skip


def _harm(field: Ground, kind: str, crew: list[HeadraceProcess], draw: random.Random, environ: dict[str, str]) -> None:
    place = draw.randrange(len(crew))
    if kind == "kill":
        crew[place].kill9()
        crew[place] = field.worker(pause_s=0.5, environ=environ)
    elif kind == "freeze":
        process = psutil.Process(crew[place].pid)
        process.suspend()
        rest(1.5 * field.settings.lease_s, lambda: False)
        process.resume()
    elif kind == "flush":
        field.redis.flush()
    else:
        # At an operator's word, and at the same moment in every worker.
        for _ in range(2 * RECONCILERS):
            field.service.broker.app.send_task(TASK_RECONCILE, queue=queue_name(field.settings.model), ignore_result=True)
