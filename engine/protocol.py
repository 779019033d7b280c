"""What a frontend and its engine processes say to each other: frozen messages as length-prefixed JSON frames on pipes.

A frame is four bytes (big-endian length) and a UTF-8 JSON array [type, fields]. No pickle: a frame can't run code.

    parent → rank    Start, then Submit | Abort | AskReport | Close                     end of file: the parent is gone
    rank → parent    Meeting? (rank 0 of several), Ready | Failed, then Outputs | Tick | Report | Failed

This module doesn't know processes, threads or what an engine is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.request import TokenOutput, TokenRequest
from headrace.completion import CompletionError, TokenLogprobs

_HEAD = 4
_MOST = 1 << 30  # a longer frame is a torn stream, not a message
_MOST_TOKENS = 1 << 22  # of the prompts of one message, unless one prompt has more: up to 11 bytes each
_READ_SIZE = 1 << 18


class ProtocolError(Exception):
    """The other side of the pipe wrote something that is no frame of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """First message to every rank; `rendezvous` ('host:port') is what rank 0 answered in `Meeting`, or ''."""

    options: dict[str, Any]
    rank: int
    size: int
    rendezvous: str
    log_level: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Requests to add, in this order."""

    requests: tuple[TokenRequest, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Requests that nobody waits for any more; unknown ids are ignored."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskReport:
    """Ask for a `Report` with the same number."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Free the device and exit."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Rank 0 listens at `rendezvous`: the other ranks may start."""

    rendezvous: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded. `facts` are for the report; the session length may be shorter than was asked for."""

    session_len: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """This rank can't go on and exits: `code` and `param` of the exception tree."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """News of requests."""

    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """A sign of life between two steps, at most one a second."""

    step: int


@dataclass(frozen=True, slots=True)
class Report:
    """The engine's counters at this moment."""

    number: int
    stats: dict[str, Any]


Message = Start | Submit | Abort | AskReport | Close | Meeting | Ready | Failed | Outputs | Tick | Report
_TYPES: dict[str, Any] = {
    cls.__name__: cls for cls in (Start, Submit, Abort, AskReport, Close, Meeting, Ready, Failed, Outputs, Tick, Report)
}


def submissions(requests: Iterable[TokenRequest]) -> Iterator[Submit]:
    """Give messages that together submit `requests`, in their order, each no longer than a frame may be.

    A window of 2048 choices of long prompts would be one: the other side would take it for a torn stream, and end.
    """
    part: list[TokenRequest] = []
    tokens = 0
    for request in requests:
        tokens += len(request.prompt_ids)
        if part and tokens > _MOST_TOKENS:
            yield Submit(tuple(part))
            part, tokens = [], len(request.prompt_ids)
        part.append(request)
    if part:
        yield Submit(tuple(part))


def encode(message: Message) -> bytes:
    """Return the message's frame."""
    data: Any
    if isinstance(message, Submit):
        data = {"requests": [_request_to_dict(request) for request in message.requests]}
    elif isinstance(message, Outputs):
        data = {"outputs": [_output_to_dict(output) for output in message.outputs]}
    else:
        data = asdict(message)
    body = json.dumps([type(message).__name__, data], separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    return len(body).to_bytes(_HEAD, "big") + body


def decode(body: bytes) -> Message:
    """Rebuild a message from a frame's body; raise `ProtocolError` for anything else."""
    try:
        name, data = json.loads(body.decode("utf-8", "surrogatepass"))
        if name == "Submit":
            return Submit(tuple(TokenRequest.from_dict(row) for row in data["requests"]))
        if name == "Outputs":
            return Outputs(tuple(_output_from_dict(row) for row in data["outputs"]))
        if name == "Abort":
            return Abort(tuple(data["request_ids"]))
        message: Message = _TYPES[name](**data)
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a message: {body[:80]!r} ({error})") from error
    return message


class FrameReader:
    """Cuts a byte stream into messages; the pieces may be torn anywhere."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._buffer = bytearray()
        # Read into, again and again. `os.read` allocates what it may read before it knows how little is there: 256 KiB in one piece
        # for every frame of a few hundred bytes. In the reading thread's malloc arena the small objects of messages lie scattered,
        # such a piece is seldom free between them, and the arena grew by a piece at a time: an engine by 10 MiB an hour.
        self._room = memoryview(bytearray(_READ_SIZE))

    def read(self, descriptor: int) -> Iterator[Message] | None:
        """Read once; give the messages that are complete now, None at the end of the file. Raise as `feed` and `os.readv` do."""
        count = os.readv(descriptor, [self._room])
        return self.feed(self._room[:count]) if count else None

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """Add bytes; give the messages that are complete now. Raise `ProtocolError` on a stream that is not ours."""
        self._buffer += data  # at once and not when the messages are asked for: the caller reads over `data`
        return self._cut()

    def _cut(self) -> Iterator[Message]:
        while len(self._buffer) >= _HEAD:
            size = int.from_bytes(self._buffer[:_HEAD], "big")
            if size > _MOST:
                raise ProtocolError(f"a frame of {size} bytes: something else writes to the pipe")
            if len(self._buffer) < _HEAD + size:
                return
            body = bytes(self._buffer[_HEAD : _HEAD + size])
            del self._buffer[: _HEAD + size]
            yield decode(body)


def _fields(value: Any) -> dict[str, Any]:
    """Return a slotted dataclass's fields without `asdict`'s deep copy, which costs milliseconds on a long prompt."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _request_to_dict(request: TokenRequest) -> dict[str, Any]:
    return {**_fields(request), "config": request.config.to_dict()}


def _output_to_dict(output: TokenOutput) -> dict[str, Any]:
    row = _fields(output)
    for name in ("logprobs", "prompt_logprobs"):
        positions = getattr(output, name)
        row[name] = None if positions is None else [(p.token_id, p.logprob, p.top) for p in positions]
    row["error"] = None if output.error is None else asdict(output.error)
    return row


def _output_from_dict(row: dict[str, Any]) -> TokenOutput:
    for name in ("logprobs", "prompt_logprobs"):
        if row[name] is not None:
            row[name] = tuple(_logprobs(*triple) for triple in row[name])
    error = row["error"]
    row.update(token_ids=tuple(row["token_ids"]), error=None if error is None else CompletionError(**error))
    return TokenOutput(**row)


def _logprobs(token_id: int, logprob: float, top: list[list[Any]]) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple((int(i), float(p)) for i, p in top))
