"""The line that is left of a measurement: one JSON object in benchmarks/results/.

Knows nothing of what was measured, and imports only the standard library: a test of the service writes one on a machine without torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def commit() -> str:
    """Short hash of the checkout; `unknown` where there is no git to ask, as on a machine that was sent the files alone."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607  # git, with words of our own
    return asked.stdout.strip() or "unknown"


def load() -> float:
    """Runnable processes of the last minute. Taken before a measurement: beside other work every figure is a lower bound."""
    return round(os.getloadavg()[0], 1)


def host(load_before: float) -> dict[str, Any]:
    """Say which machine without a GPU it was, and how busy before."""
    return {"device": f"{os.cpu_count()} CPU {platform.machine()}", "load_before": load_before}


def keep(results: str | Path, fields: dict[str, Any], *, append: bool = True, at_commit: str | None = None) -> None:
    """Print `fields` with date and commit as a line of JSON, and append it to benchmarks/results/<results>.jsonl or to that path."""
    stamp = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": at_commit or commit()}
    line = json.dumps(fields | stamp)
    print(line, flush=True)
    if not append:
        return
    path = results if isinstance(results, Path) else RESULTS / f"{results}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
