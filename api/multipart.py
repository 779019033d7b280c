"""multipart/form-data as it arrives: a parser that holds no more than a header and a few bytes, whatever the size of a file.

Fed with pieces of any size, it says what they hold: a part begins, some of its content, the part ends. Knows no field by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from enum import Enum
from typing import Final

from headrace.errors import InvalidRequest

MAX_HEADER_BYTES: Final = 16 * 1024
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{1,70}")


@dataclass(frozen=True, slots=True)
class PartBegins:
    """The headers of a part are there."""

    name: str
    filename: str | None
    """Set for a file."""


@dataclass(frozen=True, slots=True)
class PartData:
    """Some of the content of the part that began last."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnds:
    """The part that began last is whole."""


Event = PartBegins | PartData | PartEnds


class _State(Enum):
    PREAMBLE = "preamble"
    DELIMITER = "delimiter"
    HEADERS = "headers"
    BODY = "body"
    END = "end"


def boundary_of(content_type: str) -> str:
    """Return the boundary that a Content-Type names. Raises `InvalidRequest`."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not _BOUNDARY.fullmatch(boundary):
        raise InvalidRequest("Content-Type must be multipart/form-data with a boundary of 1 to 70 plain characters")
    return boundary


class FormParser:
    """Parses one body. Raises `InvalidRequest` for what is no multipart/form-data."""

    def __init__(self, boundary: str) -> None:
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        # So that the first delimiter, which has no line before it, is found as the others are.
        self._buffer = bytearray(b"\r\n")
        self._state = _State.PREAMBLE

    def feed(self, data: bytes) -> Iterator[Event]:
        """Take the next piece and yield what it completes."""
        self._buffer += data
        while (step := self._step()) is not None:
            yield from step

    def close(self) -> None:
        """Say that the body is over. Raises when its last delimiter didn't come."""
        if self._state is not _State.END:
            raise InvalidRequest("the form ends in the middle: its closing boundary is missing")

    def _step(self) -> list[Event] | None:
        """Do one thing and return what came of it; None: more bytes are needed."""
        if self._state in (_State.PREAMBLE, _State.BODY):
            return self._content()
        if self._state is _State.DELIMITER:
            return self._after_delimiter()
        if self._state is _State.HEADERS:
            return self._headers()
        self._buffer.clear()  # an epilogue is nothing
        return None

    def _content(self) -> list[Event] | None:
        is_body, place = self._state is _State.BODY, self._buffer.find(self._delimiter)
        if place < 0:
            # The end may be the beginning of a delimiter.
            count = len(self._buffer) - len(self._delimiter) + 1
            if count <= 0:
                return None
            data = bytes(self._buffer[:count])
            del self._buffer[:count]
            return [PartData(data)] if is_body else []
        data = bytes(self._buffer[:place])
        del self._buffer[: place + len(self._delimiter)]
        self._state = _State.DELIMITER
        if not is_body:
            return []
        return [PartData(data), PartEnds()] if data else [PartEnds()]

    def _after_delimiter(self) -> list[Event] | None:
        if len(self._buffer) < 2:
            return None
        mark = bytes(self._buffer[:2])
        del self._buffer[:2]
        if mark not in (b"--", b"\r\n"):
            raise InvalidRequest("a boundary of the form is followed by something that is no line end")
        self._state = _State.END if mark == b"--" else _State.HEADERS
        return []

    def _headers(self) -> list[Event] | None:
        place = self._buffer.find(b"\r\n\r\n")
        if place < 0 and len(self._buffer) <= MAX_HEADER_BYTES:
            return None
        if not 0 <= place <= MAX_HEADER_BYTES:
            raise InvalidRequest(f"the headers of a part of the form have more than {MAX_HEADER_BYTES} bytes")
        text = bytes(self._buffer[:place]).decode("utf-8", "replace")
        del self._buffer[: place + 4]
        self._state = _State.BODY
        header = message_from_string(text)
        name = header.get_param("name", header="content-disposition")
        if header.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise InvalidRequest("a part of the form has no name: Content-Disposition: form-data; name=...")
        return [PartBegins(name, header.get_filename())]
