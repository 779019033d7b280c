"""The store: the durable truth about batches, in SQLite or PostgreSQL. Nobody outside this package speaks SQL."""

from headrace.store.keys import ApiKey, NewKey, Role
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
    "ApiKey",
    "ChunkMessage",
    "ChunkRef",
    "ChunkState",
    "Claim",
    "NewKey",
    "PendingPrompt",
    "RecordResult",
    "RecordStatus",
    "Role",
    "Store",
    "WorkerInfo",
    "open_store",
]
