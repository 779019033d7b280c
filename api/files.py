"""OpenAI's Files: uploads that are stored as they arrive, in constant memory, and the files of a batch's answers, made while they are read.

An output or error file is no copy: its id names the batch, its lines are the batch's completions. Knows no engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import anyio
from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api import examples
from api.auth import Caller, CallerDep
from api.batches import json_response
from api.multipart import FormParser, PartBegins, PartData, PartEnds, boundary_of
from api.services import Services, ServicesDep
from headrace.batch import Batch, OutputKind
from headrace.batch_output import split_file_id
from headrace.errors import Conflict, InvalidRequest, NotFound
from headrace.file_schemas import FileDeleted, FileOut, FilePage
from headrace.output_files import count, pages

if TYPE_CHECKING:
    from headrace.store import Store
    from headrace.store.files import StoredFile

router = APIRouter(prefix="/v1/files", tags=["Files"])
T = TypeVar("T")

COUNT_AT_ONCE: Final = 2000
"""So many lines are counted while somebody waits for the answer; larger files of answers are counted by the readers."""
MAX_FIELD_BYTES: Final = 1024
MAX_NAME: Final = 255
_FIELDS: Final = ("purpose", "file", "expires_after[anchor]", "expires_after[seconds]")
_LIFE_S: Final = (3600, 2_592_000)
_ID: Final = re.compile(r"file-[0-9a-f]{32}(-output|-errors)?")

FileId = Annotated[str, Path(description="`file-` and 32 hex digits; of a batch's answers also `-output` or `-errors`.")]


@router.post(
    "",
    response_model=FileOut,
    summary="Upload a file",
    responses={200: examples.UPLOADED, **examples.problems(400, 413, 415, 507)},
    openapi_extra=examples.UPLOAD_BODY,
)
async def upload_file(request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """Store a JSONL file of requests, for POST /v1/batches. It is stored as it arrives: its size costs no memory."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send the file with Content-Type: multipart/form-data")
    await run_in_threadpool(services.check_room)
    form = _Form(services, caller)
    try:
        return json_response(await form.read(FormParser(boundary_of(content_type)), request.stream()))
    except BaseException:
        # Also when the sender leaves in the middle. What can't be removed now is swept later.
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(form.abandon)
        raise


class _Form:
    """One upload's form: the fields, and the file on its way into the store."""

    def __init__(self, services: Services, caller: Caller) -> None:
        self._services = services
        self._caller = caller
        self._fields: dict[str, bytearray] = {}
        # The part that is being read.
        self._name = ""
        self._upload: _Upload | None = None

    async def read(self, parser: FormParser, stream: AsyncIterator[bytes]) -> FileOut:
        """Read the form to its end and return the stored file. Raises `InvalidRequest` naming the field that is wrong."""
        async for piece in stream:
            for event in parser.feed(piece):
                if isinstance(event, PartBegins):
                    await self._begin(event)
                elif isinstance(event, PartData):
                    await self._take(event.data)
                elif isinstance(event, PartEnds) and self._name != "file":
                    self._check_fields(is_complete=False)
        parser.close()
        self._check_fields(is_complete=True)
        if self._upload is None:
            raise InvalidRequest("the form has no file", param="file")
        return await self._upload.complete()

    async def _begin(self, part: PartBegins) -> None:
        if part.name not in _FIELDS:
            raise InvalidRequest(
                f"the form has no field {part.name[:80]!r}; its fields are {', '.join(_FIELDS)}", param=part.name[:80]
            )
        if part.name in self._fields or (part.name == "file" and self._upload is not None):
            raise InvalidRequest(f"the form has more than one {part.name}", param=part.name)
        self._name = part.name
        if part.name != "file":
            self._fields[part.name] = bytearray()
            return
        if part.filename is None:
            raise InvalidRequest("the field file must be a file, with a filename", param="file")
        self._upload = _Upload(self._services.store, self._caller.owner, clean_name(part.filename))

    async def _take(self, data: bytes) -> None:
        if self._name == "file":
            assert self._upload is not None
            self._upload.expires_in_s = self._life_s()
            await self._upload.take(data)
            return
        field = self._fields[self._name]
        field += data
        if len(field) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{self._name} has more than {MAX_FIELD_BYTES} bytes", param=self._name)

    def _check_fields(self, *, is_complete: bool) -> None:
        purpose = self._fields.get("purpose")
        if purpose is None and is_complete:
            raise InvalidRequest("the form has no purpose; it must be 'batch'", param="purpose")
        if purpose is not None and purpose != b"batch":
            raise InvalidRequest(f"purpose must be 'batch', not {purpose.decode(errors='replace')[:80]!r}", param="purpose")
        if self._upload is not None:
            self._upload.expires_in_s = self._life_s()
        if self._fields.get("expires_after[anchor]", b"created_at") != b"created_at":
            raise InvalidRequest("expires_after[anchor] must be 'created_at'", param="expires_after[anchor]")
        if is_complete and "expires_after[anchor]" in self._fields and "expires_after[seconds]" not in self._fields:
            raise InvalidRequest("expires_after[anchor] needs expires_after[seconds] beside it", param="expires_after[seconds]")

    def _life_s(self) -> float | None:
        text = self._fields.get("expires_after[seconds]")
        if text is None:
            return None
        low, high = _LIFE_S
        if not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
            raise InvalidRequest(
                f"expires_after[seconds] must be a whole number from {low} to {high}", param="expires_after[seconds]"
            )
        return float(int(text))

    def abandon(self) -> None:
        """Remove what arrived."""
        if self._upload is not None:
            self._upload.abandon()


class _Upload:
    """A file on its way into the store, one part in memory."""

    def __init__(self, store: Store, owner: str | None, filename: str) -> None:
        from headrace.store.files import PART_BYTES

        self._files = store.files
        self._owner = owner
        self._filename = filename
        self._part_bytes = PART_BYTES
        self._id: str | None = None
        self._buffer = bytearray()
        self._size = self._lines = self._parts = 0
        self._sha256 = hashlib.sha256()
        self._ends_in_line = True
        # Set by the form, as far as its fields are known.
        self.expires_in_s: float | None = None

    async def take(self, data: bytes) -> None:
        """Take the next piece; returns when whole parts of it are stored, so that the sender waits for the database."""
        self._buffer += data
        while len(self._buffer) >= self._part_bytes:
            await self._store(self._part_bytes)

    async def complete(self) -> FileOut:
        """Store the rest, and show the file to everybody."""
        if self._buffer or self._id is None:
            await self._store(len(self._buffer))
        assert self._id is not None
        lines = self._lines + (not self._ends_in_line)
        stored = await run_in_threadpool(
            self._files.complete,
            self._id,
            size=self._size,
            lines=lines,
            parts=self._parts,
            sha256=self._sha256.hexdigest(),
            expires_in_s=self.expires_in_s,
        )
        self._id = None
        return _shape(stored)

    async def _store(self, count: int) -> None:
        if self._id is None:
            self._id = await run_in_threadpool(self._files.begin, filename=self._filename, purpose="batch", owner=self._owner)
        if count == 0:
            return
        part = bytes(self._buffer[:count])
        del self._buffer[:count]
        await run_in_threadpool(self._append, self._id, part)

    def _append(self, file_id: str, part: bytes) -> None:
        self._files.append(file_id, self._parts, part)
        self._sha256.update(part)
        self._parts += 1
        self._size += len(part)
        self._lines += part.count(b"\n")
        self._ends_in_line = part.endswith(b"\n")

    def abandon(self) -> None:
        """Delete what is stored."""
        if self._id is not None:
            self._files.abandon(self._id)


Purpose = Literal[
    "batch", "batch_output", "assistants", "assistants_output", "fine-tune", "fine-tune-results", "vision", "user_data", "evals"
]  # fmt: skip
"""Those of OpenAI's Files API. A client that asks for all files of another kind gets none, as it would where it has none."""


@router.get("", response_model=FilePage, summary="List files", responses={200: examples.FILES, **examples.problems(400, 404)})
def list_files(
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[
        Purpose | None,
        Query(
            description="`batch`: uploads; `batch_output`: the files of batches' answers; both when left out. There are none of OpenAI's others."
        ),
    ] = None,
) -> Response:
    """Return a page of files, newest first: uploads, and the output and error files of batches that are over."""
    found = services.store.files.list(
        after=None if after is None else _known(after), limit=limit + 1, newest_first=order == "desc", purpose=purpose,
        owner=caller.scope,
    )  # fmt: skip
    data = [_shape(stored) for stored in found[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return json_response(FilePage(data=data, first_id=first, last_id=last, has_more=len(found) > limit))


@router.get(
    "/{file_id}", response_model=FileOut, summary="Look at a file", responses={200: examples.UPLOADED, **examples.problems(404)}
)
def get_file(file_id: FileId, services: ServicesDep, caller: CallerDep) -> Response:
    """Return what is known of a file. That of a batch's answers is `uploaded`, with 0 `bytes`, until they are counted: seconds."""
    if (output := _output(services, caller, file_id)) is not None:
        return json_response(_shape(_counted(services.store, *output)))
    return json_response(_shape(services.store.files.get(_uploaded(file_id), owner=caller.scope)))


@router.get(
    "/{file_id}/content",
    summary="Read a file",
    response_class=StreamingResponse,
    responses={200: examples.CONTENT, **examples.problems(404)},
)
def get_content(file_id: FileId, services: ServicesDep, caller: CallerDep) -> Response:
    """Stream the content, in constant memory; a batch's answers in the order of its input."""
    headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
    if (output := _output(services, caller, file_id)) is not None:
        lines = pages(services.store, *output)
        return StreamingResponse(lines, media_type="application/octet-stream", headers=headers)
    stored = services.store.files.get(_uploaded(file_id), owner=caller.scope)
    headers["content-length"] = str(stored.bytes)
    return StreamingResponse(services.store.files.stream(stored), media_type="application/octet-stream", headers=headers)


@router.delete(
    "/{file_id}",
    response_model=FileDeleted,
    summary="Delete a file",
    responses={200: examples.DELETED, **examples.problems(404, 409)},
)
def delete_file(file_id: FileId, services: ServicesDep, caller: CallerDep) -> Response:
    """Delete an uploaded file. Batches that were made of it keep their prompts; 409 while one is still being read from it."""
    if (output := _output(services, caller, file_id)) is not None:
        raise Conflict(f"this file is made of the answers of {output[0].id}: DELETE /v1/batches/{output[0].id} deletes them")
    services.store.files.delete(_uploaded(file_id), owner=caller.scope)
    return json_response(FileDeleted(id=file_id))


def _shape(stored: StoredFile) -> FileOut:
    return FileOut(
        id=stored.id,
        bytes=stored.bytes,
        created_at=int(stored.created_at),
        expires_at=None if stored.expires_at is None else int(stored.expires_at),
        filename=stored.filename,
        purpose="batch_output" if stored.purpose == "batch_output" else "batch",
        status="processed" if stored.is_counted else "uploaded",
        status_details=None if stored.is_counted else "its bytes are being counted",
    )


def _counted(store: Store, batch: Batch, kind: OutputKind) -> StoredFile:
    """Return a file of answers, counted now where that is quick. Raises `NotFound` when its batch is deleted meanwhile."""
    file_id = str(batch.file_id(kind))
    stored = store.files.find_output(file_id)
    if stored is None:
        # A worker of an older release ended the batch, and lists no files.
        store.announce_outputs(batch.id)
        stored = store.files.find_output(file_id)
    if stored is not None and not stored.is_counted and stored.lines <= COUNT_AT_ONCE:
        stored = count(store, stored)
    if stored is None:
        raise NotFound(f"There is no file {file_id!r}")
    return stored


def clean_name(text: str) -> str:
    """Return a file's name for eyes: its last part, printable, of bounded length. No path is ever made of it."""
    name = re.split(r"[/\\]", text)[-1]
    return "".join(char for char in name if char.isprintable())[-MAX_NAME:] or "upload"


def _known(file_id: str) -> str:
    """Return a well-formed id. Raises `NotFound` before a database chokes on its characters."""
    if not _ID.fullmatch(file_id):
        raise NotFound(f"There is no file {file_id[:80]!r}; GET /v1/files lists those that exist")
    return file_id


def _uploaded(file_id: str) -> str:
    """Return a well-formed id of an uploaded file. Raises `NotFound`."""
    if split_file_id(_known(file_id)) is not None:
        raise NotFound(f"There is no file {file_id!r}")
    return file_id


def _output(services: Services, caller: Caller, file_id: str) -> tuple[Batch, OutputKind] | None:
    """Return the batch whose answers this file is; None for an uploaded file. Raises `NotFound`."""
    place = split_file_id(file_id) if _ID.fullmatch(file_id) else None
    if place is None:
        return None
    batch_id, kind = place
    missing = NotFound(f"There is no file {file_id!r}")
    if caller.scope is not None and _or_none(lambda: services.store.owner_of(batch_id)) != caller.scope:
        raise missing
    batch = _or_none(lambda: services.store.get_batch(batch_id))
    if batch is None or batch.file_id(kind) is None:
        raise missing
    return batch, kind


def _or_none(look: Callable[[], T]) -> T | None:
    try:
        return look()
    except NotFound:
        return None
