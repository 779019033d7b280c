"""Two plain ASGI wrappers: a request id on everything with a last resort for what nobody caught, and a bound on request bodies.

They know no route and no store. They are ASGI classes and not `@app.middleware` functions because those would buffer streams.
"""

from __future__ import annotations

import logging
import re
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_of, problem_response
from headrace.errors import HeadersTooLarge, HeadraceError, PayloadTooLarge

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Gives every response an `x-request-id` (the caller's own where it is a plain one) and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope["headrace.request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info(
                "the caller left in the middle of its request; nothing was stored",
                extra={"event": "caller_left", "request_id": request_id},
            )
        except Exception as error:
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
            if started:
                # The only way to tell a client that a stream is not whole is to cut the connection.
                log.warning(
                    "stream cut short by %s; the client resumes it with ?after=",
                    type(error).__name__,
                    extra={"event": "stream_cut", **fields},
                )
                raise
            log.exception(
                "unexpected error; the caller got a 500 with this request id", extra={"event": "request_crashed", **fields}
            )
            problem = problem_of(HeadraceError(), request_id=request_id, instance=scope["path"])
            await problem_response(problem)(scope, receive, send_with_id)


MAX_HEADER_BYTES: Final = 32 * 1024
"""Names and values of all headers of a request. The server reads 64 KiB before it gives up by itself, without a word of ours."""


FORM_BYTES: Final = 64 * 1024
"""What a form may have around the file in it."""


class BodyLimit:
    """Refuses large headers, and a body above `max_bytes`: by its Content-Length before a byte is read, else when so much has arrived.

    An upload to /v1/files is stored as it arrives: its body may have `max_file_bytes`.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_file_bytes: int) -> None:
        self.app = app
        self._body = (
            max_bytes,
            f"accepts {max_bytes:,} bytes (HEADRACE_MAX_BODY_BYTES). Split the batch, or upload it as a file.",
        )
        file_rule = f"accepts files of {max_file_bytes:,} bytes (HEADRACE_MAX_FILE_BYTES). Split the file."
        self._file = (max_file_bytes + FORM_BYTES, file_rule)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            await self._refuse(HeadersTooLarge(), scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        most, rule = self._file if scope["path"] == "/v1/files" else self._body
        if length.isascii() and length.isdigit() and int(length) > most:
            await self._refuse(_too_large(f"{int(length):,} bytes", rule), scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:
                raise _too_large("more", rule)
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, error: HeadraceError, scope: Scope, receive: Receive, send: Send) -> None:
        problem = problem_of(error, request_id=scope.get("headrace.request_id"), instance=scope["path"])
        # The unread body makes this connection useless for another request.
        await problem_response(problem, {"connection": "close"})(scope, receive, send)


def _too_large(size: str, rule: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body has {size}; this server {rule}")
