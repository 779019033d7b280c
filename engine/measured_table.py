"""Tables of what was timed on a machine, kept in files under $HEADRACE_HOME (or ~/.cache/headrace) so that engines choose alike.

Two ways through a step can round differently: whoever times anew at every start computes other tokens at every start. In a
tensor-parallel group rank 0's table counts for all. Knows nothing of what was timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.parallel import ParallelGroup

Rows = Mapping[str, Mapping[str, float]]
"""Times by row and column."""
_lock = threading.Lock()


def home() -> Path:
    """Return the user's folder for what outlives an engine."""
    return Path(os.environ.get("HEADRACE_HOME") or "~/.cache/headrace").expanduser()


def read(path: Path, key: str) -> dict[str, dict[str, float]]:
    """Read the rows that the table holds under `key`; nothing where it is missing or no table."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[key]
        return {str(row): {str(column): float(time) for column, time in of.items()} for row, of in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(path: Path, key: str, rows: Rows) -> None:
    """Add to the table, in one rename. A table that can't be written is measured again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        table: dict[str, object] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            table = found if isinstance(found, dict) else {}
        table[key] = {row: {column: round(time, 2) for column, time in of.items()} for row, of in rows.items()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(table, file, indent=1)
        Path(file.name).replace(path)


def read_or_measure(
    group: ParallelGroup, path: Path, key: str, rows: Sequence[str], columns: Sequence[str], measure: Callable[[], Rows]
) -> Rows:
    """Give every one of `rows` and `columns`, the same on every rank of `group`; `measure` is called on all ranks or on none."""
    with _lock:
        found = read(path, key) if group.rank == 0 else {}
        known = all(column in found.get(row, {}) for row in rows for column in columns)
        # A rank that looked for itself could read while rank 0 writes, and measure alone what takes all of them.
        if not group.agreed([float(known)])[0]:
            found = {row: dict(of) for row, of in measure().items()}
        cells = [(row, column) for row in rows for column in columns]
        times = group.agreed([found.get(row, {}).get(column, 0.0) for row, column in cells])
        table: dict[str, dict[str, float]] = {row: {} for row in rows}
        for (row, column), time in zip(cells, times, strict=True):
            table[row][column] = time
        if group.rank == 0 and not known:
            write(path, key, table)
    return table
