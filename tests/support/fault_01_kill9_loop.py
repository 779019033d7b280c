"""Workers are killed without a word, one every few seconds, while they answer a batch."""

from __future__ import annotations

import random
import time

from fault_ground import Ground, Say, ground, rest, texts
from worker_process import HeadraceProcess, wait_for

TITLE = "kill -9 of a worker, again and again"
PAUSE_S = 0.35
IN_FLIGHT = {"concurrency": 2, "chunk_size": 8}
"""What one kill costs is what is in flight: 16 prompts of each worker here."""


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Kill until enough have fallen, in the long form until the batch is over; so many workers are there at any time."""
    # One more than fall at a time: what is measured is how soon a worker takes over, not how soon another one starts.
    rows, kills, workers = (20_000, 30, 3) if long else (600, 2, 3)
    draw = random.Random(seed)
    prompts = texts(rows)
    with ground(chunk_size=IN_FLIGHT["chunk_size"], dispatch_window=24) as field:
        crew = Crew(field, draw, workers)
        batch_id = field.service.submit(prompts)
        for worker in crew.workers:
            field.service.ready(worker)
        fallen = 0
        while fallen < kills or (long and field.service.done(batch_id) < rows):
            crew.watch(draw.uniform(3, 7) if long else 1.0)
            if crew.kill_one():
                fallen += 1
                say(f"kill {fallen}, {field.service.done(batch_id)} rows")
            assert fallen >= kills or field.service.done(batch_id) < rows, f"all was done after {fallen} kills already"
        wait_for(crew.is_recovered, timeout_s=60, what="the last killed worker's chunks are taken over")
        field.wait_over(batch_id, timeout_s=120)
        counts = field.judge(batch_id, prompts)
        again = field.again_pct(rows)
        allowed_s = field.settings.visibility_timeout_s + 5
        assert crew.slowest_s <= allowed_s, f"a killed worker's chunk was taken over after {crew.slowest_s:.1f} s only"
        assert not long or again["started_again_pct"] <= 3, again
        return {**counts, "kills": fallen, **again, "slowest_recovery_s": round(crew.slowest_s, 1), "allowed_s": allowed_s}


class Crew:
    """Workers, one of which is killed now and then and replaced at once; measures how long its chunks lie."""

    def __init__(self, field: Ground, draw: random.Random, workers: int) -> None:
        self._field = field
        self._draw = draw
        self.workers: list[HeadraceProcess] = [self._hire() for _ in range(workers)]
        self._orphans: list[tuple[float, dict[str, int]]] = []
        self.slowest_s = 0.0

    def _hire(self) -> HeadraceProcess:
        return self._field.worker(pause_s=PAUSE_S, concurrency=IN_FLIGHT["concurrency"])

    def kill_one(self) -> bool:
        """Kill a worker that is at work; False when none is."""
        busy = [worker for worker in self.workers if self._field.chunks_of(worker)]
        if not busy:
            return False
        victim = self._draw.choice(busy)
        held = self._field.chunks_of(victim)
        victim.kill9()
        self._orphans.append((time.monotonic(), held))
        self.workers[self.workers.index(victim)] = self._hire()
        return True

    def watch(self, seconds: float) -> None:
        """Let time pass, and see when the chunks of the killed are taken over."""
        rest(seconds, self.is_recovered)

    def is_recovered(self) -> bool:
        """Whether every chunk of the killed has been claimed anew or is done."""
        left: list[tuple[float, dict[str, int]]] = []
        for killed_at, held in self._orphans:
            lying = self._field.still_held(held)
            self.slowest_s = max(self.slowest_s, time.monotonic() - killed_at)
            if lying:
                left.append((killed_at, {key: held[key] for key in lying}))
        self._orphans = left
        return not left
