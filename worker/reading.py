"""Chunk messages that this release can't read: of a newer release during a rolling update, or of nobody.

Redis carries work, SQL carries truth: a message that can't be read still names its chunk, and the chunk is read from SQL. Where what SQL
has can't be read either (a config with options of a newer release), the chunk is claimed, and its attempt counted, for as long as a
lease: a worker of the newer release takes it up in between. After `MOST_ATTEMPTS` its prompts get the error instead of going round for
ever. This module knows no engine and no Celery.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from headrace.completion import Completion, CompletionError
from headrace.errors import InvalidRequest, NotFound
from headrace.store import ChunkMessage
from worker.runtime import Runtime

log = logging.getLogger(__name__)

MOST_ATTEMPTS: Final = 20
"""With leases of 30 s: ten minutes, in which a rolling update has come to its end."""
_MALFORMED: Final = (InvalidRequest, AttributeError, KeyError, TypeError, ValueError)


def read_chunk(work: Runtime, chunk: object) -> ChunkMessage | None:
    """Return the message as its sender wrote it, or as SQL has it; None: neither can be read, and that is seen to."""
    try:
        return ChunkMessage.from_dict(chunk)  # type: ignore[arg-type]  # what Redis had may be anything
    except _MALFORMED as error:
        chunk_id = chunk.get("chunk_id") if isinstance(chunk, Mapping) else None
        log.warning(
            "a chunk message can't be read (%s); its chunk is read from the database: is it of another release?", error,
            extra={"event": "chunk_unreadable", "chunk_id": str(chunk_id)},
        )  # fmt: skip
        return _read_from_store(work, chunk_id) if isinstance(chunk_id, str) else None


def _read_from_store(work: Runtime, chunk_id: str) -> ChunkMessage | None:
    def read() -> ChunkMessage | None:
        ref = work.store.find_chunk(chunk_id)
        return None if ref is None else work.store.chunk_message(ref)

    try:
        return work.outage.ride_out(read, what=f"chunk {chunk_id}", give_up=work.draining.is_set)
    except NotFound:
        return None
    except _MALFORMED as error:
        _count_attempt(work, chunk_id, error)
        return None


def _count_attempt(work: Runtime, chunk_id: str, error: Exception) -> None:
    """Hold the chunk for a lease, or give its prompts up when too many have tried."""
    claim = work.store.claim_chunk(chunk_id, worker=work.worker_id, lease_s=work.settings.lease_s)
    if claim is None or claim.attempt < MOST_ATTEMPTS:
        return
    said = CompletionError.of(
        InvalidRequest(
            f"What is stored of this prompt's batch is of a release that no worker here can read ({error}); {claim.attempt} attempts were "
            "made. Run the newest release everywhere and retry the batch."
        )
    )
    # Not through the recorder: this takes no part in the engine's work.
    work.store.record(claim, [Completion(index=item.index, error=said) for item in work.store.pending(claim)])
    work.store.finish_chunk(claim)
    log.error(
        "chunk %s can't be read by any release here; its prompts have failed", chunk_id,
        extra={"event": "chunk_given_up", "chunk_id": chunk_id, "attempts": claim.attempt},
    )  # fmt: skip
