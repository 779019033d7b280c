"""The tasks: `headrace.generate` answers one chunk, `headrace.reconcile` runs the reconciler at an operator's word.

A message may come twice, late, or never: `claim_chunk` decides whether there is work in it, and SQL alone remembers what is done.
This module knows no SQL and no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from celery import Celery
from celery.exceptions import Reject

from headrace.broker import TASK_GENERATE, TASK_RECONCILE, describe
from headrace.config import Prompt
from headrace.crash import crash_point
from headrace.store import ChunkMessage, Claim
from worker.outage import HEALS
from worker.reading import read_chunk
from worker.recorder import Ledger, Verdict
from worker.runtime import Runtime

log = logging.getLogger(__name__)

_UNREADABLE: Final = "unreadable: left to a worker of another release, or given up"
PROGRESS_S: Final = 2.0
WRITE_PATIENCE_S: Final = 10.0
Report = Callable[[str], None]
"""Takes a line such as '32/64 rows · 2 failed · 2400 tok · 310 tok/s'."""

_ENDINGS: Final[Mapping[Verdict, str]] = {
    Verdict.RECORDED: "",
    Verdict.FENCED: "the chunk is another worker's now, or its batch is over",
    Verdict.CANCELLED: "the batch is over",
    Verdict.ENGINE_LOST: "handed back: the engine was lost",
    Verdict.DRAINED: "handed back: this worker is going down",
    Verdict.OUT_OF_ROOM: "handed back: the store was away and the spool full",
}


def register(app: Celery, runtime_of: Callable[[Celery], Runtime]) -> None:
    """Give `app` its tasks; `runtime_of` finds what the worker process holds. Names are wire format."""

    @app.task(name=TASK_GENERATE, bind=True, ignore_result=True, shared=False)
    def generate(task: Any, chunk: object = None) -> str:
        work = runtime_of(app)
        message = read_chunk(work, chunk)
        return _UNREADABLE if message is None else generate_chunk(work, message, partial(_report, task))

    @app.task(name=TASK_RECONCILE, ignore_result=True, shared=False)
    def reconcile() -> str:
        runtime_of(app).reconcile()
        return "reconciled"


def _report(task: Any, line: str) -> None:
    """Show a line in Flower, as the result of the state PROGRESS, until the task ends; or don't, while Redis is away."""
    try:
        task.send_event("task-progress", retry=False, result=line)
    except Exception as error:  # whatever it is, a line for the eye must not cost the chunk its work
        log.debug("no progress is shown: %s", error)


def generate_chunk(work: Runtime, message: ChunkMessage, report: Report) -> str:
    """Answer what SQL lacks of one chunk and return a line about it; when this returns, the message is acknowledged."""
    with work.working() as tell:
        claim = _claim(work, message)
        if claim is None:
            return _skip(message)
        crash_point("after_claim")
        prompts = _pending(work, claim, message)
        tell(message)
        with work.recorder.open(claim, owed=len(prompts)) as ledger:
            with work.host.submit(prompts, message, ledger):
                verdict = _follow(ledger, report)
            _close(work, ledger, verdict)
        work.refill()
    return _sum_up(ledger, verdict)


def _claim(work: Runtime, message: ChunkMessage) -> Claim | None:
    """Claim the chunk. A worker that is going down puts the message back instead."""
    try:
        if work.draining.is_set():
            raise Reject("this worker is going down", requeue=True)
        return work.outage.ride_out(
            lambda: work.store.claim_chunk(message.chunk_id, worker=work.worker_id, lease_s=work.settings.lease_s),
            what=f"the claim on chunk {message.chunk_id}",
            give_up=work.draining.is_set,
        )
    except HEALS as error:
        raise Reject(f"this worker is going down, and the store is away: {error.message}", requeue=True) from error


def _pending(work: Runtime, claim: Claim, message: ChunkMessage) -> list[tuple[int, Prompt]]:
    """Return the message's prompts whose indexes have no row yet, with their indexes: after a crash, the rest of the chunk."""
    pending = work.outage.ride_out(
        lambda: work.store.pending(claim), what=f"chunk {claim.chunk_id}", give_up=work.draining.is_set
    )
    prompts = ((item.index, message.prompts[item.index - message.start]) for item in pending)
    return [(index, prompt) for index, prompt in prompts if prompt is not None]


def _follow(ledger: Ledger, report: Report) -> Verdict:
    """Wait until the chunk's work ends, and tell how it gets on."""
    while (verdict := ledger.wait(PROGRESS_S)) is None:
        report(progress_line(ledger))
    return verdict


def _close(work: Runtime, ledger: Ledger, verdict: Verdict) -> None:
    """Finish the chunk, or hand back what is left of it. What the recorder has of it is written first."""
    claim = ledger.claim
    if verdict is Verdict.BROKEN:
        assert ledger.error is not None
        raise ledger.error
    if verdict is Verdict.RECORDED:
        crash_point("after_flush_before_ack")
        work.outage.ride_out(
            lambda: work.store.finish_chunk(claim), what=f"the end of chunk {claim.chunk_id}", give_up=work.draining.is_set
        )
        crash_point("before_ack")
    elif verdict in (Verdict.ENGINE_LOST, Verdict.DRAINED, Verdict.OUT_OF_ROOM):
        while verdict is Verdict.OUT_OF_ROOM and not (ledger.wait_written(PROGRESS_S) or work.draining.is_set()):
            pass  # the chunk is this worker's until the store is back: it has the answers
        if not ledger.wait_written(WRITE_PATIENCE_S):
            log.warning(
                "chunk %s can't be handed back while the store is away; its lease runs out instead", claim.chunk_id,
                extra={"event": "chunk_left", "chunk_id": claim.chunk_id},
            )  # fmt: skip
            return
        if verdict is Verdict.ENGINE_LOST:
            # Now, not at the next look: this worker would take the chunk again and lose it again.
            work.check_engine()
        work.store.release_chunk(claim)


def _skip(message: ChunkMessage) -> str:
    line = "nothing to do: it is done, cancelled, or another worker has it"
    log.info("%s: %s", describe(message), line, extra={"event": "chunk_skipped", "chunk_id": message.chunk_id})
    return line


def _sum_up(ledger: Ledger, verdict: Verdict) -> str:
    line = " · ".join(part for part in (progress_line(ledger), _ENDINGS[verdict]) if part)
    claim = ledger.claim
    log.info(
        "%s… chunk %d/%d: %s", claim.batch_id[:14], claim.number, claim.of, line,
        extra={
            "event": "chunk_ended", "batch_id": claim.batch_id, "chunk_id": claim.chunk_id, "verdict": str(verdict),
            "rows": ledger.recorded, "failed": ledger.failed, "tokens": ledger.tokens, "seconds": round(ledger.seconds, 2),
        },
    )  # fmt: skip
    return line


def progress_line(ledger: Ledger) -> str:
    """Return a line such as '32/64 rows · 2 failed · 2400 tok · 310 tok/s'; the rows are those in SQL."""
    parts = [f"{ledger.recorded}/{ledger.owed} rows"]
    if ledger.failed:
        parts.append(f"{ledger.failed} failed")
    if ledger.tokens:
        parts += [f"{ledger.tokens} tok", f"{ledger.tokens / ledger.seconds:.0f} tok/s"]
    return " · ".join(parts)
