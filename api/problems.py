"""Every error leaves as RFC 9457 `application/problem+json`: this module turns exceptions into that form, and knows nothing else.

The member `error` is OpenAI's form of the same, the only part that some of its clients read. What headrace did not expect leaves as a 500 that says where to look (the request id) and nothing of what was inside.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from headrace.errors import HeadraceError, InvalidRequest, NotFound, NotStored

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 100
"""Most entries of `errors` in one problem: a batch of a million wrong prompts must not answer with a million lines."""
SERVER_FAULT = 500
_OPENAIS: Final = "headrace.openais"
_RETRY_AFTER_S: Final = {429: 30, 503: 5, 507: 5}
"""What these tell the client to wait: prompts are answered slowly, a database comes back soon."""


_OpenAIKind = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FieldError(_Shape):
    """One thing that is wrong with a request."""

    index: int | None = Field(default=None, description="Position of the prompt, when it is about one.")
    field: str | None = Field(default=None, description="The field, dotted.")
    message: str


class OpenAIError(_Shape):
    """What OpenAI's clients make their exceptions of: those for Python, Node and Go look for `error` first, the last two nowhere else."""

    message: str
    type: _OpenAIKind
    param: str | None = None
    code: str
    index: int | None = Field(default=None, description="headrace's: the prompt, when it is about one.")
    errors: list[FieldError] | None = Field(default=None, description="headrace's: each wrong field, when there are several.")


class Problem(_Shape):
    """RFC 9457, and OpenAI's `error` beside it."""

    type: str = Field(description="A link to what this kind of problem means.")
    title: str
    status: int
    detail: str
    message: str = Field(description="The same as `detail`.")
    instance: str | None = None
    code: str
    param: str | None = None
    index: int | None = None
    errors: list[FieldError] | None = None
    request_id: str | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy has no decorated properties; pydantic's documentation says so
    @property
    def error(self) -> OpenAIError:
        """The same in OpenAI's form."""
        kind: _OpenAIKind = "invalid_request_error"
        if self.status >= SERVER_FAULT:
            kind = "server_error"
        elif self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return OpenAIError(
            message=self.detail, type=kind, param=self.param, code=self.code, index=self.index, errors=self.errors
        )


class InvalidBody(InvalidRequest):
    """The request body is not what this operation takes; `errors` names each wrong field or prompt."""

    def __init__(self, errors: Sequence[FieldError], *, total: int | None = None) -> None:
        """`errors`: the first of them, not empty; `total`: how many there are."""
        first = errors[0]
        count = total or len(errors)
        place = first.field if first.index is None else f"{first.field}[{first.index}]"
        message = f"{place}: {first.message}" if place else first.message
        super().__init__(message + (f" (and {count - 1} more)" if count > 1 else ""), param=first.field, index=first.index)
        self.errors = tuple(errors)


def expect_openais_client(request: Request) -> None:
    """Note that this request is of OpenAI's form: what is wrong with it is a 400, which their clients raise as `BadRequestError`."""
    request.scope[_OPENAIS] = True


def problem_of(
    error: HeadraceError, *, request_id: str | None = None, instance: str | None = None, status: int | None = None
) -> Problem:
    """Return the problem that describes `error`. What failed on our side names no host, path or URL: the log does."""
    detail = error.message if error.status < SERVER_FAULT else (type(error).__doc__ or "").strip()
    return Problem(
        type=f"/docs#problem-{error.code}",
        title=_title(error.code),
        status=status or error.status,
        detail=detail,
        message=detail,
        instance=instance,
        code=error.code,
        param=error.param,
        index=error.index,
        errors=list(error.errors) if isinstance(error, InvalidBody) else None,
        request_id=request_id,
    )


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Render a problem. Nulls are left out, and a retry hint is added where a retry helps."""
    hints = {"retry-after": str(_RETRY_AFTER_S[problem.status])} if problem.status in _RETRY_AFTER_S else {}
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status_code=problem.status, media_type=MEDIA_TYPE, headers={**hints, **(headers or {})})


def field_errors(errors: Sequence[Mapping[str, Any]]) -> list[FieldError]:
    """Translate pydantic's error list. An `InvalidRequest` raised by a dataclass names its own field."""
    out = []
    for error in errors[:MAX_ERRORS]:
        loc = [part for part in error["loc"] if part not in ("body", "query", "path", "header")]
        cause = (error.get("ctx") or {}).get("error")
        message = str(error["msg"])
        if isinstance(cause, InvalidRequest):
            loc += [cause.param] if cause.param and cause.param not in loc else []
            message = cause.message
        elif error["type"] == "extra_forbidden":
            message = "there is no such field"
        index = next((part for part in loc if isinstance(part, int)), None) if error["type"] != "json_invalid" else None
        field = ".".join(str(part) for part in loc if isinstance(part, str)) or None
        out.append(FieldError(index=index, field=field, message=message))
    return out


def invalid_body(error: ValidationError) -> InvalidBody:
    """Return the exception that carries pydantic's findings about a body."""
    # include_input=False: a 200 MB body must not be quoted, and a prompt doesn't belong into an error.
    errors = error.errors(include_url=False, include_input=False)
    return InvalidBody(field_errors(errors), total=len(errors))


def install(app: FastAPI) -> None:
    """Register the handlers on `app`."""
    app.add_exception_handler(HeadraceError, _on_headrace_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def _respond(request: Request, error: HeadraceError, headers: Mapping[str, str] | None = None) -> Response:
    request_id, path = request.scope.get("headrace.request_id"), request.url.path
    is_openais = path.startswith("/v1/files") or _OPENAIS in request.scope
    status = HTTPStatus.BAD_REQUEST if is_openais and error.status == HTTPStatus.UNPROCESSABLE_ENTITY else error.status
    return problem_response(problem_of(error, request_id=request_id, instance=path, status=status), headers)


async def _on_headrace_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        # Otherwise the server goes on reading to the end of the body, to find the next request behind it.
        headers["connection"] = "close"
    if error.status == HTTPStatus.CONFLICT:
        # OpenAI's client sends a 409 again unless it is told not to; a batch that is over stays over.
        headers["x-should-retry"] = "true" if isinstance(error, NotStored) else "false"
    if error.status >= SERVER_FAULT:
        log.warning(
            "request failed; the caller was told to try again: %s",
            error.message,
            extra={"event": "request_failed", "code": error.code, "request_id": request.scope.get("headrace.request_id")},
        )
    return _respond(request, error, headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    return _respond(request, InvalidBody(field_errors(found), total=len(found)))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the framework raises itself: no such path, no such method, a body of the wrong type."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _respond(request, NotFound(f"There is nothing at {request.url.path}; /docs lists the operations"))
    phrase = HTTPStatus(error.status_code).phrase
    plain = error.detail == phrase
    detail = f"{request.url.path} doesn't take {request.method}; the Allow header says what it takes" if plain else error.detail
    problem = Problem(
        type="about:blank",
        title=phrase,
        status=error.status_code,
        detail=detail,
        message=detail,
        instance=request.url.path,
        code=re.sub(r"\W+", "_", phrase.lower()),
        request_id=request.scope.get("headrace.request_id"),
    )
    return problem_response(problem, error.headers)


def _title(code: str) -> str:
    return code.replace("_", " ").capitalize()
