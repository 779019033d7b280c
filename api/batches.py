"""The batch resource: submit, look, list, cancel, retry, delete. Handlers are `def`: they run in the thread pool, where SQL may block.

Only SQL is read here, never Redis: what a client sees is what is durable. Knows no engine.
"""

from __future__ import annotations

import logging
import math
from hashlib import sha256
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response
from pydantic import AfterValidator, BaseModel

from api import examples
from api.auth import CallerDep, check_owner
from api.file_batches import create_from_file
from api.intake import choose_model, parse_create
from api.problems import expect_openais_client
from api.services import Services, ServicesDep
from headrace.batch import Batch, BatchStatus, no_such_batch
from headrace.errors import InvalidRequest
from headrace.schemas import BatchOut, BatchPage
from headrace.screening import screen

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/batches", tags=["Batches"])

WRITE_PATIENCE_S: Final = 1.0
"""A cancel or a deletion of a million prompts writes for many seconds; a request waits for so many, the rest goes on behind it."""
_HEX = frozenset("0123456789abcdef")


def check_id(batch_id: str) -> str:
    """Return a well-formed batch id. Raises `NotFound` for what can't be one, before a database chokes on its characters."""
    if len(batch_id) != 38 or not batch_id.startswith("batch_") or not _HEX.issuperset(batch_id[6:]):
        raise no_such_batch(batch_id)
    return batch_id


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        description="Send a new random one with each new batch, and the same one when you retry: one batch comes of it.",
    ),
]


def visible_batch(
    batch_id: Annotated[str, Path(description="`batch_` and 32 hex digits."), AfterValidator(check_id)],
    services: ServicesDep,
    caller: CallerDep,
) -> str:
    """Return the id of a batch that the caller may see. Raises `NotFound`."""
    check_owner(services, caller, batch_id)
    return batch_id


BatchId = Annotated[str, Depends(visible_batch)]


async def read_json_body(request: Request) -> bytearray:
    """Return the body. The one `async` part of an upload: parsing happens in the thread pool, away from the event loop."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"send the body with Content-Type: application/json, not {media_type or 'none'!r}")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "send the body without a Content-Encoding; compressed bodies are not read")
    body = bytearray()
    async for piece in request.stream():
        body += piece
    return body


@router.post(
    "",
    status_code=202,
    response_model=BatchOut,
    summary="Submit a batch",
    responses={
        200: {**examples.READING, "model": BatchOut},
        202: examples.ACCEPTED,
        **examples.problems(400, 404, 409, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra=examples.CREATE_BODY,
)
def create_batch(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    body: Annotated[bytearray, Depends(read_json_body)],
    idempotency_key: IdempotencyKey = None,
    resent: Annotated[
        str | None,
        Header(
            alias="x-stainless-retry-count",
            description="OpenAI's clients count here how often they have sent a request before: a batch whose reply was lost is found again.",
        ),
    ] = None,
) -> Response:
    """Store prompts and send them to the workers.

    With `input_file_id` the batch is `validating` while its file is read, in the background; a file that is wrong as a whole fails it,
    with line numbers in `errors`; a line that asks for what can't be done fails alone, in the error file. The reply is a 200 then.

    When the reply is there the batch is durable: it is answered even if every process is killed now. The request is refused as a
    whole when it is malformed; a prompt that is well-formed but can't be answered (empty, too long, an unknown role) is accepted and
    becomes the failed completion of its index.
    """
    settings = services.settings
    if b'"input_file_id"' in body:
        expect_openais_client(request)
    create = parse_create(body, settings)
    body.clear()  # it would live until the response is sent, beside the parsed prompts
    key = _clean_key(idempotency_key)
    services.check_room()
    if create.input_file_id is not None:
        batch = create_from_file(services, caller, create, idempotency_key=key, resent=_count(resent))
        return _accepted(services, batch, status_code=200)
    assert create.prompts is not None, "parse_create wants one of the two"
    model = choose_model(create.model, settings)
    batch = services.store.create_batch(
        screen(create.prompts, max_bytes=settings.max_prompt_bytes),
        create.gen_config,
        model=model,
        chunk_size=settings.chunk_size,
        metadata=create.metadata,
        priority=create.priority,
        completion_window=create.completion_window,
        idempotency_key=key,
        max_open_prompts=settings.max_open_prompts,
        owner=caller.owner,
        reserved=len(create.prompts),
    )
    return _accepted(services, batch)


def _accepted(services: Services, batch: Batch, *, status_code: int = 202) -> Response:
    """Send the first chunks of a batch that is stored, and say where it is."""
    model = batch.model
    queue = services.send_chunks(model=model)
    log.info(
        "batch accepted; workers of %s answer it",
        model,
        extra={"event": "batch_accepted", "batch_id": batch.id, "prompts": batch.counts.total, "model": model, "queue": queue},
    )
    out = BatchOut.of(batch, queue=queue)
    headers = {"location": out.headrace.links.self, "headrace-queue": queue, **_state_headers(batch)}
    return json_response(out, status_code=status_code, headers=headers)


@router.get(
    "", response_model=BatchPage, summary="List batches", responses={200: examples.LISTED, **examples.problems(404, 422)}
)
def list_batches(
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Annotated[BatchStatus | None, Query(description="Only batches in this state.")] = None,
) -> Response:
    """Return a page of batches, newest first."""
    found = services.store.list_batches(
        after=None if after is None else check_id(after), limit=limit + 1, status=status, owner=caller.scope
    )
    data = [BatchOut.of(batch) for batch in found[:limit]]
    page = BatchPage(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )
    return json_response(page)


@router.get(
    "/{batch_id}",
    response_model=BatchOut,
    summary="Look at a batch",
    responses={200: examples.RUNNING, **examples.problems(404)},
)
def get_batch(
    batch_id: BatchId,
    services: ServicesDep,
    if_none_match: Annotated[
        str | None, Header(description="The `ETag` of an earlier reply: 304 when nothing changed.")
    ] = None,
) -> Response:
    """Return state, counts, token usage, rate and ETA. Costs one row: poll as often as Retry-After says."""
    batch = services.store.get_batch(batch_id)
    headers = _state_headers(batch)
    if if_none_match is not None and headers["etag"] in (tag.strip() for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    return json_response(BatchOut.of(batch), headers=headers)


@router.post(
    "/{batch_id}/cancel",
    response_model=BatchOut,
    summary="Cancel a batch",
    responses={200: examples.CANCELLING, **examples.problems(404, 409)},
)
def cancel_batch(batch_id: BatchId, services: ServicesDep) -> Response:
    """Stop a batch. What is answered stays; every other index gets the error `batch_cancelled`. 409 when it is over already.

    `cancelling`: a worker has yet to hand in what it was at, or so many prompts are open that their errors are still being written.
    """
    batch = services.store.cancel_batch(batch_id, when_stopped=services.hurry_workers, within_s=WRITE_PATIENCE_S)
    if batch.status is BatchStatus.CANCELLING:
        services.wake_readers()
    log.info(
        "batch is being cancelled; workers stop at once",
        extra={"event": "batch_cancel_requested", "batch_id": batch.id, "status": batch.status},
    )
    return json_response(BatchOut.of(batch), headers=_state_headers(batch))


@router.post(
    "/{batch_id}/retry",
    status_code=202,
    response_model=BatchOut,
    summary="Retry the failed prompts of a batch",
    responses={202: examples.ACCEPTED, **examples.problems(404, 409, 422, 429, 507)},
)
def retry_batch(batch_id: BatchId, services: ServicesDep, idempotency_key: IdempotencyKey = None) -> Response:
    """Make a new batch of the prompts of a finished one that have an error (failed, cancelled, expired), in their order.

    The old batch stays as it is; `metadata.retry_of` of the new one names it (where the old one has not 16 pairs already). Prompts that were refused as they came in (empty, too
    long) are left out. 409 when the batch is not over, or nothing of it can be retried.
    """
    settings = services.settings
    choose_model(services.store.get_batch(batch_id).model, settings)  # it may be served no more
    services.check_room()
    batch = services.store.retry_batch(
        batch_id,
        chunk_size=settings.chunk_size,
        idempotency_key=_clean_key(idempotency_key),
        max_open_prompts=settings.max_open_prompts,
    )
    return _accepted(services, batch)


@router.delete("/{batch_id}", status_code=204, summary="Delete a batch", responses=examples.problems(404, 409))
def delete_batch(batch_id: BatchId, services: ServicesDep) -> Response:
    """Delete a batch that is over, with its prompts and its results, for good. 409 while it is not over: cancel it first."""
    services.store.delete_batch(batch_id, within_s=WRITE_PATIENCE_S)
    services.wake_readers()
    log.info("batch deleted with its results", extra={"event": "batch_deleted", "batch_id": batch_id})
    return Response(status_code=204)


def retry_after_s(batch: Batch) -> int:
    """Return after how many seconds another look is worthwhile: a tenth of what is left, 1..30."""
    eta_s = batch.eta_s
    return 1 if eta_s is None else max(1, min(30, math.ceil(eta_s / 10)))


def json_response(shape: BaseModel, *, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Render a shape once; FastAPI's own way would build, validate and render it again."""
    return Response(shape.model_dump_json(), status_code=status_code, media_type="application/json", headers=headers)


def _state_headers(batch: Batch) -> dict[str, str]:
    # The tag covers the stored row only: rates and ETA are functions of it, so an unchanged row is an unchanged reply.
    headers = {"etag": f'W/"{sha256(repr(batch).encode()).hexdigest()[:32]}"', "cache-control": "no-cache"}
    if not batch.status.is_terminal:
        headers["retry-after"] = str(retry_after_s(batch))
    return headers


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 6 else 0


def _clean_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise InvalidRequest("Idempotency-Key must be 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return key
