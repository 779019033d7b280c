"""How much longer a batch takes, against a clock: a few prompts at once, all at once, and what lies between."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from typing import NamedTuple

import pytest

from headrace.batch import Batch, BatchStatus, RequestCounts
from headrace.completion import TokenUsage
from headrace.config import GenerationConfig
from headrace.job import JobProgress
from headrace.schemas import BatchOut, read_batch

CHUNK, THREADS = 64, 8


class Run(NamedTuple):
    """A batch that was computed: when each prompt ended."""

    ends: list[float]

    @property
    def end(self) -> float:
        return max(self.ends)

    def after(self, count: int) -> Batch:
        """Return the batch as it is when `count` prompts are done, seen as the store counts them."""
        at = sorted(self.ends)[count - 1]
        done = [index for index, end in enumerate(self.ends) if end <= at]
        begun: Counter[int] = Counter()
        for index in done:
            begun[index // CHUNK] = max(begun[index // CHUNK], index % CHUNK + 1)
        return Batch(
            id="batch_1", model="m", gen_config=GenerationConfig(), status=BatchStatus.IN_PROGRESS,
            counts=RequestCounts(total=len(self.ends), completed=len(done)), usage=TokenUsage(), begun=begun.total(),
            created_at=0.0, started_at=1000.0, updated_at=1000.0 + at,
        )  # fmt: skip


def compute(total: int, *, at_once: int, seed: int = 0, low: float = 10.0, high: float = 30.0) -> Run:
    """Run prompts of `low` to `high` seconds on `at_once` places; the prompts of the worker's chunks come in mixed, each chunk's in order."""
    draw = random.Random(seed)
    chunks = [range(start, min(total, start + CHUNK)) for start in range(0, total, CHUNK)]
    mixed = (itertools.zip_longest(*chunks[first : first + THREADS]) for first in range(0, len(chunks), THREADS))
    places, ends = [0.0] * at_once, [0.0] * total
    for index in (one for rows in mixed for row in rows for one in row if one is not None):
        ends[index] = heapq.heappop(places) + draw.uniform(low, high)
        heapq.heappush(places, ends[index])
    return Run(ends)


def error(run: Run, count: int) -> float:
    """Return how many times as long as the truth the batch says it will take."""
    batch = run.after(count)
    assert batch.eta_s is not None
    assert batch.updated_at is not None
    return batch.eta_s / (run.end - (batch.updated_at - 1000.0))


@pytest.mark.parametrize("seed", range(5))
def test_where_all_run_at_once_it_is_right_from_the_first_few_on(seed: int) -> None:
    run = compute(100, at_once=128, seed=seed)
    for count in range(5, 91):
        assert 0.5 < error(run, count) < 2.5, count
    batch = run.after(5)
    assert batch.eta_s is not None
    assert batch.running > 50
    by_the_done_alone = (sorted(run.ends)[4]) * 95 / 5
    assert by_the_done_alone > 5 * batch.eta_s


@pytest.mark.parametrize(("total", "at_once"), [(100, 1), (100, 4), (2000, 8), (2000, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_where_few_run_at_once_it_is_the_rate_so_far(total: int, at_once: int, seed: int) -> None:
    run = compute(total, at_once=at_once, seed=seed)
    for count in (*range(10, 50, 5), *range(50, total * 9 // 10, 37)):
        assert 0.6 < error(run, count) < 2.5, count
    for count in range(max(2 * at_once, 20), total * 9 // 10, 37):
        assert 0.75 < error(run, count) < 1.35, count


def test_prompts_of_one_length_that_end_in_waves() -> None:
    """Between two waves nothing is seen of the next one, which has just begun: it isn't taken for half done."""
    run = compute(512, at_once=128, low=19.9, high=20.1)
    for wave in (1, 2, 3):
        assert error(run, 128 * wave) == pytest.approx(1, rel=0.05)


def test_numbers() -> None:
    one = Run([10.0, *[30.0] * 9]).after(1)
    assert (one.begun, one.running, one.eta_s) == (1, 0, 90.0), "nothing says that the others run"
    last = Run([*[30.0] * 9, 10.0]).after(1)
    assert (last.begun, last.running, last.eta_s) == (10, 9, pytest.approx(10 * 9 / 5.5))
    data = BatchOut.of(last).model_dump(mode="json")
    assert data["headrace"]["begun"] == 10
    assert read_batch(data).eta_s == last.eta_s, "a client's batch says the same"
    del data["headrace"]["begun"]
    assert read_batch(data).eta_s == 90.0, "a server of before"
    job = JobProgress(total=30, done=21, failed=0, resumed=20, running=9, usage=TokenUsage(), elapsed_s=10.0)
    assert job.eta_s == last.eta_s
    fresh = JobProgress(total=30, done=20, failed=0, resumed=20, running=9, usage=TokenUsage(), elapsed_s=10.0)
    assert fresh.eta_s is None
