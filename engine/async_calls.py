"""Calls from inside an event loop: one prompt's stream, and a call's answers, neither of which holds a thread while it waits.

A loop's thread pool has few places, and the loop waits for all of them before it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from engine.answers import Delta, piece_of
from engine.frontend import Frontend
from engine.sessions import RunningSessions
from headrace.completion import Completion
from headrace.config import GenerationConfig
from headrace.response import Response

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


async def infer(frontend: Frontend, pairs: Iterator[tuple[Any, GenerationConfig]], *, do_preprocess: bool) -> list[Response]:
    """Answer all prompts, in their order; what isn't answered when this ends early is aborted.

    Prompts are drawn and prepared in the loop's thread pool, a window of them at a time, and nobody waits there: calls may be thousands.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Queue[Completion] = asyncio.Queue()
    waiting = enumerate(pairs)
    handles: dict[int, int] = {}
    responses: list[Response] = []
    is_over = threading.Event()

    def put(completion: Completion) -> None:
        with suppress(RuntimeError):  # the loop was closed, with nobody left to read
            loop.call_soon_threadsafe(done.put_nowait, completion)

    def submit(count: int) -> bool:
        """Submit so many; say whether there are more. What is submitted behind the end is aborted here, where its handle is known."""
        for index, (prompt, config) in islice(waiting, count):
            handle = frontend.submit(prompt, config, put, index=index, do_preprocess=do_preprocess)
            handles[index] = handle
            if is_over.is_set():
                frontend.abort(handle)
                return False
            count -= 1
        return count == 0

    has_more = True
    try:
        while has_more or handles:
            if has_more and len(handles) <= frontend.window:
                has_more = await asyncio.to_thread(submit, 2 * frontend.window - len(handles))
                continue
            completion = await done.get()
            del handles[completion.index]
            responses.append(Response.of(completion))
    finally:
        is_over.set()
        for handle in list(handles.values()):
            frontend.abort(handle)
    return sorted(responses, key=lambda response: response.index)
