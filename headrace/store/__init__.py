"""The store: the durable truth about batches, in SQLite or PostgreSQL. Nobody outside this package speaks SQL."""

from headrace.store.store import Store, open_store
from headrace.store.values import (
    ChunkMessage,
    ChunkRef,
    ChunkState,
    Claim,
    PendingPrompt,
    RecordResult,
    RecordStatus,
    WorkerInfo,
)

__all__ = [
    "ChunkMessage",
    "ChunkRef",
    "ChunkState",
    "Claim",
    "PendingPrompt",
    "RecordResult",
    "RecordStatus",
    "Store",
    "WorkerInfo",
    "open_store",
]
