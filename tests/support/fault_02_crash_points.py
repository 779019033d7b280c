"""Workers that die exactly where a row could be lost or doubled: at each point of `headrace.crash`, again and again."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Sequence

from fault_ground import Ground, Say, ground, texts
from worker_process import HeadraceProcess, wait_for

from headrace.crash import CRASH_POINTS

TITLE = "kill -9 at named points"
ROWS = 48
SHORT = ("before_flush", "after_flush_before_ack", "mid_finalize")


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Let 20 workers in a row die at each point, with a new batch before each; then a sound worker ends all the batches."""
    draw = random.Random(seed)
    if not long:
        return die([[f"{point}:1" for point in SHORT]], say)
    total: Counter[str] = Counter()
    for point in CRASH_POINTS:
        passages = [1 if point == "mid_finalize" else draw.randrange(1, 4) for _ in range(20)]
        total.update(die([[f"{point}:{passage}"] for passage in passages], say))
    return dict(total)


def die(rounds: Sequence[Sequence[str]], say: Say) -> dict[str, int | float]:
    """Let the workers of each round die at their points, side by side; return the counts once all is healed."""
    deaths = Counter(armed.partition(":")[0] for points in rounds for armed in points)
    with ground(dispatch_window=24) as field:
        batch_ids: list[str] = []
        for points in rounds:
            batch_ids += [field.service.submit(texts(ROWS), send=False) for _ in points]
            for worker in [field.worker(pause_s=0.05, crash_at=armed) for armed in points]:
                batch_ids += _feed_until_it_dies(field, worker)
        say(f"{dict(deaths)}: {sum(field.service.done(batch_id) for batch_id in batch_ids)} rows")
        field.worker(pause_s=0.05)
        field.wait_over(*batch_ids, timeout_s=90)
        counts = sum((Counter(field.judge(batch_id, texts(ROWS))) for batch_id in batch_ids), Counter())
    names = {"lost": 0, "doubled": 0, "failed": 0}
    return {**names, **counts, "deaths": deaths.total(), **{f"at_{point}": count for point, count in deaths.items()}}


def _feed_until_it_dies(field: Ground, worker: HeadraceProcess) -> list[str]:
    """Wait for a worker's death at its point; return the batches that it needed for that beside the one that is there.

    One transaction takes the rows of as many chunks as are ready: a batch may be over before the third passage of a point.
    """
    more: list[str] = []

    def has_died() -> bool:
        if worker.process.poll() is not None:  # type: ignore[union-attr]  # it was started
            return True
        if not field.service.store.count_open_prompts():
            more.append(field.service.submit(texts(ROWS), send=False))
        return False

    wait_for(has_died, timeout_s=60, what="the worker dies at its point", every_s=0.2)
    assert worker.wait(1) == -signal.SIGKILL, worker.log_tail()
    return more
