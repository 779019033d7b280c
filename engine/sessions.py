"""Conversations of several turns, and which request runs under which session id.

A session holds text only: each turn renders all of it, and the prefix cache does the rest. This module knows no engine: it is
given how to submit and how to abort.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from headrace.config import Message
from headrace.errors import InvalidRequest
from headrace.response import Response


@dataclass(slots=True, weakref_slot=True, eq=False)
class Session:
    """A conversation; `AsyncEngine.chat` adds its turns."""

    session_id: int
    """For `stop_session` and `end_session`."""
    history: list[tuple[str, str]] = field(default_factory=list)
    """(user, assistant) turns so far."""
    response: Response | None = None
    """The last turn's; one with an error didn't get into the history."""

    def messages(self, prompt: str) -> list[Message]:
        """Return the conversation with `prompt` as its next turn."""
        turns = [
            Message(role=role, content=text)
            for pair in self.history
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*turns, Message(role="user", content=prompt)]

    def keep(self, prompt: str, response: Response) -> None:
        """Note a turn's answer; one that failed leaves the conversation as it was, so that the turn can be tried again."""
        self.response = response
        if response.error_code is None:
            self.history.append((prompt, response.text))

    def close(self) -> None:
        """Forget the conversation."""
        self.history.clear()
        self.response = None


@dataclass(slots=True, eq=False)
class Run:
    """A request that holds a key."""

    handle: int | None = None
    """None while it is being submitted."""
    is_stopped: bool = False


Key = tuple[str, int]
"""Whose number it is ("chat", "generate"), and the number: a caller's own must not meet those that `chat` gave out."""


class RunningSessions:
    """At most one request for each session at a time."""

    def __init__(self, abort: Callable[[int], None]) -> None:
        """`abort` ends the request of a handle, and does nothing for one that is answered."""
        self._abort = abort
        # Re-entrant: the garbage collector may end an abandoned stream on the thread that holds it.
        self._lock = threading.RLock()
        self._runs: dict[Key, Run] = {}

    @contextmanager
    def run(self, key: Key | None, submit: Callable[[], int]) -> Iterator[Run]:
        """Submit, and hold the key until the block is left or it is stopped; what is unanswered then is aborted. None: no key is held.

        Raise `InvalidRequest` where a request already runs under the key.
        """
        run = Run()
        try:
            self._hold(key, run)
            # Not under the lock: preparing a long prompt takes seconds, in which others must be stopped, and streams may end.
            run.handle = submit()
            if run.is_stopped:
                self._abort(run.handle)
            yield run
        finally:
            if run.handle is not None:
                self._abort(run.handle)
            with self._lock:
                if key is not None and self._runs.get(key) is run:
                    del self._runs[key]

    def _hold(self, key: Key | None, run: Run) -> None:
        if key is None:
            return
        with self._lock:
            if key in self._runs:
                raise InvalidRequest(
                    f"a request of session {key[1]} is still running; wait for it or stop it", param="session_id"
                )
            self._runs[key] = run

    def stop(self, *keys: Key) -> None:
        """Abort what runs under the keys and free them; nothing where nothing runs."""
        with self._lock:
            runs = [run for key in keys if (run := self._runs.pop(key, None)) is not None]
        for run in runs:
            # In this order: what is submitted just now looks at the flag when it has its handle.
            run.is_stopped = True
            if run.handle is not None:
                self._abort(run.handle)
