"""Writers that know nothing of each other: `store_writers.py URL ROWS MODEL...` works each model's batches off in a thread of its own.

Every thread has its own store, so that it shares no lock with the others but the database's. Prints the longest transaction.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from store_driver import answer, submit, take

from headrace.store import Store


def write(url: str, model: str, rows: int) -> float:
    """Answer one batch row by row; return the seconds of the longest write."""
    longest = 0.0
    with Store(url) as store:
        batch = submit(store, rows, chunk_size=16, model=model)
        for claim in take(store, model=model, limit=rows):
            for index in range(claim.start, claim.stop):
                started = time.monotonic()
                assert store.record(claim, [answer(index)]).inserted == 1
                longest = max(longest, time.monotonic() - started)
            assert store.finish_chunk(claim)
        assert store.get_batch(batch.id).counts.completed == rows
    return longest


def main(url: str, rows: int, models: list[str]) -> None:
    with ThreadPoolExecutor(len(models)) as pool:
        longest = max(pool.map(lambda model: write(url, model, rows), models))
    print(json.dumps({"longest_write_s": round(longest, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
