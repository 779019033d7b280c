"""Puts many rows through a store and reports by how much this process grew: `store_flood.py URL ROWS CHARS`."""

from __future__ import annotations

import json
import resource
import sys

from store_driver import answer, send, submit

from headrace.config import GenerationConfig
from headrace.store import Store


def main(url: str, rows: int, chars: int) -> None:
    filler = "x" * chars
    with Store(url) as store:
        store.cancel_batch(submit(store, 600, model="warm-up").id)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batch = store.create_batch((f"{i} {filler}" for i in range(rows)), GenerationConfig(), model="m", chunk_size=256)
        for ref in send(store, limit=rows):
            claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
            assert claim is not None
            store.record(claim, [answer(item.index, filler) for item in store.pending(claim)])
            assert store.finish_chunk(claim)
        in_order = sum(item.index == i for i, item in enumerate(store.stream_results(batch.id)))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"rows": in_order, "grown_mb": grown / 1024}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
