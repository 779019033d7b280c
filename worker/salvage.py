"""What a worker that was killed in an outage has left on disk is recorded by the next one on its host, before that takes any chunk.

The claims in a spool may be void by now: their chunks may have been taken, answered, cancelled or deleted. An answer counts where its
prompt has none yet, whoever holds the chunk meanwhile; `Store.record_late` says why that is lawful. Writing one twice changes nothing,
so a worker that is killed while it salvages leaves the file to the next.

This module knows no engine and no Celery.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from headrace.store import Claim, Store
from worker.outage import HEALS, Outage
from worker.spool import Entry, Orphan, orphans, prepare

log = logging.getLogger(__name__)

ENTRIES_AT_ONCE: Final = 16
"""Lines of a spool in one transaction; a line holds the rows of one chunk that waited at one moment."""


def salvage(store: Store, folder: Path, outage: Outage) -> int:
    """Record what dead workers of this store have left in `folder`, waiting for the store; return how many rows were missing."""
    with orphans(prepare(folder), store=store.mark) as found:
        return sum(_take_up(store, orphan, outage) for orphan in found)


def _take_up(store: Store, orphan: Orphan, outage: Outage) -> int:
    rows = written = 0
    claims: set[Claim] = set()
    for entries in _slices(orphan.entries()):
        written += outage.ride_out(lambda entries=entries: _record(store, entries), what=f"the spool {orphan.path.name}")  # type: ignore[misc]
        rows += sum(len(completions) for _, completions in entries)
        claims |= {claim for claim, _ in entries}
    for claim in claims:
        # Does nothing where the claim is void or rows are missing: then the chunk's next worker ends it.
        outage.ride_out(lambda claim=claim: store.finish_chunk(claim), what=f"the end of chunk {claim.chunk_id}")  # type: ignore[misc]
    orphan.path.unlink(missing_ok=True)
    log.warning(
        "%d answers that %s left in its spool: %d are recorded, the others had been already; %d records were damaged and are computed again",
        rows, orphan.worker or "a worker", written, orphan.damaged,
        extra={"event": "spool_replayed", "rows": rows, "written": written, "damaged": orphan.damaged, "worker_id": orphan.worker},
    )  # fmt: skip
    return written


def _slices(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while some := list(itertools.islice(entries, ENTRIES_AT_ONCE)):
        yield some


def _record(store: Store, entries: Sequence[Entry]) -> int:
    """Write one slice; where the store refuses it, each entry by itself, so that one's trouble doesn't cost the others."""
    try:
        return sum(result.inserted for result in store.record_late(entries))
    except HEALS:
        raise
    except Exception:
        if len(entries) > 1:
            return sum(_record(store, [entry]) for entry in entries)
        claim = entries[0][0]
        log.exception(
            "answers of chunk %s in a spool could not be recorded; they are computed again", claim.chunk_id,
            extra={"event": "record_failed", "chunk_id": claim.chunk_id},
        )  # fmt: skip
        return 0
