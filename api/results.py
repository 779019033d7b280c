"""Completions of a batch, in input order: pages for eyes, one NDJSON stream for programs. Both resume with `?after=`.

While a batch runs, rows arrive in any order. A cursor that stepped over a gap would lose the row that fills it later, so both
forms end before the first index that isn't done yet: what was read once never has to be read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from api import examples
from api.batches import BatchId, retry_after_s
from api.services import ServicesDep
from headrace.batch import Batch
from headrace.completion import Completion
from headrace.schemas import CompletionPage, to_wire

if TYPE_CHECKING:
    from headrace.store import Store

router = APIRouter(prefix="/v1/batches", tags=["Results"])

NDJSON = "application/x-ndjson"
STREAM_PAGE = 256
"""Rows that a stream holds at one time."""

After = Annotated[int, Query(ge=-1, le=2**31 - 1, description="The last index that you have; -1: from the start.")]


@router.get(
    "/{batch_id}/results",
    response_model=CompletionPage,
    summary="Read completions, page by page",
    responses={200: examples.RESULTS, **examples.problems(404, 422)},
)
def get_results(
    batch_id: BatchId,
    services: ServicesDep,
    after: After = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    accept: Annotated[str | None, Header(description=f"`{NDJSON}` gives the stream of /results.jsonl instead.")] = None,
) -> Response:
    """Return a page in input order, with the path of the next one. While the batch runs: as far as it is done without a gap."""
    if accept and NDJSON in accept:
        return stream_results(batch_id, services, after)
    store = services.store
    batch = store.get_batch(batch_id)
    data = ready_page(store, batch, after=after, limit=limit)
    last = data[-1].index if data else after
    # While a batch is being stored its total is 0.
    has_more = last + 1 < batch.counts.total or (batch.counts.total == 0 and not batch.status.is_terminal)
    page = CompletionPage(
        data=data,
        first_id=data[0].index if data else None,
        last_id=data[-1].index if data else None,
        has_more=has_more,
        next=f"/v1/batches/{batch_id}/results?after={last}&limit={limit}" if has_more else None,
    )
    return Response(to_wire(dict(page)), media_type="application/json", headers=_headers(batch))


@router.get(
    "/{batch_id}/results.jsonl",
    summary="Stream completions as NDJSON",
    response_class=StreamingResponse,
    responses={200: examples.STREAM, **examples.problems(404, 422)},
)
def stream_results(batch_id: BatchId, services: ServicesDep, after: After = -1) -> Response:
    """Stream one completion a line, in input order, in constant memory. Cut off? Ask again with `?after=` the last index you have."""
    store = services.store
    batch = store.get_batch(batch_id)
    return StreamingResponse(_lines(store, batch, after), media_type=NDJSON, headers=_headers(batch))


def ready_page(store: Store, batch: Batch, *, after: int, limit: int) -> list[Completion]:
    """Return the completions after `after`, up to the first gap. `batch` must have been read before: a later look could see a gap closed."""
    rows = store.results(batch.id, after=after, limit=limit)
    if batch.status.is_terminal:
        return rows
    return [row for expected, row in enumerate(rows, start=after + 1) if row.index == expected]


def _lines(store: Store, batch: Batch, after: int) -> Iterator[bytes]:
    # Pages in transactions of their own: a reader that stays open for hours would let SQLite's WAL grow without bound.
    while page := ready_page(store, batch, after=after, limit=STREAM_PAGE):
        yield b"".join(to_wire(row) + b"\n" for row in page)
        after = page[-1].index


def _headers(batch: Batch) -> dict[str, str]:
    headers = {"headrace-status": batch.status.value, "headrace-total": str(batch.counts.total), "vary": "accept"}
    if not batch.status.is_terminal:
        headers["retry-after"] = str(retry_after_s(batch))
    return headers
