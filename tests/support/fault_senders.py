"""What senders have put into Redis, as they log it themselves: for the faults of the broker and of the reconciler."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fault_ground import Ground
from worker_process import ROOT, SUPPORT

from headrace.broker import Broker
from headrace.store import ChunkMessage

SITE = SUPPORT / "site"


class Sending(NamedTuple):
    """One chunk message, sent at a Unix time."""

    at: float
    chunk_id: str
    arrived: bool


def environ_of(log: Path, *, drop_share: float = 0.0, seed: int = 0) -> Mapping[str, str]:
    """Return the environment of a worker that logs what it sends, and loses a share of it."""
    return {
        "PYTHONPATH": f"{SITE}:{SUPPORT}:{ROOT}", "FAULT_SENDER_LOG": str(log), "FAULT_DROP_SHARE": str(drop_share),
        "FAULT_SEED": str(seed),
    }  # fmt: skip


class LoggedBroker(Broker):
    """The test's own sender, which stands for the API: it logs what it sends, and loses every `lose_every`-th message."""

    def __init__(self, field: Ground, log: Path, *, lose_every: int = 0) -> None:
        super().__init__(field.service.broker.app)
        self._log = log
        self._lose_every = lose_every
        self._sent = 0

    def enqueue(self, message: ChunkMessage) -> None:
        self._sent += 1
        dropped = self._lose_every and self._sent % self._lose_every == 0
        if not dropped:
            super().enqueue(message)
        with self._log.open("a") as file:
            file.write(f"{time.time():.3f} {message.chunk_id} {'dropped' if dropped else 'kept'}\n")


def sendings(log: Path) -> list[Sending]:
    """Return what was sent, in order of time."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows = (line.split() for line in lines)
    return sorted(Sending(float(at), chunk_id, fate == "kept") for at, chunk_id, fate in rows)


def healing_times(sent: list[Sending]) -> list[float]:
    """Return for each message that was lost how many seconds went by until its chunk was sent again."""
    by_chunk: dict[str, list[Sending]] = defaultdict(list)
    for sending in sent:
        by_chunk[sending.chunk_id].append(sending)
    times = []
    for chain in by_chunk.values():
        assert chain[-1].arrived, f"{chain[-1].chunk_id} was lost and never sent again"
        times += [later.at - earlier.at for earlier, later in itertools.pairwise(chain) if not earlier.arrived]
    return times
