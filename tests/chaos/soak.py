"""The soak for as long as asked: small batches in a steady stream through the whole service, judged at the end.

    python tests/chaos/soak.py --minutes 60 [--database sqlite] [--seed 7] [--record]

Prints a line a minute (rows, chunk p99, and for the API, the worker and the engine memory, files and threads) and at the end one JSON
line with the slopes; exit status 1 when something grew. Ctrl-C ends it early, and what it saw until then is judged. `--record` appends that line to benchmarks/results/faults.jsonl.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: its kernels.py must not stand before the package

import fault_16_soak  # noqa: E402
import ledger  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    enough = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: enough.set())
    load_before, started = ledger.load(), time.monotonic()
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
    about = {"fault": "16", "title": fault_16_soak.TITLE, "long": counts["minutes"] >= 59}
    about |= {"database": asked.database, "seed": asked.seed}
    took = {"seconds": round(time.monotonic() - started, 1)}
    ledger.keep("faults", about | counts | took | ledger.host(load_before), append=asked.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
