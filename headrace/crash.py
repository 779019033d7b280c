"""Named points at which a process kills itself without a word, for tests of what a crash leaves behind. Off in every real service.

    HEADRACE_CRASH_AT=mid_finalize        at the first passage of the point
    HEADRACE_CRASH_AT=mid_finalize:3      at the third

A kill -9 from outside hits a window of microseconds once in a million times; these windows are where a row could be lost or doubled.
This module knows no store and no Celery: the points are calls of `crash_point` in the code that they are named after.
"""

from __future__ import annotations

import itertools
import os
import signal
from typing import Final

from headrace.errors import InvalidRequest

CRASH_POINTS: Final = (
    "before_send",  # a chunk is marked as sent in SQL, its message isn't in Redis
    "after_claim",  # the chunk is leased, nothing of it is in the engine
    "before_flush",  # answers are computed, nothing of the transaction that writes them is done
    "mid_flush",  # rows are written, their counters not, nothing is committed
    "after_flush_before_ack",  # every row is committed, the chunk isn't finished, the message isn't acknowledged
    "mid_finalize",  # the last chunk is closed and the batch not ended, nothing of it is committed
    "before_ack",  # the chunk is finished, the message isn't acknowledged
)

# Set by `arm`, once, as the process starts.
_armed: str = ""
_passages = itertools.count()


def check_crash_at(text: str) -> None:
    """Raise `InvalidRequest` unless `text` is empty, a point, or `point:passage` with a passage from 1."""
    point, colon, passage = text.partition(":")
    if text and (point not in CRASH_POINTS or (colon and (not passage.isdecimal() or int(passage) < 1))):
        message = (
            f"HEADRACE_CRASH_AT={text!r} must be one of {', '.join(CRASH_POINTS)}, or such a name with ':' and a number from 1"
        )
        raise InvalidRequest(message, param="HEADRACE_CRASH_AT")


def arm(text: str) -> None:
    """Let this process die at the point `text` (see above); empty: nowhere."""
    global _armed, _passages  # of the process, as the signal that it is for
    check_crash_at(text)
    point, _, passage = text.partition(":")
    _armed, _passages = point, itertools.count(2 - int(passage or 1))


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if it is armed to die here; else nothing."""
    if name == _armed and next(_passages) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
