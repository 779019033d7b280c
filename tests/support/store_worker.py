"""A worker without an engine, to be killed: `store_worker.py URL` works off batches, a few rows at a time, and never ends."""

from __future__ import annotations

import sys
import time

from store_driver import answer, send

from headrace.store import Store


def main(url: str) -> None:
    with Store(url) as store:
        print("ready", flush=True)
        while True:
            for ref in send(store, limit=2):
                claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=0.2)
                if claim is None:
                    continue
                rows = [answer(item.index) for item in store.pending(claim)]
                for start in range(0, len(rows), 3):
                    store.record(claim, rows[start : start + 3])
                store.finish_chunk(claim)
            store.expire_batches()
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
