"""The examples in the OpenAPI document, and its list of problems for each operation. Tests send the requests and parse the replies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from pydantic import BaseModel

from headrace.batch import CHAT, Batch, BatchStatus, RequestCounts
from headrace.completion import Choice, Completion, CompletionError, TokenUsage
from headrace.config import GenerationConfig
from headrace.errors import HeadraceError
from headrace.file_schemas import FileDeleted, FileOut, FilePage
from headrace.schemas import (
    BatchOut,
    BatchPage,
    Check,
    CompletionPage,
    Health,
    ModelList,
    ModelOut,
)

_ID: Final = "batch_6f1d0c3a9b5e4d7f8a2b1c0d9e8f7a6b"
_T0: Final = 1764000000.0
_MODEL: Final = "smollm2"

TEXTS: Final[dict[str, Any]] = {
    "prompts": ["Name three rivers in France.", "Explain what a headrace is in one sentence."],
    "gen_config": {"max_new_tokens": 64, "temperature": 0.7, "top_k": 40, "random_seed": 7},
    "metadata": {"dataset": "rivers-v1"},
}
CONVERSATIONS: Final[dict[str, Any]] = {
    "model": _MODEL,
    "prompts": [
        [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Write a haiku about mills."}],
    ],
    "gen_config": {"max_new_tokens": 48, "stop_words": ["\n\n"]},
    "priority": 10,
    "completion_window": "24h",
}


def _batch(status: BatchStatus, *, completed: int, failed: int, begun: int = 0, **times: float) -> Batch:
    return Batch(
        id=_ID,
        model=_MODEL,
        gen_config=GenerationConfig(max_new_tokens=64, temperature=0.7, top_k=40, random_seed=7),
        status=status,
        counts=RequestCounts(total=2000, completed=completed, failed=failed),
        usage=TokenUsage(prompt_tokens=61 * completed, cached_tokens=48 * completed, completion_tokens=52 * completed),
        begun=begun,
        created_at=_T0,
        expires_at=_T0 + 86400,
        in_progress_at=_T0,
        metadata={"dataset": "rivers-v1"},
        **times,  # type: ignore[arg-type]  # times only
    )


def _body(summary: str, value: Any) -> dict[str, Any]:
    return {"description": summary, "content": {"application/json": {"example": value}}}


def _shape(summary: str, value: BaseModel) -> dict[str, Any]:
    return _body(summary, _keep_nulls(value.model_dump(mode="json")))


_NULL: Final = "\0null"


def _keep_nulls(value: Any) -> Any:
    """Mark nulls: FastAPI strips them from examples, and on the wire a field that is null is not absent."""
    return _replace(value, None, _NULL)


def restore_nulls(document: Any) -> Any:
    """Undo the marks in the finished OpenAPI document."""
    return _replace(document, _NULL, None)


def _replace(value: Any, old: object, new: object) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, old, new) for item in value]
    return new if value == old else value


_queued = BatchOut.of(_batch(BatchStatus.IN_PROGRESS, completed=0, failed=0, updated_at=_T0), queue="sent")
_running = BatchOut.of(
    _batch(BatchStatus.IN_PROGRESS, completed=1240, failed=1, begun=1368, started_at=_T0 + 1, updated_at=_T0 + 63)
)
_cancelling = BatchOut.of(
    _batch(
        BatchStatus.CANCELLING,
        completed=1240,
        failed=1,
        begun=1368,
        started_at=_T0 + 1,
        updated_at=_T0 + 63,
        cancelling_at=_T0 + 64,
    )
)
_completion = Completion(
    index=0,
    choices=(
        Choice(
            index=0,
            text="The Seine, the Loire and the Rhône.",
            token_ids=(504, 1216, 505),
            finish_reason="stop",
            stop_detail="eos",
        ),
    ),
    usage=TokenUsage(prompt_tokens=37, cached_tokens=32, completion_tokens=12),
    queue_ms=18.2,
    run_ms=240.5,
)
_failed = Completion(
    index=1, error=CompletionError(code="invalid_request", message="The prompt is empty; give it some text"), attempts=0
)

ACCEPTED = {
    **_shape("Stored. Location says where to look, Retry-After when.", _queued),
    "headers": {
        "Location": {"schema": {"type": "string"}, "description": "The batch."},
        "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until a look is worthwhile."},
        "Headrace-Queue": {
            "schema": {"enum": ["sent", "unavailable"]},
            "description": "`unavailable`: Redis is down; sent when it is back.",
        },
    },
}
RUNNING = _shape("The batch.", _running)
CANCELLING = _shape("The batch, `cancelling` or already `cancelled`.", _cancelling)
LISTED = _shape("A page.", BatchPage(data=[_running], first_id=_ID, last_id=_ID, has_more=False))
RESULTS = _shape(
    "A page.",
    CompletionPage(
        data=[_completion, _failed], first_id=0, last_id=1, has_more=True, next=f"/v1/batches/{_ID}/results?after=1&limit=2"
    ),
)
STREAM = {
    "description": "One completion a line.",
    "content": {
        "application/x-ndjson": {
            "schema": {"type": "string"},
            "example": '{"index":0,"custom_id":null,"choices":[{"index":0,"text":"The Seine, …"}],…}\n',
        }
    },
}
MODELS = _shape("The models.", ModelList(data=[ModelOut(id=_MODEL, created=int(_T0))]))
MODEL = _shape("The model.", ModelOut(id=_MODEL, created=int(_T0)))
ALIVE = _shape("The process answers.", Health(status="ok"))
_checks = [
    Check(name="store", ok=True, detail="answers"),
    Check(name="redis", ok=True, detail="answers; 12 chunks wait"),
    Check(name=f"worker:{_MODEL}", ok=True, detail="1 with a fresh heartbeat: gpu@host-3"),
]
READY = _shape("All is there.", Health(status="ready", checks=_checks))
NOT_READY = _shape(
    "Something is missing; the checks name it.",
    Health(
        status="not_ready",
        checks=[*_checks[:2], Check(name=f"worker:{_MODEL}", ok=False, detail="no worker with a fresh heartbeat")],
    ),
)

_FILE_ID: Final = "file-6f1d0c3a9b5e4d7f8a2b1c0d9e8f7a6b"
FROM_FILE: Final[dict[str, Any]] = {"input_file_id": _FILE_ID, "endpoint": CHAT, "completion_window": "24h"}
_file = FileOut(id=_FILE_ID, bytes=10_927_780, created_at=int(_T0), expires_at=None, filename="requests.jsonl", purpose="batch")
UPLOADED = _shape("The file.", _file)
FILES = _shape("A page.", FilePage(data=[_file], first_id=_FILE_ID, last_id=_FILE_ID, has_more=False))
DELETED = _shape("It is gone.", FileDeleted(id=_FILE_ID))
CONTENT = {
    "description": "The content as it is.",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
READING = _shape(
    "Stored, from a file: `validating` while that is read.",
    BatchOut.of(
        replace(
            _batch(BatchStatus.VALIDATING, completed=0, failed=0), counts=RequestCounts(), input_file_id=_FILE_ID, endpoint=CHAT,
            in_progress_at=None,
        )
    ),
)  # fmt: skip
UPLOAD_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "purpose": {"const": "batch"},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
CREATE_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/BatchCreate"},
                "examples": {
                    "texts": {"summary": "Texts", "value": TEXTS},
                    "conversations": {"summary": "Conversations", "value": CONVERSATIONS},
                    "file": {"summary": "An uploaded file", "value": FROM_FILE},
                },
            }
        },
    }
}

_REASONS: Final = {
    401: "`invalid_api_key`: no valid API key (only where the server has one).",
    404: "`not_found`, or `model_not_found` naming the models that are served.",
    409: "`conflict`: the batch is not in a state for this, or its first request is still being stored.",
    413: "`payload_too_large`: refused before the body is read; split the batch.",
    415: "The body is not of the media type that the operation takes.",
    400: "`invalid_request`, in requests of OpenAI's form (files, and batches of them): what is a 422 elsewhere.",
    422: "`invalid_request`: `errors` names each wrong field, or the index of each wrong prompt.",
    429: "`queue_full`: as many prompts wait for an answer as this server accepts, or `quota_exceeded`: as many as this API key may have; send it again after Retry-After.",
    503: "`store_unavailable`: the database can't be reached; try again after Retry-After.",
    507: "`storage_full`: the database's disk is full or nearly so; nothing recorded was lost. Send it again after Retry-After.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` entries of these problem statuses; 401 and 503 can happen to every operation."""
    # Not `model=Problem`: FastAPI would say that it comes as application/json. docs.py adds the schema to the document.
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _REASONS[status], "content": content} for status in sorted({401, 503, *statuses})}


def problem_kinds() -> list[tuple[str, int, str]]:
    """Return (code, status, meaning) of every class in the exception tree, for the documentation page."""
    kinds: list[tuple[str, int, str]] = []
    todo: list[type[HeadraceError]] = [HeadraceError]
    while todo:
        kind = todo.pop()
        kinds.append((kind.code, kind.status, (kind.__doc__ or "").strip()))
        todo.extend(kind.__subclasses__())
    # InvalidBody and the like share their parent's code: one entry is enough.
    return sorted(
        {code: (code, status, text) for code, status, text in reversed(kinds)}.values(), key=lambda kind: (kind[1], kind[0])
    )
