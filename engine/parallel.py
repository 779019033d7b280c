"""The tensor-parallel group: how ranks find each other, add up partial sums and share plans.

Tensors go through torch.distributed (gloo on a CPU, NCCL on GPUs). Plans go as JSON frames over TCP on the loopback device,
because a collective would time out in an idle engine, and because a closed socket tells at once that its rank is gone.
Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, though torch's stub doesn't say so

from headrace.errors import RankLost

_LOOPBACK = "127.0.0.1"
_PLANS = "plans"  # the store's key under which rank 0 says where it sends plans from
_LENGTH = struct.Struct("<Q")
_JOIN_TIMEOUT = timedelta(minutes=10)  # loading a large model from a slow disk, rank by rank


class ParallelGroup(Protocol):
    """One rank's view of its group."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks; may be in place. Every rank gets the same bits."""
        ...

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """Put the ranks' equally wide [R, C] side by side: [R, size · C]."""
        ...

    def smallest(self, value: int) -> int:
        """Give the smallest `value` of all ranks. For setting up: it waits for the device."""
        ...

    def close(self) -> None:
        """Leave the group. May be called twice."""
        ...


class SingleRank:
    """The group of one: every operation gives back what it was given."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """Return `x_RC`."""
        return x_RC

    def smallest(self, value: int) -> int:
        """Return `value`."""
        return value

    def close(self) -> None:
        """Do nothing."""


class Rendezvous:
    """Rank 0's meeting point on a port that the system chose; `address` goes to the other ranks."""

    def __init__(self) -> None:
        """Listen on the loopback device."""
        # Rank 0 doesn't wait for the others here: their processes are started with the address that this makes known.
        self.store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=_JOIN_TIMEOUT)

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

    def smallest(self, value: int) -> int:
        """Give the smallest value of all ranks."""
        least = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def close(self) -> None:
        """Leave the group."""
        if self._open:
            self._open = False
            dist.destroy_process_group()


def lost_rank(error: Exception) -> RankLost:
    """Make the error for a rank that is gone, noticed by `error`."""
    return RankLost(f"a tensor-parallel rank is gone ({error}); the engine has to be started again")


class PlanSender:
    """Rank 0's end of the plan channel: every frame goes to every other rank."""

    def __init__(self, store: TCPStore, *, size: int) -> None:
        """Listen, tell the others where, and wait for all of them."""
        self._peers: list[socket.socket] = []
        with socket.create_server((_LOOPBACK, 0)) as server:
            server.settimeout(_JOIN_TIMEOUT.total_seconds())
            store.set(_PLANS, str(server.getsockname()[1]))
            for _ in range(size - 1):
                peer, _ = server.accept()
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._peers.append(peer)

    def send(self, frame: bytes) -> None:
        """Send one frame. Raise `RankLost` where a rank is gone."""
        try:
            for peer in self._peers:
                peer.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise lost_rank(error) from None

    @property
    def is_broken(self) -> bool:
        """Whether a rank has closed its end, which a living one never does."""
        return any(_is_closed(peer) for peer in self._peers)

    def close(self) -> None:
        """Close the channel, at which the other ranks end. May be called twice."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.close()
        self._peers.clear()


def _is_closed(peer: socket.socket) -> bool:
    try:
        return peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class PlanReceiver:
    """Another rank's end of the plan channel."""

    def __init__(self, store: TCPStore) -> None:
        """Connect to rank 0."""
        port = int(store.get(_PLANS))
        self._socket = socket.create_connection((_LOOPBACK, port), timeout=_JOIN_TIMEOUT.total_seconds())
        self._socket.settimeout(None)  # an engine may idle for days between two plans

    def receive(self) -> bytes | None:
        """Wait for the next frame; None when rank 0 closed the channel or is gone."""
        head = self._read(_LENGTH.size)
        return None if head is None else self._read(_LENGTH.unpack(head)[0])

    def _read(self, count: int) -> bytes | None:
        parts: list[bytes] = []
        while count:
            try:
                part = self._socket.recv(min(count, 1 << 20))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the channel."""
        self._socket.close()


def share(total: int, group: ParallelGroup) -> slice:
    """Give this rank's part of `total` rows that divide evenly."""
    part: int = total // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


def replicated_share(heads: int, group: ParallelGroup) -> Sequence[int]:
    """Give this rank's heads of `heads`; where there are fewer heads than ranks, neighbours hold the same one."""
    if heads >= group.size:
        part = share(heads, group)
        return range(part.start, part.stop)
    return (group.rank * heads // group.size,)
