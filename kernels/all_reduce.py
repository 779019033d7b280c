"""Sums over the ranks of a tensor-parallel group, where every rank can read every rank's memory.

Each op is called on all ranks in the same order with the same shapes. Knows nothing of how the memory came to be shared
(`engine.peer_memory`), nor when a library's all-reduce is faster (`engine.sum_table`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels import reference_all_reduce as reference


class Peers(NamedTuple):
    """One region of the ranks' memory, as one of them sees it."""

    rank: int
    parts: tuple[Tensor, ...]
    """Flat, one for each rank and all of a type: what that rank gives to the sum lies at its start. Their own rank's is written
    before the op is called."""
    flags_from: int = 0
    """Where a rank's flags are: so many elements from its part's start."""
    counts_P: Tensor | None = None
    """int32 on the device, for this rank alone: how far each program has counted. None: nobody is waited for, the parts are
    there (tests; on a CPU it is always so)."""


def one_shot(peers: Peers, rows: int, dim: int) -> Tensor:
    """Sum the ranks' [rows, dim] in the order of the ranks, in float32, rounded once. The parts stay.

    A part may be written again behind a later op of any kind on another region.
    """
    if peers.parts[0].is_cuda:
        from kernels.gpu import all_reduce as gpu

        return gpu.one_shot(peers, rows, dim)
    return reference.one_shot(peers.parts, rows, dim)


def one_shot_add_rms_norm(peers: Peers, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of `one_shot`'s sum: (rms_norm(sum + residual), sum + residual), each rounded as the two ops would.

    `residual_TD` [T, D] is contiguous, in the parts' type. Its sum may be written over it: read what is returned.
    """
    if peers.parts[0].is_cuda:
        from kernels.gpu import all_reduce as gpu

        return gpu.one_shot_add_rms_norm(peers, residual_TD, weight_D, eps)
    return reference.one_shot_add_rms_norm(peers.parts, residual_TD, weight_D, eps)


def two_shot(peers: Peers, rows: int, dim: int) -> Tensor:
    """Sum as `one_shot` does, but give the sum in the parts' own memory, which all ranks' parts hold then."""
    if peers.parts[0].is_cuda:
        from kernels.gpu import all_reduce as gpu

        return gpu.two_shot(peers, rows, dim)
    return reference.two_shot(peers.parts, peers.rank, rows, dim)


def share_add_rms_norm(
    peers: Peers, own_SD: Tensor, inbox: Tensor, residual_SD: Tensor, weight_D: Tensor, eps: float, *, share: int
) -> None:
    """Add up this rank's share of the rows, add and norm the residual, and write the normed rows into every rank's part of `peers`.

    Rank r's rows are r · share and so on, `share` of them, fewer or none at the end. `own_SD` [S, D] is what this rank gives to its own rows; `inbox`
    what the others gave, flat: [ranks - 1, share, D], in the order of the ranks. `residual_SD` [S, D] is written over with the new sum. Rounded
    as `one_shot_add_rms_norm` rounds. On return, in stream order, all ranks' rows are in all parts, which may be read until the next op of any kind.
    """
    if peers.parts[0].is_cuda:
        from kernels.gpu import all_reduce as gpu

        gpu.share_add_rms_norm(peers, own_SD, inbox, residual_SD, weight_D, eps, share=share)
    else:
        reference.share_add_rms_norm(peers.parts, peers.rank, own_SD, inbox, residual_SD, weight_D, eps, share=share)


def gather_columns(peers: Peers, rows: int, columns: int, mine: slice | None = None) -> Tensor:
    """Put the ranks' [rows, columns] side by side: [rows, ranks · columns]. The parts may be written again at once.

    `mine`: of these rows alone, and each rank of its own: at most every rank's even share of `rows`, rounded up.
    """
    if peers.parts[0].is_cuda:
        from kernels.gpu import all_reduce as gpu

        return gpu.gather_columns(peers, rows, columns, mine)
    whole_RC = reference.gather_columns(peers.parts, rows, columns)
    return whole_RC if mine is None else whole_RC[mine]
