"""Workers whose clocks are ten minutes ahead and ten minutes behind: every time that decides something is the database's."""

from __future__ import annotations

import re
import time

from fault_ground import Ground, Say, ground, texts
from fault_senders import SITE
from sqlalchemy import func, select
from worker_process import ROOT, SUPPORT, HeadraceProcess, wait_for

from headrace.batch import BatchStatus
from headrace.config import GenerationConfig
from headrace.store.tables import chunks

TITLE = "workers' clocks ten minutes ahead and ten minutes behind"
SKEW_S = 600


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Answer a batch whose window is shorter than the skew, and let another one expire meanwhile."""
    rows = 20_000 if long else 400
    prompts = texts(rows)
    window_s = 20 if long else 3
    # Nobody else is at fault here, so a chunk is claimed once; leases are long enough for a machine that others use, too.
    with ground(chunk_size=16, lease_s=10.0, visibility_timeout_s=12.0) as field:
        skews = (SKEW_S, -SKEW_S, 0)
        crew = [_worker(field, skew_s) for skew_s in skews]
        for worker, skew_s in zip(crew, skews, strict=True):
            field.service.ready(worker)
            _prove(worker, skew_s)
        batch_id = field.service.submit(prompts, completion_window="9m")
        lonely = field.service.store.create_batch(["a"], GenerationConfig(), model="nobody", completion_window=f"{window_s}s")
        field.wait_over(batch_id, timeout_s=480)
        counts = field.judge(batch_id, prompts)
        late_s = _expiry(field, lonely.id, window_s) - window_s
        say(f"{rows} rows answered; the batch that had to expire did so {late_s:.1f} s after its time")
        assert 0 <= late_s <= 2 * field.settings.reconcile_interval_s + 2, f"a batch expired {late_s:.1f} s after its time"
        claims = select(func.max(chunks.c.epoch), func.sum(chunks.c.epoch - 1)).where(chunks.c.batch_id == batch_id)
        most, more = field.service.store._database.read(lambda connection: connection.execute(claims).one())
        logs = [worker.log_tail(10**8) for worker in crew]
        fenced = sum(log.count("verdict='fenced'") for log in logs)
        assert (most, more, fenced) == (1, 0, 0), "a lease ended early: its chunk was claimed again"
        ages = [info.age_s for info in field.service.store.list_workers()]
        assert all(0 <= age < 60 for age in ages), f"a worker's heartbeat is of another time: {ages}"
        return {
            **counts, "skew_s": SKEW_S, "workers": len(crew), "claimed_again": int(more), "fenced": fenced, "expired_early": 0,
            "expired_late_s": round(late_s, 2), "deliveries_refused": sum(log.count("[chunk_skipped]") for log in logs),
            **field.again_pct(rows),
        }  # fmt: skip


def _worker(field: Ground, skew_s: int) -> HeadraceProcess:
    environ = {"PYTHONPATH": f"{SITE}:{SUPPORT}:{ROOT}", "FAULT_SKEW_S": str(skew_s)}
    return field.worker(pause_s=0.5, environ=environ)


def _prove(worker: HeadraceProcess, skew_s: int) -> None:
    """Raise AssertionError unless the worker lives in another time: its log says when it thinks it is."""
    found = wait_for(
        lambda: re.findall(r"^(\d\d:\d\d:\d\d) .*worker_started", worker.log_tail(10**6), re.MULTILINE),
        timeout_s=10,
        what="the worker says that it is up",
    )
    stamp = found[-1]
    ahead_s = _seconds(stamp) - _seconds(time.strftime("%H:%M:%S"))
    ahead_s = (ahead_s + 43200) % 86400 - 43200
    assert abs(ahead_s - skew_s) < 90, f"the clock of this worker is {ahead_s} s ahead, not {skew_s}"


def _seconds(stamp: str) -> int:
    hours, minutes, seconds = map(int, stamp.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def _expiry(field: Ground, batch_id: str, window_s: float) -> float:
    """Wait for the batch's end and return how long it lived, by the database's clock."""
    batch = wait_for(
        lambda: (found := field.service.store.get_batch(batch_id)).status.is_terminal and found,
        timeout_s=window_s + 20,
        what="the batch that nobody works on expires",
    )
    assert batch.status is BatchStatus.EXPIRED
    return float(batch.expired_at - batch.created_at)
