"""The soak for as long as asked: small batches in a steady stream through the whole service, judged at the end.

    python tests/chaos/soak.py --minutes 60 [--database sqlite] [--seed 7] [--record]

Prints a line a minute (rows, chunk p99, and for the API, the worker and the engine memory, files and threads) and at the end one JSON
line with the slopes; exit status 1 when something grew. Ctrl-C ends it early, and what it saw until then is judged. `--record` appends that line to benchmarks/results/faults.jsonl.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import fault_16_soak  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    enough = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: enough.set())
    started = time.monotonic()
    try:
        counts = fault_16_soak.soak(
            minutes=asked.minutes,
            seed=asked.seed,
            say=lambda line: print(line, flush=True),
            database=asked.database,
            enough=enough,
        )
    except AssertionError as error:
        print(f"seed {asked.seed}: {error}", flush=True)
        return 1
    line = json.dumps(
        {
            "fault": "16", "title": fault_16_soak.TITLE, "long": counts["minutes"] >= 59, "database": asked.database, "seed": asked.seed,
            **counts, "seconds": round(time.monotonic() - started, 1), "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
        }
    )  # fmt: skip
    print(line, flush=True)
    if asked.record:
        with (ROOT / "benchmarks" / "results" / "faults.jsonl").open("a") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
