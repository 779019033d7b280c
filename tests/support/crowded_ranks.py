"""More ranks than GPUs: what four ranks compute, where there are two GPUs or one.

Ranks that share a GPU take turns of milliseconds, and one that waits for its peers waits through theirs: all is as on GPUs of their own,
but slow. NCCL refuses a GPU to two ranks, so what goes through torch.distributed goes through gloo. No figure comes from here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from engine import executor, peer_memory
from engine.peer_sums import WAYS, PeerSums


def crowd(ranks: int) -> None:
    """Let this process be one of so many ranks on the GPUs that there are; before it joins a group. Nothing where there are enough."""
    gpus, join = torch.cuda.device_count(), dist.init_process_group
    if ranks <= gpus:
        return
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"

    def join_over_gloo(_backend: str, **how: Any) -> None:
        join("gloo", **how)

    mock.patch.object(executor, "_device_of", lambda _options, rank: torch.device("cuda", rank % gpus)).start()
    mock.patch.object(peer_memory, "_hindrance", return_value="").start()
    mock.patch.object(PeerSums, "_measure", _both_ways).start()
    mock.patch.object(dist, "init_process_group", join_over_gloo).start()


def _both_ways(_sums: PeerSums, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Times by which our two ways serve one size after the other: gloo can't be captured."""
    fastest = {count: WAYS[number % 2] for number, count in enumerate(counts)}
    return {str(count): {way: float(way != fastest[count]) for way in WAYS} for count in counts}
