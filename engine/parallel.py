"""The tensor-parallel group: how ranks find each other and add up partial sums.

Tensors go through torch.distributed: gloo on a CPU, NCCL on GPUs. Knows nothing of models, nor of plans (`engine.plan_channel`).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, though torch's stub doesn't say so

if TYPE_CHECKING:
    from engine.peer_sums import PeerSums

_LOOPBACK = "127.0.0.1"
_JOIN_TIMEOUT = timedelta(minutes=10)  # loading a large model from a slow disk, rank by rank


class ParallelGroup(Protocol):
    """One rank's view of its group."""

    rank: int
    size: int
    sums: PeerSums | None
    """Faster sums for steps of few rows, where there are any: `engine.executor` fills it in."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks; may be in place. Every rank gets the same bits."""
        ...

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """Put the ranks' equally wide [R, C] side by side: [R, size · C]."""
        ...

    def all_gather_words(self, words_RC: Tensor) -> Tensor:
        """Put the ranks' equally wide int32 [R, C] side by side, where they are few: [R, size · C]."""
        ...

    def smallest(self, value: int) -> int:
        """Give the smallest `value` of all ranks. For setting up: it waits for the device."""
        ...

    def agreed(self, values: Sequence[float]) -> list[float]:
        """Give rank 0's `values` on every rank: what was timed differs from rank to rank, what follows from it must not."""
        ...

    def close(self) -> None:
        """Leave the group. May be called twice."""
        ...


class SingleRank:
    """The group of one: every operation gives back what it was given."""

    rank = 0
    size = 1
    sums: PeerSums | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """Return `x_RC`."""
        return x_RC

    def all_gather_words(self, words_RC: Tensor) -> Tensor:
        """Return `words_RC`."""
        return words_RC

    def smallest(self, value: int) -> int:
        """Return `value`."""
        return value

    def agreed(self, values: Sequence[float]) -> list[float]:
        """Return `values`."""
        return list(values)

    def close(self) -> None:
        """Do nothing."""


class Rendezvous:
    """Rank 0's meeting point on a port that the system chose; `address` goes to the other ranks."""

    def __init__(self) -> None:
        """Listen on the loopback device."""
        # Left to itself the store listens on every interface of the host, and it asks nobody for a password.
        listener = socket.create_server((_LOOPBACK, 0))
        port = listener.getsockname()[1]
        # Rank 0 doesn't wait for the others here: their processes are started with the address that this makes known.
        self.store = TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_JOIN_TIMEOUT,
            master_listen_fd=listener.detach(),  # the store closes it
        )

    @property
    def address(self) -> str:
        """`host:port` for `serve_rank`."""
        return f"{_LOOPBACK}:{self.store.port}"


def join_store(address: str) -> TCPStore:
    """Connect to rank 0's meeting point."""
    host, port = address.rsplit(":", 1)
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_JOIN_TIMEOUT)


class DistributedGroup:
    """`size` ranks over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors."""

    def __init__(self, store: TCPStore, *, rank: int, size: int, device: torch.device) -> None:
        """Join the group; waits for all ranks."""
        self.rank = rank
        self.size = size
        self.sums: PeerSums | None = None
        self._device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_JOIN_TIMEOUT)
        self._open = True

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(x)
        return x

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """Put the ranks' columns side by side."""
        parts_GRC = torch.empty((self.size, *x_RC.shape), dtype=x_RC.dtype, device=x_RC.device)
        dist.all_gather(list(parts_GRC.unbind(0)), x_RC.contiguous())
        return parts_GRC.transpose(0, 1).reshape(x_RC.shape[0], -1)

    def all_gather_words(self, words_RC: Tensor) -> Tensor:
        """Put the ranks' words side by side."""
        return self.all_gather_columns(words_RC) if self.sums is None else self.sums.gather_words(words_RC)

    def smallest(self, value: int) -> int:
        """Give the smallest value of all ranks."""
        least = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def agreed(self, values: Sequence[float]) -> list[float]:
        """Give rank 0's values on every rank."""
        told = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.broadcast(told, src=0)
        return [float(value) for value in told.tolist()]

    def close(self) -> None:
        """Leave the group."""
        if self._open:
            self._open = False
            self.sums = None
            dist.destroy_process_group()


def share(total: int, group: ParallelGroup) -> slice:
    """Give this rank's part of `total` rows that divide evenly."""
    part: int = total // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


def row_share(rows: int, *, rank: int, size: int) -> slice:
    """Give a rank's part of `rows` rows that need not divide: the last ranks may have fewer, or none."""
    part = -(-rows // size)
    return slice(min(rank * part, rows), min((rank + 1) * part, rows))


def replicated_share(heads: int, group: ParallelGroup) -> Sequence[int]:
    """Give this rank's heads of `heads`; where there are fewer heads than ranks, neighbours hold the same one."""
    if heads >= group.size:
        part = share(heads, group)
        return range(part.start, part.stop)
    return (group.rank * heads // group.size,)
