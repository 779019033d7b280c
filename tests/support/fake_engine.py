"""A stand-in for `engine.rank` that computes nothing: for tests of what happens around an engine process.

It answers a prompt with its own tokens after `FAKE_DELAY_S`, and with `FAKE_BROKEN` dies of every prompt. What a prompt does besides is said by one of its `stop_token_ids`.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from pathlib import Path

from engine.protocol import Abort, AskReport, Close, Failed, Outputs, Ready, Report, Start, Submit
from engine.rank import ParentPipe
from engine.request import TokenOutput, TokenRequest
from headrace.completion import CompletionError

POISON, HANG, RAISE, SLOW, LATE = 301, 302, 303, 304, 305
"""Kills the engine; makes it hang; makes it report a failure; is answered after ten seconds; kills it where its end would come."""


def _is_begun(request: TokenRequest) -> bool:
    return request.stream and request.max_new_tokens > 1


def _begin(request: TokenRequest) -> TokenOutput:
    """The first token of a stream, which comes at once."""
    return TokenOutput(request_id=request.request_id, token_ids=request.prompt_ids[:1])


def _answer(request: TokenRequest) -> TokenOutput:
    tokens = request.prompt_ids[int(_is_begun(request)) : request.max_new_tokens]
    return TokenOutput(request_id=request.request_id, token_ids=tokens, finish_reason="length", stop_detail=request.limit)


def _aborted(request_id: str) -> TokenOutput:
    """What an engine says when it has let go of a request."""
    return TokenOutput(
        request_id=request_id, token_ids=(), finish_reason="abort", error=CompletionError(code="aborted", message="")
    )


def _start(pipe: ParentPipe) -> None:
    start = next(pipe.take(wait=True))
    assert isinstance(start, Start)
    log = os.environ.get("FAKE_STARTS")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
    starts = len(Path(log).read_text().split()) if log else 1
    how = os.environ.get("FAKE_START", "")
    if how == "refuse":
        pipe.send(Failed("model_load_error", "no weights here", "model_path"))
        sys.exit(1)
    if how == "crash" or (how == "crash_again" and starts > 1):
        sys.stderr.write("the driver is broken\n")
        sys.stderr.flush()
        os._exit(7)
    pipe.send(Ready(start.options["session_len"], {"device": "none"}))


def main() -> None:
    """Serve until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = ParentPipe()
    _start(pipe)
    delay = float(os.environ.get("FAKE_DELAY_S", "0"))
    waiting: dict[str, tuple[float, TokenRequest]] = {}
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()
    while True:
        for message in pipe.take(wait=not waiting):
            match message:
                case Submit(requests):
                    for request in requests:
                        seen.put(1)
                        if POISON in request.stop_ids:
                            time.sleep(0.05)
                            os.kill(os.getpid(), signal.SIGKILL)
                        if HANG in request.stop_ids:
                            time.sleep(3600)
                        if RAISE in request.stop_ids:
                            pipe.send(Failed("numerical_error", "the device said no"))
                            sys.exit(1)
                        if os.environ.get("FAKE_BROKEN"):
                            os._exit(9)
                        if _is_begun(request):
                            pipe.send(Outputs((_begin(request),)))
                        waiting[request.request_id] = (time.monotonic() + (10 if SLOW in request.stop_ids else delay), request)
                case Abort(request_ids):
                    ended = [request_id for request_id in request_ids if waiting.pop(request_id, None) is not None]
                    pipe.send(Outputs(tuple(_aborted(request_id) for request_id in ended)))
                case AskReport(number):
                    pipe.send(Report(number, {"seen": seen.qsize()}))
                case Close():
                    return
        now = time.monotonic()
        due = [request for at, request in waiting.values() if at <= now]
        for request in due:
            if LATE in request.stop_ids:
                os.kill(os.getpid(), signal.SIGKILL)
            del waiting[request.request_id]
        if due:
            pipe.send(Outputs(tuple(_answer(request) for request in due)))
        elif waiting:
            time.sleep(0.005)


if __name__ == "__main__":
    main()
