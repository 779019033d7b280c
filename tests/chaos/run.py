"""The long form of the chaos test: a storm of random faults over many prompts.

    python tests/chaos/run.py --faults 200 --prompts 20000 --seed 1 [--database sqlite] [--record]
    python tests/chaos/run.py --engine tiny --workers 2 --faults 40 --prompts 4000 --gap-s 3 --seed 1

Prints each fault as it falls and one JSON line with the counts; exit status 1 when a row was lost, doubled or differs. The folder
with every process's log stays behind then. `--record` appends the line to benchmarks/results/chaos.jsonl.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: its kernels.py must not stand before the package

import ledger  # noqa: E402
from chaos import Storm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument(
        "--engine", choices=("echo", "tiny"), default="echo", help="tiny: the real engine, whose process is killed too"
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--pause-s", type=float, default=1.0)
    parser.add_argument("--gap-s", type=float, default=1.0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    load = ledger.load()
    folder = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    folder.chmod(0o711)  # PostgreSQL may run as another user
    print(f"seed {asked.seed}, logs in {folder}", flush=True)
    with Storm(
        folder, database=asked.database, seed=asked.seed, workers=asked.workers, pause_s=asked.pause_s, engine=asked.engine
    ) as storm:
        try:
            counts = storm.run(prompts=asked.prompts, faults=asked.faults, batch_size=asked.batch_size, gap_s=asked.gap_s)
        except AssertionError as error:
            print(f"seed {asked.seed}: {error}\nlogs: {folder}", flush=True)
            return 1
    about = {"workload": f"{asked.prompts} prompts, {asked.faults} faults"}
    ledger.keep("chaos", about | counts | ledger.host(load), append=asked.record)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
