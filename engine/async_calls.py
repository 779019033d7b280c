"""Calls from inside an event loop: one prompt's stream, and a call that blocks, run where it blocks nobody.

What a loop's own thread pool has few places for, and waits for before it ends, has a thread of its own here.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from engine.answers import Delta, piece_of
from engine.sessions import RunningSessions
from headrace.completion import Completion
from headrace.response import Response

Done = queue.SimpleQueue[Completion | None]
"""Answers as they come; None: nobody wants the rest."""
Submit = Callable[[Callable[[Completion], None], Callable[[Delta], None]], int]
"""Submits a request, given what to call with its completion and with each delta; gives its handle."""


async def stream(running: RunningSessions, submit: Submit, session_id: int | None) -> AsyncIterator[Response]:
    """Give one request's pieces; leaving early aborts it. Its session is free again when its end is read."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Response | None] = asyncio.Queue()

    def put(piece: Response | None) -> None:
        with suppress(RuntimeError):  # the loop was closed, with nobody left to read
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    def finish(completion: Completion) -> None:
        if completion.error is not None:
            put(Response.of(completion))
        put(None)

    def start() -> int:
        return submit(finish, lambda delta: put(piece_of(delta)))

    key = None if session_id is None else ("generate", session_id)
    ends: list[Response] = []
    with ExitStack() as stack:
        entering = loop.run_in_executor(None, stack.enter_context, running.run(key, start))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:  # the thread goes on: what it submits would run, and hold its id, for nobody
            entering.add_done_callback(lambda _: stack.close())
            raise
        while (piece := await pieces.get()) is not None:
            own = piece if session_id is None else replace(piece, session_id=session_id)
            # A reader may leave at a `finish_reason`: what ends a choice is given when the request is over and its session free.
            if own.finish_reason is not None:
                ends.append(own)
            else:
                yield own
    for end in ends:
        yield end


async def in_thread(call: Callable[[Done], Any]) -> Any:
    """Return what `call` returns, from a thread of its own. Cancelled, it puts None into the queue that `call` was given."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()
    done: Done = queue.SimpleQueue()

    def settle(settled: Callable[[Any], None], value: Any) -> None:
        def tell() -> None:
            if not answer.done():
                settled(value)

        with suppress(RuntimeError):  # the loop was closed, with nobody left to be told
            loop.call_soon_threadsafe(tell)

    def work() -> None:
        try:
            value = call(done)
        except BaseException as error:
            settle(answer.set_exception, error)
        else:
            settle(answer.set_result, value)

    threading.Thread(target=work, name="headrace-call", daemon=True).start()
    try:
        return await answer
    except asyncio.CancelledError:
        done.put(None)
        raise
