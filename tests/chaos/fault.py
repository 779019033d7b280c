"""One fault test at a time: what breaks, how often, and what must hold is in tests/support/fault_NN_*.py.

    python tests/chaos/fault.py --list
    python tests/chaos/fault.py 01 09 --long [--seed S] [--record]

Prints one JSON line with the counts of each; exit status 1 when a promise was broken. `--long` is the size of the record and takes
minutes, without it each takes seconds. `--record` appends the line to benchmarks/results/faults.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: its kernels.py must not stand before the package

import ledger  # noqa: E402
from fault_ground import discover, load  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", metavar="NN", help="two digits, or `all`")
    parser.add_argument("--list", action="store_true", help="name the fault tests there are")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    known = discover()
    numbers = list(known) if asked.numbers == ["all"] else asked.numbers
    if unknown := [number for number in numbers if number not in known]:
        parser.error(f"there is no fault test {', '.join(unknown)}; there are {', '.join(known)}")
    if asked.list or not numbers:
        for number in known:
            print(number, load(number).TITLE)
        return 0
    results = [run_one(number, long=asked.long, seed=asked.seed, record=asked.record) for number in numbers]
    return 0 if all(results) else 1


def run_one(number: str, *, long: bool, seed: int, record: bool) -> bool:
    """Run one fault test, print its line and, when its promise held, record it."""
    module = load(number)
    print(f"{number} {module.TITLE}, seed {seed}{', long' if long else ''}", flush=True)
    load_before, started = ledger.load(), time.monotonic()
    try:
        counts: dict[str, Any] = module.run(long=long, seed=seed, say=say)
    except Exception:  # one broken promise must not hide the others
        traceback.print_exc()
        print(json.dumps({"fault": number, "title": module.TITLE, "long": long, "seed": seed, "held": False}), flush=True)
        return False
    about = {"fault": number, "title": module.TITLE, "long": long, "seed": seed}
    took = {"seconds": round(time.monotonic() - started, 1)}
    ledger.keep("faults", about | counts | took | ledger.host(load_before), append=record)
    return True


def say(line: str) -> None:
    print(f"{time.strftime('%X')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
