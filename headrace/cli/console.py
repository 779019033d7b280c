"""What people see: messages and progress on stderr, results on stdout, so that a pipe gets results alone.

On a terminal progress is a bar; elsewhere it is a line every few seconds, so that a log shows that work goes on.
This module knows neither batches nor jobs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S = 5.0


def say(text: str) -> None:
    """Print a message for people."""
    print(text, file=sys.stderr, flush=True)


def out(text: str) -> None:
    """Print a result."""
    print(text, flush=True)


def out_json(value: Any) -> None:
    """Print a result for machines: one JSON document on one line."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


class Progress:
    """Counts towards a total. `update` may be called as often as one likes."""

    def __init__(self, label: str, total: int, *, bar: RichProgress | None) -> None:
        self._label = label
        self._total = total
        self._bar = bar
        self._task: TaskID | None = None if bar is None else bar.add_task(label, total=total, note="")
        self._last_line = time.monotonic()
        # The last (done, note) that was shown.
        self._shown: tuple[int, str] | None = None

    def update(self, done: int, *, total: int | None = None, note: str = "") -> None:
        """Show that `done` of the total (which is often known only now) are done, with a short note such as a rate."""
        self._total = self._total if total is None else total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
            return
        now = time.monotonic()
        if (done, note) != self._shown and (now - self._last_line >= LINE_EVERY_S or done >= self._total):
            say(f"{self._label}: {done}/{self._total}{f' · {note}' if note else ''}")
            self._shown, self._last_line = (done, note), now


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Show progress while the block runs."""
    if not sys.stderr.isatty():
        yield Progress(label, total, bar=None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    # No markup: rich takes what stands in brackets, such as a part of a file's name, for a style.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield Progress(label, total, bar=bar)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return columns of text, each as wide as its widest cell."""
    cells = [list(map(str, headings)), *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def seconds(value: float | None) -> str:
    """Return a duration for people: '3.2 s', '4 min 5 s', '2 h 3 min'."""
    if value is None:
        return "?"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(value: float) -> str:
    """Return a Unix time as this machine's clock shows it, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))


def shorten(text: str, width: int = 100) -> str:
    """Return a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
