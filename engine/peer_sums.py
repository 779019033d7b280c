"""How the ranks of a group on GPUs add up what a step of so many rows gives: by our kernels over peer memory, or by NCCL.

Which way is faster depends on the bytes and the links: it is timed once for each machine and kept (`engine.measured_table`). With two
ranks every way gives the same bits; with more, NCCL's order of the sums is another. Knows nothing of layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from engine import measured_table
from engine.captured_time import captured_us
from engine.parallel import row_share
from engine.peer_memory import PeerMemory, share_memory
from kernels import all_reduce
from kernels.rms_norm import add_rms_norm

if TYPE_CHECKING:
    from engine.parallel import DistributedGroup

log = logging.getLogger(__name__)

Way = Literal["one_shot", "two_shot", "nccl"]
WAYS: tuple[Way, ...] = get_args(Way)
_INBOX, _OUTBOX, _GATHER = range(3)
SHARES_FROM = 2048
"""Rows from which a GEMM of each rank's share of them is as fast as one of them all."""
_MOST_SUM_BYTES = 128 << 20
_MOST_GATHER_BYTES = 512 << 20
_CALLS = 8
"""Sums in a timed graph; even, so that it ends on the region on which it doesn't begin."""


class PeerSums:
    """A rank's sums of [rows, dim]. Every rank makes the same calls in the same order."""

    def __init__(self, group: DistributedGroup, memory: PeerMemory, *, dim: int, dtype: torch.dtype) -> None:
        """Take the memory; until `choose_ways` nothing is served."""
        self._group = group
        self._memory = memory
        self._dim = dim
        self._dtype = dtype
        self._device = memory.ranks[memory.rank].device
        self._ways: tuple[tuple[int, Way], ...] = ()
        self._turn = 0
        self._rank = memory.rank
        self._others = tuple(rank for rank in range(len(memory.ranks)) if rank != memory.rank)
        self._regions = tuple(memory.peers(region, dtype) for region in range(3))
        self._words = memory.peers(_GATHER, torch.int32)

    @property
    def most_rows(self) -> int:
        """Rows that a region holds."""
        return (self._memory.ends[0] - self._memory.starts[0]) // (self._dim * self._dtype.itemsize)

    def way(self, rows: int) -> Way:
        """Say how a step of so many rows is summed."""
        return next((way for most, way in self._ways if rows <= most), "nccl")

    def part(self, rows: int) -> Tensor:
        """Give the [rows, dim] into which this rank writes its part of the next sum."""
        return self._memory.part(self._turn, rows, self._dim, self._dtype)

    def add_rms_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Add the parts and the residual up: (rms_norm(sum), sum). See `kernels.rms_norm.add_rms_norm`."""
        return self._add_rms_norm(self.way(len(residual_TD)), residual_TD, weight_D, eps)

    def _add_rms_norm(self, way: Way, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # In turn, by calls and not by steps: what is captured holds an even number of them.
        part_TD = self.part(len(residual_TD))
        peers, self._turn = self._regions[self._turn], 1 - self._turn
        if way == "one_shot":
            return all_reduce.one_shot_add_rms_norm(peers, residual_TD, weight_D, eps)
        if way == "two_shot":
            return add_rms_norm(all_reduce.two_shot(peers, *residual_TD.shape), residual_TD, weight_D, eps)
        return add_rms_norm(self._group.all_reduce(part_TD), residual_TD, weight_D, eps)

    def shares(self, rows: int) -> bool:
        """Whether a step of so many rows is summed by shares."""
        return rows >= SHARES_FROM

    def targets(self, rows: int) -> list[tuple[slice, Tensor]]:
        """Give each rank's share of a step's rows and where this rank writes its part of them: its own last."""
        return [(self._share(rank, rows), self._target(rank, rows)) for rank in self._others] + [
            (self._share(self._rank, rows), self._target(self._rank, rows))
        ]

    def _share(self, rank: int, rows: int) -> slice:
        return row_share(rows, rank=rank, size=self._group.size)

    def _target(self, rank: int, rows: int) -> Tensor:
        mine = self._share(rank, rows)
        count = mine.stop - mine.start
        if rank == self._rank:
            return torch.empty((count, self._dim), dtype=self._dtype, device=self._device)
        place = (self._rank - (self._rank > rank)) * -(-rows // self._group.size) * self._dim
        return self._regions[_INBOX].parts[rank][place : place + count * self._dim].view(count, self._dim)

    def share_add_rms_norm(self, own_SD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Add up this rank's share, add the residual's rows of it, and give all ranks' normed rows [T, D], until the next sum of any kind.

        Of `residual_TD` this rank's rows alone count, and are written over.
        """
        rows = len(residual_TD)
        all_reduce.share_add_rms_norm(
            self._regions[_OUTBOX],
            own_SD,
            self._regions[_INBOX].parts[self._rank],
            residual_TD[self._share(self._rank, rows)],
            weight_D,
            eps,
            share=-(-rows // self._group.size),
        )
        return self._memory.part(_OUTBOX, rows, self._dim, self._dtype)

    def whole_rows(self, residual_TD: Tensor, rows_R: Tensor) -> Tensor:
        """Give rows of a residual of which each rank has its share."""
        mine = self._share(self._rank, len(residual_TD))
        is_mine_R1 = ((rows_R >= mine.start) & (rows_R < mine.stop))[:, None]
        kept_RD = torch.where(is_mine_R1, residual_TD.index_select(0, rows_R), 0.0)
        return self._group.all_reduce(kept_RD) if len(rows_R) else kept_RD

    def columns(self, rows: int, columns: int) -> Tensor | None:
        """Give the [rows, columns] into which this rank writes its part of what is gathered; None: too much for the region."""
        if not self._memory.holds(_GATHER, rows * columns * self._dtype.itemsize):
            return None
        return self._memory.part(_GATHER, rows, columns, self._dtype)

    def gather_columns(self, rows: int, columns: int, mine: slice | None = None) -> Tensor:
        """Put the ranks' columns side by side; of this rank's rows alone where `mine` says which they are."""
        return all_reduce.gather_columns(self._regions[_GATHER], rows, columns, mine)

    def gather_words(self, words_RC: Tensor) -> Tensor:
        """Put the ranks' few int32 [R, C] side by side."""
        # In the same region: whoever gathers from it has met the others again before it may be written.
        rows, columns = words_RC.shape
        self._memory.part(_GATHER, rows, columns, torch.int32).copy_(words_RC)
        return all_reduce.gather_columns(self._words, rows, columns)

    def choose_ways(self, most_rows: int, *, path: Path | None = None) -> None:
        """Settle which way serves how many rows up to `most_rows`; time them first if nobody has on such a machine."""
        counts = sum_rows(min(most_rows, self.most_rows))
        path = path or measured_table.home() / "sum-table.json"
        rows = [str(count) for count in counts]
        times = measured_table.read_or_measure(self._group, path, self._key(), rows, WAYS, partial(self._measure, counts))
        self._ways = tuple((count, min(WAYS, key=times[str(count)].__getitem__)) for count in counts)
        log.info(
            "sums over the ranks: each size goes the way that was fastest",
            extra={"event": "sums_chosen", "ways": {str(most): way for most, way in self._ways}, "us": times},
        )

    def _key(self) -> str:
        device = torch.cuda.get_device_name(self._device)
        version = ".".join(str(part) for part in torch.cuda.nccl.version())
        of = str(self._dtype).removeprefix("torch.")
        return f"{self._group.size} x {device}, torch {torch.__version__}, nccl {version}, {of} of {self._dim}"

    def _measure(self, counts: Sequence[int]) -> dict[str, dict[str, float]]:
        with torch.inference_mode():
            return {str(count): {way: self._time(way, count) for way in WAYS} for count in counts}

    def _time(self, way: Way, rows: int) -> float:
        """Microseconds of a sum with residual and norm, in a captured graph, as a step has it."""
        device = self._device
        residual_TD = torch.zeros((rows, self._dim), dtype=self._dtype, device=device)
        weight_D = torch.ones(self._dim, dtype=self._dtype, device=device)

        def run() -> None:
            for _ in range(_CALLS):
                self._add_rms_norm(way, residual_TD, weight_D, 1e-5)

        self.part(rows).normal_()
        return captured_us(run) / _CALLS


def sum_rows(most: int) -> tuple[int, ...]:
    """Return the row counts to time: powers of four and the largest."""
    return tuple(sorted({*(rows for rows in (1, 4, 16, 64, 256, 1024, 4096) if rows < most), most}))


def connect(
    group: DistributedGroup, *, dim: int, columns: int, max_tokens: int, max_rows: int, dtype: torch.dtype, device: torch.device
) -> PeerSums | None:
    """Make the sums of a model with `dim` hidden columns whose head gives `columns` on each rank; None where NCCL must do.

    `max_tokens`: rows of the largest step; `max_rows`: rows that reach the head at once.
    """
    memory = share_memory(
        group,
        device=device,
        sum_bytes=min(max_tokens * dim * dtype.itemsize, _MOST_SUM_BYTES),
        gather_bytes=min(max_rows * columns * dtype.itemsize, _MOST_GATHER_BYTES),
    )
    if memory is None:
        return None
    sums = PeerSums(group, memory, dim=dim, dtype=dtype)
    sums.choose_ways(max_tokens)
    return sums
