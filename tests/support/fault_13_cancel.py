"""Batches are cancelled and expire at random moments, through the real API, over a real worker: a random walk, and a clock."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

from echo_frontend import answer
from fault_ground import Ground, ground, substance
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from servers import free_port
from store_driver import check, outdate
from tiny_models import save_tiny_model
from tiny_service import ENGINE, answers
from worker_process import HeadraceProcess, wait_for

from engine.frontend import Frontend
from headrace.batch import Batch, BatchStatus
from headrace.client import Client
from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.errors import Conflict, NotFound

TITLE = "cancel and expire at random moments"
CANCEL_P99_S: Final = 2.0
PAUSE_S: Final = 0.5
"""Longer than a cancel may wait for the next write: it is the lease keeper that hears of it."""
CHUNK: Final = 4
MOST_STEPS: Final = 8


def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """Walk five hundred times, or six."""
    runs = 500 if long else 6
    # The lease is the one that users have: a cancel must not be quick by a test's settings.
    with (
        ground(database="postgres" if long else "sqlite", chunk_size=CHUNK, dispatch_window=64, lease_s=30.0) as field,
        _api(field) as client,
    ):
        worker = field.worker(pause_s=PAUSE_S, concurrency=8)
        field.service.ready(worker)
        walk = type(
            "Walk", (Walk,), {"field": field, "client": client, "cancel_s": [], "seen": Counter(), "say": staticmethod(say)}
        )
        _walk(walk, runs, seed)
        assert field.service.store.count_in_flight(model=field.settings.model) == 0, "a lease is left"
    times, seen = sorted(walk.cancel_s), walk.seen
    p99 = times[int(0.99 * len(times))]
    assert p99 < CANCEL_P99_S, f"cancel p99 {p99:.2f} s of {len(times)}"
    assert seen["kept"] or not long, "no cancel found an answer to keep: nothing was tested"
    steps = _steps_until_free(random.Random(seed))
    assert steps <= MOST_STEPS, f"{steps} steps from the abort of all prompts to an engine without one"
    return {
        "runs": runs, "rows": seen["rows"], "lost": 0, "doubled": 0, "completed": seen["completed"], "cancelled": seen["cancelled"],
        "expired": seen["expired"], "retried": seen["retried"], "deleted": seen["deleted"], "kept_rows": seen["kept"],
        "cancel_p50_ms": round(1e3 * times[len(times) // 2]), "cancel_p99_ms": round(1e3 * p99),
        "cancel_max_ms": round(1e3 * times[-1]), "engine_steps_until_free": steps,
    }  # fmt: skip


def _walk(walk: type[Walk], runs: int, number: int) -> None:
    asked = settings(
        max_examples=runs, stateful_step_count=8, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(walk), settings=asked)


@contextlib.contextmanager
def _api(field: Ground) -> Iterator[Client]:
    port = free_port()
    arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    url = f"http://127.0.0.1:{port}"
    with HeadraceProcess(arguments, field.settings, field.folder / "api.log") as api, Client(url) as client:
        wait_for(lambda: answers(url), timeout_s=60, what="the API answers", process=api)
        yield client


class Walk(RuleBasedStateMachine):
    """What is set on a subclass: the ground, a client of its API, and what all walks together saw."""

    field: ClassVar[Ground]
    client: ClassVar[Client]
    cancel_s: ClassVar[list[float]]
    seen: ClassVar[Counter[str]]
    say: ClassVar[Callable[[str], None]]
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self._prompts: dict[str, list[str]] = {}
        self._deleted: set[str] = set()

    @rule(
        target=batches, count=st.integers(1, 24), refused=st.sets(st.integers(0, 23), max_size=2), priority=st.integers(-1, 1)
    )
    def submit(self, count: int, refused: set[int], priority: int) -> str:
        prompts = ["" if index in refused else f"prompt {index}" for index in range(count)]
        batch_id = self.client.submit(prompts, priority=priority).id
        self._prompts[batch_id] = prompts
        return batch_id

    @rule(ms=st.integers(1, 300) | st.just(round(1.4e3 * PAUSE_S)))  # long enough for answers to be there, now and then
    def let_time_pass(self, ms: int) -> None:
        time.sleep(ms / 1000)

    @rule(batch_id=batches)
    def cancel(self, batch_id: str) -> None:
        if batch_id in self._deleted:
            return
        kept = self._answered(batch_id)
        started = time.monotonic()
        try:
            batch = self.client.cancel(batch_id)
        except Conflict:
            assert self.client.get(batch_id).status.is_terminal
            return
        while not batch.status.is_terminal:
            assert batch.status is BatchStatus.CANCELLING
            assert time.monotonic() - started < 20, f"{batch_id} is still being cancelled"
            time.sleep(0.01)
            batch = self.client.get(batch_id)
        if batch.status is BatchStatus.CANCELLED:
            self.cancel_s.append(time.monotonic() - started)
        assert kept <= self._answered(batch_id), "an answer that was there is gone"
        self.seen["kept"] += len(kept)

    @rule(batch_id=batches)
    def expire(self, batch_id: str) -> None:
        if batch_id not in self._deleted:
            outdate(self.field.service.store, batch_id)

    @rule(target=batches, batch_id=batches)
    def retry(self, batch_id: str) -> str:
        if batch_id in self._deleted:
            return batch_id
        was = self.client.get(batch_id)
        try:
            again = self.client.retry(batch_id)
        except Conflict:
            prompts = self._prompts[batch_id]
            assert not was.status.is_terminal or was.counts.failed <= prompts.count("")
            return batch_id
        self._prompts[again.id] = [
            self._prompts[batch_id][row.index] for row in self._rows(batch_id) if self._is_again(batch_id, row)
        ]
        assert again.counts.total == len(self._prompts[again.id])
        self.seen["retried"] += 1
        return again.id

    def _is_again(self, batch_id: str, row: Any) -> bool:
        return row.error is not None and bool(self._prompts[batch_id][row.index])

    @rule(batch_id=batches)
    def delete(self, batch_id: str) -> None:
        try:
            self.client.delete(batch_id)
        except Conflict:
            return
        except NotFound:
            assert batch_id in self._deleted
            return
        if batch_id not in self._deleted:
            self._deleted.add(batch_id)
            self.seen["deleted"] += 1

    def teardown(self) -> None:
        """Everything comes to an end, and every row is what its batch's end allows."""
        for batch_id in self._prompts.keys() - self._deleted:
            batch = self.field.service.wait_over(batch_id, timeout_s=30)
            self._judge(batch)
        if sum(self.seen.values()) % 50 == 0:
            self.say(f"{dict(self.seen)}")

    def _judge(self, batch: Batch) -> None:
        prompts = self._prompts[batch.id]
        rows = self.field.service.assert_exactly_once(batch.id, len(prompts))
        check(self.field.service.store, batch.id)
        ends = {BatchStatus.CANCELLED: "batch_cancelled", BatchStatus.EXPIRED: "batch_expired"}
        assert batch.status in {BatchStatus.COMPLETED, *ends}
        for prompt, row in zip(prompts, rows, strict=True):
            if not prompt:
                assert row.error is not None
                assert row.error.code == "invalid_request"
            elif row.error is not None:
                assert row.error.code == ends.get(batch.status), row
            else:
                assert substance(row) == substance(answer(prompt, index=row.index))
        self.seen[batch.status.value] += 1
        self.seen["rows"] += len(rows)

    def _rows(self, batch_id: str) -> list[Any]:
        return list(self.field.service.store.stream_results(batch_id))

    def _answered(self, batch_id: str) -> set[int]:
        return {row.index for row in self._rows(batch_id) if row.error is None}


def _steps_until_free(draw: random.Random) -> int:
    """Return how many steps the real engine needs from an abort of all that it has to being free: the least of five counts.

    The count is taken before the first of 32 aborts is sent and after the last. A step or two of a tiny model fit in between, and
    dozens where the machine holds the sender up between two aborts: what is not aborted yet runs on, as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = PytorchEngineConfig(**ENGINE)
        frontend = Frontend(str(save_tiny_model(Path(folder) / "tiny")), backend_config=config)
        try:
            return min(_abort_all(frontend, draw) for _ in range(5))
        finally:
            frontend.close()


def _abort_all(frontend: Frontend, draw: random.Random) -> int:
    done: list[Any] = []
    wish = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    handles = [frontend.submit("the mill wheel", wish, done.append, index=index) for index in range(32)]
    time.sleep(0.1 + 0.2 * draw.random())
    before = frontend.stats()
    assert before["running"] > 0, before
    for handle in handles:
        frontend.abort(handle)
    after = frontend.stats()
    assert len(done) == 32
    assert after["running"] + after["waiting"] == 0, after
    return int(after["steps"] - before["steps"])
