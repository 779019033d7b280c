"""Memory that all ranks of a tensor-parallel group can read and write, over NVLink or PCIe.

One allocation on each GPU, of the same layout: flags, two regions for sums, used in turn, and one for what is gathered. Made once,
through PyTorch's symmetric memory, without multicast. Knows nothing of models, nor of when it is faster than a library.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.all_reduce import Peers

if TYPE_CHECKING:
    from engine.parallel import DistributedGroup

log = logging.getLogger(__name__)

_ALIGNMENT = 512


class PeerMemory(NamedTuple):
    """This rank's view of all ranks' regions; offsets in bytes, the same on every rank."""

    rank: int
    ranks: tuple[Tensor, ...]
    """uint8: each rank's whole allocation."""
    counts_P: Tensor | None
    """See `kernels.all_reduce.Peers`."""
    starts: tuple[int, int, int]
    """Where the two regions for sums and the one for gathering begin."""
    ends: tuple[int, int, int]
    handle: object
    """PyTorch's, which keeps the other ranks' memory mapped."""

    def part(self, region: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Give [rows, columns] of this rank's region, to be written before `peers` of the same region are summed."""
        size = rows * columns * dtype.itemsize
        assert self.starts[region] + size <= self.ends[region], "more than the region holds"
        start = self.starts[region]
        return self.ranks[self.rank][start : start + size].view(dtype).view(rows, columns)

    def peers(self, region: int, dtype: torch.dtype) -> Peers:
        """Give the kernels' view of a region."""
        start, end = self.starts[region], self.ends[region]
        parts = tuple(rank[start:end].view(dtype) for rank in self.ranks)
        return Peers(self.rank, parts, -start // dtype.itemsize, self.counts_P)

    def holds(self, region: int, size: int) -> bool:
        """Whether a region has room for so many bytes."""
        return size <= self.ends[region] - self.starts[region]


def share_memory(group: DistributedGroup, *, device: torch.device, sum_bytes: int, gather_bytes: int) -> PeerMemory | None:
    """Allocate on every rank and exchange addresses; None, on all ranks, where the GPUs can't reach each other's memory.

    Every rank calls it with the same sizes.
    """
    memory, reason = None, _hindrance(group.size)
    if not reason:
        try:
            memory = _allocate(group, device=device, sizes=(sum_bytes, sum_bytes, gather_bytes))
        except RuntimeError as error:  # the driver's and the rendezvous' own
            reason = str(error)[:300]
    if group.smallest(0 if reason else 1) == 1:
        return memory
    log.warning(
        "the GPUs can't share memory; sums over the ranks go through NCCL, which is slower for small steps: %s",
        reason or "another rank failed",
        extra={"event": "peer_memory_unavailable", "error": reason},
    )
    return None


def _hindrance(size: int) -> str:
    from kernels.gpu.all_reduce import MAX_RANKS

    if size > MAX_RANKS:
        return f"there are more than {MAX_RANKS} ranks"
    blind = [(i, j) for i in range(size) for j in range(size) if i != j and not torch.cuda.can_device_access_peer(i, j)]
    return f"GPU {blind[0][0]} can't reach GPU {blind[0][1]}" if blind else ""


def _allocate(group: DistributedGroup, *, device: torch.device, sizes: tuple[int, int, int]) -> PeerMemory:
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    from kernels.gpu.all_reduce import FLAGS_BYTES, MAX_PROGRAMS

    bounds = [FLAGS_BYTES]
    for size in sizes:
        bounds.append(bounds[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    own = symmetric.empty(bounds[-1], dtype=torch.uint8, device=device)
    world = dist.group.WORLD
    assert world is not None, "the group is closed"
    handle = symmetric.rendezvous(own, world.group_name)
    ranks = tuple(handle.get_buffer(rank, (bounds[-1],), torch.uint8) for rank in range(group.size))
    if ranks[group.rank].data_ptr() != own.data_ptr():
        raise RuntimeError("the shared memory doesn't begin where it was allocated")
    own[:FLAGS_BYTES].zero_()
    counts_P = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    group.smallest(1)  # nobody may raise a flag before everybody has cleared theirs
    starts, ends = zip(*pairwise(bounds), strict=True)
    return PeerMemory(group.rank, ranks, counts_P, starts, ends, (own, handle))
