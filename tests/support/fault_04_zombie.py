"""Workers that freeze for two leases and wake up as zombies, with the answers in hand to chunks that are others' by now."""

from __future__ import annotations

import os
import random
import signal

from fault_ground import Say, ground, rest, texts
from worker_process import wait_for

TITLE = "a worker frozen for two leases"
PAUSE_S = 1.5


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Freeze one worker after the other and wake each after two leases; every late write must be refused.

    On PostgreSQL: a process frozen inside its SQLite transaction keeps every other writer out, by SQLite's design.
    """
    zombies, rows = (20, 12_000) if long else (1, 400)
    draw = random.Random(seed)
    size = {"lease_s": 3.0, "visibility_timeout_s": 4.0} if long else {"lease_s": 1.5, "visibility_timeout_s": 2.0}
    # Few wait in Redis, so that what a zombie held is taken over before it wakes up.
    with ground(dispatch_window=14 if long else 10, **size) as field:
        workers = [field.worker(pause_s=PAUSE_S) for _ in range(3 if long else 2)]
        for worker in workers:
            field.service.ready(worker)
        batch_id = field.service.submit(texts(rows))
        fenced, lease_s = 0, field.settings.lease_s
        for number in range(zombies):
            victim = draw.choice(workers)
            wait_for(lambda worker=victim: len(field.chunks_of(worker)) == 4, timeout_s=30, what="at work", process=victim)
            os.kill(victim.pid, signal.SIGSTOP)
            # Looked at once it is frozen and what it had sent is through: what it finished itself is nobody's to take over.
            rest(0.5, lambda: None)
            held = field.chunks_of(victim)
            rest(2 * lease_s - 0.5, lambda: None)
            taken = set(held) - field.still_held(held)
            os.kill(victim.pid, signal.SIGCONT)
            before, fenced = fenced, fenced + len(taken)
            wait_for(
                lambda wanted=fenced: sum(worker.log_tail(10**7).count("verdict='fenced'") for worker in workers) >= wanted,
                timeout_s=20, what=f"{len(taken)} chunks of the zombie are fenced", process=victim,
            )  # fmt: skip
            say(
                f"zombie {number + 1}: {fenced - before} of {len(held)} chunks were taken over, {field.service.done(batch_id)} rows"
            )
            assert field.service.done(batch_id) < rows, "the batch was over before the last zombie woke up"
        assert fenced >= zombies, "hardly a chunk was taken over: nothing was tested"
        field.wait_over(batch_id, timeout_s=240)
        counts = field.judge(batch_id, texts(rows))
        assert all(worker.process is not None and worker.process.poll() is None for worker in workers), "a zombie ended"
        return {**counts, "zombies": zombies, "chunks_fenced": fenced, **field.again_pct(rows)}
