"""One rank as a child process: started by exec, spoken to over its stdin and stdout, its stderr kept and passed on.

By exec and never by fork or `multiprocessing`: the user's script is not imported again (no `if __name__ == "__main__"` needed), no
start method is set, daemonic processes may do it, and no CUDA context is inherited. This module doesn't know what a rank computes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.protocol import FrameReader, Message, encode

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: rooms are packages in it."""
# -P: the directory the user stands in must not shadow our modules (an `engine.py` of theirs would be started instead).
COMMAND = (sys.executable, "-P", "-m", "engine.rank")
_TAIL_LINES = 40
_READ_SIZE = 1 << 18
_LONGEST_LINE = 1 << 14


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), env.get("PYTHONPATH", "")) if part)
    # Spinning OpenMP threads on a machine with other work cost a factor of ten; it is read when torch is imported.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and oneDNN keep a compiled product of 250 KiB for each of the last 1024 shapes. `engine.layers.matrix` asks for 48 row counts up
    # to 8192, five shapes each; whatever else asks for more must not take a gigabyte.
    env.setdefault("LRU_CACHE_CAPACITY", "256")
    env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # Ranks share memory, never through NVLink multicast: sums don't need it, and it can be broken for a whole host by one program.
    env.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # All ranks are on this host. Left to themselves gloo listens where the host's name points to and NCCL on the first network card, where
    # others could reach them, and neither asks for a password.
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env.setdefault("NCCL_SOCKET_IFNAME", "=lo")
    env["PYTHONUNBUFFERED"] = "1"
    return env


class RankProcess:
    """A running rank. `send` may be called by any thread; the rest belongs to the supervisor's thread."""

    def __init__(self, rank: int, command: Sequence[str] | None = None) -> None:
        """Start the process; raise `OSError` where it can't be started."""
        self.rank = rank
        # A session of its own: Ctrl-C in a terminal reaches the parent only, and whatever the rank starts dies with its group.
        self._popen = subprocess.Popen(  # noqa: S603  # the command is ours or a test's
            list(command or COMMAND),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self.stdout = self._popen.stdout.fileno()
        self.stderr = self._popen.stderr.fileno()
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        self._frames = FrameReader()
        # At most so many lines, and none of them longer than what is read at once.
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._line = b""
        # A thread writes: a long prompt fills the pipe while the rank computes, and the supervisor must go on reading.
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name=f"headrace-rank{rank}-writer", daemon=True)
        self._writer.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def send(self, message: Message) -> None:
        """Hand a message over for writing; never blocks, and a dead rank swallows it."""
        self._outbox.put(encode(message))

    def _write(self) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the rank died: its supervisor notices by itself
            while (frame := self._outbox.get()) is not None:
                view = memoryview(frame)
                while view:
                    view = view[self._popen.stdin.write(view) :]

    def read(self) -> Iterable[Message] | None:
        """Read what is there; None at end of file."""
        try:
            return self._frames.read(self.stdout)
        except BlockingIOError:
            return ()

    def read_stderr(self) -> bool:
        """Pass lines on to the log and keep the last ones; False at end of file."""
        try:
            data = os.read(self.stderr, _READ_SIZE)
        except BlockingIOError:
            return True
        *lines, self._line = (self._line + data).split(b"\n")
        # At the end, and where no end of the line comes: a library that draws with \r for hours must not fill this process's memory.
        if self._line and (not data or len(self._line) > _LONGEST_LINE):
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._relay(text)
        return bool(data)

    def _relay(self, line: str) -> None:
        """Pass one line on: a record of the rank's log at its level, anything else (a traceback, a library) as information."""
        level, event, message = logging.INFO, "rank_stderr", line
        if line.startswith("{"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                level, event = logging.getLevelNamesMapping()[row["level"]], row["event"] or event
                message = "\n".join(filter(None, (row["message"], row.get("exception"))))
        self._tail.append(message)
        log.log(level, "rank %d: %s", self.rank, message, extra={"event": event, "rank": self.rank})

    @property
    def stderr_tail(self) -> str:
        """The last lines of stderr."""
        return "\n".join(self._tail)

    def returncode(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._popen.poll()

    def kill(self) -> None:
        """Kill the process and whatever it started; return when it is reaped and its pipes are closed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        try:
            self._popen.wait(timeout=30)
        except subprocess.TimeoutExpired:  # in an uninterruptible driver call: the kernel reaps it when that returns
            log.exception("A killed engine process doesn't go; its device memory stays in use.", extra={"event": "rank_stuck"})
        self._outbox.put(None)
        self._writer.join(timeout=5)
        # Not select.select(): it takes no descriptor from 1024 on, which a server with many clients hands out.
        news = select.poll()
        news.register(self.stderr, select.POLLIN)
        while news.poll(0) and self.read_stderr():
            pass
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
