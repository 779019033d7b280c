"""Drives a store as workers and senders do, looks behind its counters, and moves its clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, select, text, update

from headrace.batch import Batch
from headrace.completion import Choice, Completion, CompletionError, TokenUsage
from headrace.config import GenerationConfig, Prompt
from headrace.store import ChunkRef, ChunkState, Claim, Store
from headrace.store.tables import batches, chunks, completions

REFUSED = CompletionError(code="invalid_request", message="empty prompt")
COUNTERS = ("completed", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")


def submit(store: Store, count: int = 10, *, model: str = "m", refused: Iterable[int] = (), **options: Any) -> Batch:
    """Store a batch of `count` prompts 'prompt <i>', those in `refused` refused at the rim."""
    no = set(refused)
    prompts: list[Prompt | CompletionError] = [REFUSED if i in no else f"prompt {i}" for i in range(count)]
    return store.create_batch(prompts, options.pop("gen_config", GenerationConfig()), model=model, **options)


def answer(index: int, text: str = "yes", *, error: str | None = None) -> Completion:
    """Return a completion whose usage depends on its index, so that a lost or doubled count shows."""
    usage = TokenUsage(prompt_tokens=index + 1, cached_tokens=index // 2, completion_tokens=2 * index + 1)
    if error is not None:
        return Completion(index=index, usage=usage, error=CompletionError(code=error, message="no"))
    choice = Choice(index=0, text=f"{text} {index}", token_ids=(1, 2, index), finish_reason="stop", stop_detail="eos")
    return Completion(index=index, choices=(choice,), usage=usage, queue_ms=1.5, run_ms=2.5)


def answers(indexes: Iterable[int], text: str = "yes") -> list[Completion]:
    """Return an answer for each index."""
    return [answer(index, text) for index in indexes]


def take(store: Store, *, model: str = "m", limit: int = 100, worker: str = "w", lease_s: float = 60.0) -> list[Claim]:
    """Send and claim what is due."""
    claims = [store.claim_chunk(ref.chunk_id, worker=worker, lease_s=lease_s) for ref in send(store, model=model, limit=limit)]
    return [claim for claim in claims if claim is not None]


def send(store: Store, *, model: str = "m", limit: int = 100) -> list[ChunkRef]:
    """Send what is due."""
    return store.next_chunks(model=model, limit=limit, grace_s=60)


def work_off(store: Store, claims: Sequence[Claim], text: str = "yes") -> None:
    """Answer what is pending in the claims and finish them."""
    for claim in claims:
        store.record(claim, answers((item.index for item in store.pending(claim)), text))
        assert store.finish_chunk(claim)


def lapse(store: Store, *chunk_ids: str) -> None:
    """Let the leases of the chunks run out now."""
    execute(store, update(chunks).where(chunks.c.id.in_(chunk_ids), chunks.c.lease_until.is_not(None)).values(lease_until=1.0))


def outdate(store: Store, batch_id: str) -> None:
    """Let the batch's window be over now."""
    execute(store, update(batches).where(batches.c.id == batch_id).values(expires_at=1.0))


def execute(store: Store, statement: Any) -> None:
    """Run one statement."""
    store._database.write(lambda connection: connection.execute(statement))


def chunk_rows(store: Store, batch_id: str) -> list[Any]:
    """Return the batch's chunk rows by number."""
    query = select(chunks).where(chunks.c.batch_id == batch_id).order_by(chunks.c.number)
    return list(store._database.read(lambda connection: connection.execute(query).all()))


def check(store: Store, batch_id: str, *, mixes_releases: bool = False) -> Batch:
    """Recount the batch: every counter equals the tables, chunks partition the prompts, and a batch that is over is whole.

    `mixes_releases`: workers of before 0007 wrote some of its rows, who don't say how far they have begun.
    """
    batch, row, parts, rows = store._database.read(lambda connection: _snapshot(connection, batch_id))
    assert {name: getattr(row, name) for name in COUNTERS} == _recount(rows)
    assert [(part.start, part.stop) for part in parts] == _cuts(parts, row.total)
    states = Counter(part.state for part in parts)
    assert row.begun == sum(part.begun for part in parts)
    assert row.open_chunks == states[ChunkState.QUEUED] + states[ChunkState.LEASED]
    for part in parts:
        inside = [item for item in rows if part.start <= item["index"] < part.stop]
        assert {name: getattr(part, name) for name in COUNTERS} == _recount(inside), part.number
        # What no worker answered (refused, cancelled) was begun by none.
        begun = max((item["index"] + 1 - part.start for item in inside if item["worker"] is not None), default=0)
        assert part.begun == begun or (mixes_releases and 0 <= part.begun < begun)
        if part.state in (ChunkState.DONE, ChunkState.CANCELLED):
            assert len(inside) == part.stop - part.start
            assert (part.sent_at, part.lease_until) == (None, None)
    indexes = [item["index"] for item in rows]
    assert len(indexes) == len(set(indexes))
    if batch.status.is_terminal and row.total:
        assert indexes == list(range(row.total))
        assert getattr(batch, f"{batch.status.value}_at") is not None
    return batch


def _snapshot(connection: Any, batch_id: str) -> tuple[Batch, Any, list[Any], list[Any]]:
    from headrace.store import batches as queries

    row = queries.get(connection, batch_id)
    parts = connection.execute(select(chunks).where(chunks.c.batch_id == batch_id).order_by(chunks.c.number)).all()
    query = select(completions).where(completions.c.batch_id == batch_id).order_by(completions.c.index)
    return queries.from_row(row), row, list(parts), list(connection.execute(query).mappings().all())


def _cuts(parts: Sequence[Any], total: int) -> list[tuple[int, int]]:
    size = parts[0].stop - parts[0].start if parts else 1
    return [(start, min(total, start + size)) for start in range(0, total, size)]


def _recount(rows: Sequence[Any]) -> dict[str, int]:
    failed = sum(row["error_code"] is not None for row in rows)
    tokens = {name: sum(row[name] for row in rows) for name in COUNTERS[2:]}
    return {"completed": len(rows) - failed, "failed": failed, **tokens}


def count(store: Store, table: Any) -> int:
    """Return how many rows a table has."""
    return int(
        store._database.read(lambda connection: connection.execute(select(func.count()).select_from(table)).scalar_one())
    )


def pragma(store: Store, name: str) -> Any:
    """Return the value of an SQLite pragma on the writing connection."""
    return store._database.write(lambda connection: connection.execute(text(f"PRAGMA {name}")).scalar())
