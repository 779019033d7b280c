"""Workers that die exactly where a row could be lost or doubled: at each point of `headrace.crash`, again and again."""

from __future__ import annotations

import random
import signal

from fault_ground import Say, ground, texts

from headrace.crash import CRASH_POINTS

TITLE = "kill -9 at named points"
ROWS = 48
SHORT = ("before_flush", "after_flush_before_ack", "mid_finalize")


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Let 20 workers in a row die at each point, with a new batch before each; then a sound worker ends them all."""
    counts: dict[str, int | float] = {"rows": 0, "lost": 0, "doubled": 0, "failed": 0, "deaths": 0}
    draw = random.Random(seed)
    for point in CRASH_POINTS if long else SHORT:
        for name, value in die_at(point, 20 if long else 1, draw, say).items():
            counts[name] = counts.get(name, 0) + value
    return counts


def die_at(point: str, times: int, draw: random.Random, say: Say) -> dict[str, int]:
    """Let so many workers die at one point, at a passage of their own each; return the counts once all is healed."""
    with ground(dispatch_window=24) as field:
        batch_ids: list[str] = []
        for _ in range(times):
            batch_ids.append(field.service.submit(texts(ROWS), send=False))
            passage = draw.randrange(1, 4) if point != "mid_finalize" else 1
            worker = field.worker(pause_s=0.05, crash_at=f"{point}:{passage}")
            assert worker.wait(60) == -signal.SIGKILL, worker.log_tail()
        say(f"{point}: {times} deaths, {sum(field.service.done(batch_id) for batch_id in batch_ids)} rows")
        field.worker(pause_s=0.05)
        field.wait_over(*batch_ids, timeout_s=90)
        verdicts = [field.judge(batch_id, texts(ROWS)) for batch_id in batch_ids]
    return {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]} | {"deaths": times, f"at_{point}": times}
