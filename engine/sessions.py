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


class RunningSessions:
    """At most one request for each session id at a time."""

    def __init__(self, abort: Callable[[int], None]) -> None:
        """`abort` ends the request of a handle, and does nothing for one that is answered."""
        self._abort = abort
        self._lock = threading.Lock()
        self._handles: dict[int, int] = {}

    @contextmanager
    def run(self, session_id: int | None, submit: Callable[[], int]) -> Iterator[int]:
        """Submit, and hold the id until the block is left; what is unanswered then is aborted. None: no id is held.

        Raise `InvalidRequest` where a request already runs under the id.
        """
        with self._lock:  # submitted under the lock: a stop that comes now waits for the handle it is about
            if session_id in self._handles:
                raise InvalidRequest(
                    f"a request of session {session_id} is still running; wait for it or stop it", param="session_id"
                )
            handle = submit()
            if session_id is not None:
                self._handles[session_id] = handle
        try:
            yield handle
        finally:
            self._abort(handle)
            with self._lock:
                if session_id is not None:
                    del self._handles[session_id]

    def stop(self, session_id: int) -> None:
        """Abort what runs under the id; nothing where nothing does."""
        with self._lock:
            handle = self._handles.get(session_id)
        if handle is not None:
            self._abort(handle)
