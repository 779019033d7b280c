"""One child process of the embedded stack: started in a group of its own, watched, its log kept, its whole group stopped.

What the child does is not known here, and neither is the order in which children start and stop: `headrace.stack` has both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.errors import HeadraceError


class StackError(HeadraceError):
    """A process of the embedded stack did not come up; its log says why."""

    code = "stack_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """How one child is started, known to be ready, and stopped."""

    name: str
    command: Sequence[str]
    log: Path
    is_ready: Callable[[], bool]
    """Asked a few times a second while the child starts; must not block for longer than about a second."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    cwd: Path = Path()
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    """After SIGTERM the child has so long; then its group is killed."""


class Child:
    """A running (or stopped, or dead) process of a `ChildSpec`."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        # Set by start(); None before the first start and after stop().
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it is started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, its output appended to the log. Raise `StackError` when it can't even be executed."""
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log.open("ab") as log:
            try:
                # A session of its own: Ctrl-C in the terminal reaches this process only, which then stops the children in order.
                self._process = subprocess.Popen(  # noqa: S603  # the commands are ours
                    list(self.spec.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.spec.cwd,
                    env={**os.environ, **self.spec.environ},
                    start_new_session=True,
                )
            except OSError as error:
                raise StackError(f"{self.spec.name} can't be started: {error}") from error

    def exit_status(self) -> int | None:
        """Return the exit status (negative: the signal that ended it), None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, *, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Wait until the child says that it is ready. Raise `StackError` with its log's tail when it dies or takes too long."""
        deadline = time.monotonic() + self.spec.start_timeout_s
        while not self.spec.is_ready():
            if not self.is_alive:
                raise StackError(f"{self.spec.name} ended with status {self.exit_status()} while starting.\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.spec.name} was not ready after {self.spec.start_timeout_s:.0f} s.\n{self.log_tail()}")
            if interrupted():
                raise KeyboardInterrupt
            time.sleep(0.1)

    def wait_done(self) -> None:
        """Wait for a child that is to end by itself. Raise `StackError` with its log's tail when it fails or takes too long."""
        assert self._process is not None, "wait_done before start"
        try:
            status = self._process.wait(self.spec.start_timeout_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise StackError(
                f"{self.spec.name} did not end within {self.spec.start_timeout_s:.0f} s.\n{self.log_tail()}"
            ) from None
        self._process = None
        if status:
            raise StackError(f"{self.spec.name} ended with status {status}.\n{self.log_tail()}")

    def stop(self) -> None:
        """Ask the child to end, then kill what is left of its group. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.spec.stop_timeout_s)
        kill_group(process.pid)
        process.wait()

    def log_tail(self, lines: int = 15) -> str:
        """Return the log's path and last lines."""
        return f"The end of {self.spec.log}:\n" + "\n".join(f"    {line}" for line in tail(self.spec.log, lines))


def tail(path: Path, lines: int) -> list[str]:
    """Return the last `lines` lines of a text file that may be large or missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def kill_group(pid: int) -> None:
    """Kill a process group that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def birth(pid: int) -> str | None:
    """Return what tells this process from a later one with the same id; None when it is gone or /proc is not there."""
    try:
        # The command name in field 2 may hold spaces and parentheses: count fields after the last ')'.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
