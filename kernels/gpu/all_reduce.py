"""Sums over the ranks of a tensor-parallel group, on the GPU: a rank reads its peers' memory itself, over NVLink.

A rank's memory, the same layout on every rank: regions of data, and flags, a line of int32 for each program of a launch. Programs
of the same number meet: each raises its flag in every peer's memory and waits for the peers' in its own. A flag counts up, so
nothing is ever reset, and a captured graph may be replayed: how far a program has counted stands in device memory.

- One shot: each rank reads all parts, whole, and adds them up in the order of the ranks, so all have the same bits. It meets once,
  at its start: then the parts are there. Nobody meets at the end, so a part must stay as it is until a later meeting: whoever
  uses two regions in turn has that.
- Two shots: each rank adds up its share of the elements and writes the sums into every rank's memory. It meets at the end too.
- By shares: the parts of a rank's share of the rows were written into its memory by its peers, whose GEMMs give their results there.
  It adds them up and writes the normed rows into every rank's memory: half the bytes of the others, and none to wait for at first.

A launch is cut by its shape alone, on all ranks alike: programs that don't meet would wait for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch_ahead
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

if TYPE_CHECKING:
    from kernels.all_reduce import Peers

MAX_RANKS = 8
"""A kernel takes each rank's address as an argument of its own: Triton then knows how it is aligned."""
MAX_PROGRAMS = 256
_LINE = tl.constexpr(32)
"""Flags of a program, one for each rank, in 128 bytes of their own: programs must not wait for each other's lines."""
FLAGS_BYTES = MAX_PROGRAMS * 32 * 4
_MANY_ROWS = 4096
_TWO_SHOT_BLOCK = 4096
_GATHER_BLOCK = 4096


@triton.jit
def _flags(p_rank, flags_from, i_program):
    """Where a rank's flags of a program are."""
    return (p_rank + flags_from).to(tl.pointer_type(tl.int32), bitcast=True) + i_program * _LINE


@triton.jit
def _raise_flag(p_flag, count):
    """Everything that this rank wrote before is seen by whoever sees the flag."""
    tl.inline_asm_elementwise(
        "{ st.release.sys.global.u32 [$1], $2; mov.u32 $0, 0; }", "=r,l,r", [p_flag, count], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def _read_flag(p_flag):
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [p_flag], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def _meet(p_ranks, flags_from, i_program, count, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Return when this program has counted as far on every rank. Every thread waits for itself."""
    for i_rank in tl.static_range(SIZE):
        if i_rank != RANK:
            _raise_flag(_flags(p_ranks[i_rank], flags_from, i_program) + RANK, count)
    for i_rank in tl.static_range(SIZE):
        if i_rank != RANK:
            p_flag = _flags(p_ranks[RANK], flags_from, i_program) + i_rank
            # By difference: after two days of steps the count runs over.
            while _read_flag(p_flag) - count < 0:
                pass


@triton.jit
def _total(p_ranks, o_x, m_x, SIZE: tl.constexpr):
    """The ranks' sum in float32, rounded once to their type. What lies in a first-level cache may be an earlier step's."""
    b_sum = tl.load(p_ranks[0] + o_x, mask=m_x, other=0.0, cache_modifier=".cg").to(tl.float32)
    for i_rank in tl.static_range(1, SIZE):
        b_sum += tl.load(p_ranks[i_rank] + o_x, mask=m_x, other=0.0, cache_modifier=".cg").to(tl.float32)
    return b_sum.to(p_ranks[0].dtype.element_ty)


@quick
@triton.jit(do_not_specialize=["flags_from", "rows"])
def _one_shot_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, flags_from, p_counts, p_residual, p_weight, p_out, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, FUSED: tl.constexpr, MEETS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    p_ranks = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    launch_ahead.release(PDL)
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    if FUSED:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    launch_ahead.wait(PDL)
    if MEETS:
        count = tl.load(p_counts + i_program) + 1
        _meet(p_ranks, flags_from, i_program, count, RANK, SIZE)
        tl.debug_barrier()  # every thread has read the count
        tl.store(p_counts + i_program, count)
    width = tl.full((), D, tl.int64)
    for i_row in range(i_program, rows, tl.num_programs(0)):
        o_x = i_row * width + o_d
        b_sum = _total(p_ranks, o_x, m_d, SIZE)
        if FUSED:
            b_x = b_sum.to(tl.float32) + tl.load(p_residual + o_x, mask=m_d, other=0.0).to(tl.float32)
            b_sum = b_x.to(p_residual.dtype.element_ty)
            tl.store(p_residual + o_x, b_sum, mask=m_d)
            b_x = b_sum.to(tl.float32)
            b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
            tl.store(p_out + o_x, (b_x * b_scale * b_weight).to(p_out.dtype.element_ty), mask=m_d)
        else:
            tl.store(p_out + o_x, b_sum, mask=m_d)


@quick
@triton.jit(do_not_specialize=["flags_from", "share"])
def _two_shot_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, flags_from, p_counts, numel, share,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, MEETS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    p_ranks = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    launch_ahead.release(PDL)
    i_program = tl.program_id(0)
    launch_ahead.wait(PDL)
    if MEETS:
        count = tl.load(p_counts + i_program) + 1
        _meet(p_ranks, flags_from, i_program, count, RANK, SIZE)
    width = tl.full((), BLOCK, tl.int64)
    for i_block in range(i_program, share, tl.num_programs(0)):
        o_x = (RANK * share + i_block) * width + tl.arange(0, BLOCK)
        m_x = o_x < numel
        b_sum = _total(p_ranks, o_x, m_x, SIZE)
        for i_rank in tl.static_range(SIZE):
            tl.store(p_ranks[i_rank] + o_x, b_sum, mask=m_x)
    if MEETS:
        tl.debug_barrier()  # the flag must not be raised before every thread has written
        _meet(p_ranks, flags_from, i_program, count + 1, RANK, SIZE)
        tl.debug_barrier()
        tl.store(p_counts + i_program, count + 1)


@quick
@triton.jit(do_not_specialize=["flags_from", "first", "rows", "share"])
def _share_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, flags_from, p_counts, p_own, p_inbox, p_residual, p_weight, first, rows, share, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, MEETS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    p_ranks = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    launch_ahead.release(PDL)
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    launch_ahead.wait(PDL)
    if MEETS:
        count = tl.load(p_counts + i_program) + 1
        _meet(p_ranks, flags_from, i_program, count, RANK, SIZE)
    width = tl.full((), D, tl.int64)
    for i_row in range(i_program, rows, tl.num_programs(0)):
        o_x = i_row * width + o_d
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        for i_rank in tl.static_range(SIZE):
            place = (i_rank - (1 if i_rank > RANK else 0)) * share * width
            p_part = p_own + o_x if i_rank == RANK else p_inbox + place + o_x
            b_sum += tl.load(p_part, mask=m_d, other=0.0, cache_modifier=".cg").to(tl.float32)
        b_x = b_sum.to(p_own.dtype.element_ty).to(tl.float32) + tl.load(p_residual + o_x, mask=m_d, other=0.0).to(tl.float32)
        b_new = b_x.to(p_residual.dtype.element_ty)
        tl.store(p_residual + o_x, b_new, mask=m_d)
        b_x = b_new.to(tl.float32)
        b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
        b_out = (b_x * b_scale * b_weight).to(p_own.dtype.element_ty)
        for i_rank in tl.static_range(SIZE):
            tl.store(p_ranks[i_rank] + first * width + o_x, b_out, mask=m_d)
    if MEETS:
        tl.debug_barrier()
        _meet(p_ranks, flags_from, i_program, count + 1, RANK, SIZE)
        tl.debug_barrier()
        tl.store(p_counts + i_program, count + 1)


@quick
@triton.jit(do_not_specialize=["flags_from", "first", "rows"])
def _gather_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, flags_from, p_counts, p_out, first, rows, C,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, MEETS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    p_ranks = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7)
    launch_ahead.release(PDL)
    i_program = tl.program_id(0)
    launch_ahead.wait(PDL)
    if MEETS:
        count = tl.load(p_counts + i_program) + 1
        _meet(p_ranks, flags_from, i_program, count, RANK, SIZE)
    tiles = tl.cdiv(C, BLOCK)
    width = tl.full((), C, tl.int64)
    for i_tile in range(i_program, rows * tiles, tl.num_programs(0)):
        o_row = i_tile // tiles * width
        o_c = i_tile % tiles * BLOCK + tl.arange(0, BLOCK)
        m_c = o_c < C
        for i_rank in tl.static_range(SIZE):
            b_x = tl.load(p_ranks[i_rank] + first * width + o_row + o_c, mask=m_c, other=0.0, cache_modifier=".cg")
            tl.store(p_out + o_row * SIZE + i_rank * C + o_c, b_x, mask=m_c)
    if MEETS:
        # A rank that comes back to write must find everybody done reading.
        tl.debug_barrier()
        _meet(p_ranks, flags_from, i_program, count + 1, RANK, SIZE)
        tl.debug_barrier()
        tl.store(p_counts + i_program, count + 1)


def _addresses(peers: Peers) -> tuple[Tensor | None, ...]:
    return (*peers.parts, *(None,) * (MAX_RANKS - len(peers.parts)))


def _constants(peers: Peers) -> dict[str, object]:
    return {
        "SIZE": len(peers.parts),
        "RANK": peers.rank,
        "MEETS": peers.counts_P is not None,
        **launch_ahead.options(peers.parts[0].device),
    }


def _num_warps(block: int) -> int:
    """So many that a thread holds about 32 values of each part: what NVLink takes long to bring is asked for at once."""
    return min(16, max(1, block // 1024))


def _num_programs(rows: int) -> int:
    """One for each multiprocessor of a large GPU, and for what takes long anyway two."""
    return min(rows, MAX_PROGRAMS if rows >= _MANY_ROWS else MAX_PROGRAMS // 2)


def _one_shot(
    peers: Peers, rows: int, dim: int, residual_TD: Tensor | None, weight_D: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    part = peers.parts[peers.rank]
    out_TD = torch.empty((rows, dim), dtype=part.dtype, device=part.device)
    if rows:
        block = power_of_2(dim)
        _one_shot_kernel[(_num_programs(rows),)](
            *_addresses(peers),
            peers.flags_from,
            peers.counts_P,
            out_TD if residual_TD is None else residual_TD,
            out_TD if weight_D is None else weight_D,
            out_TD,
            rows,
            eps,
            D=dim,
            BLOCK=block,
            FUSED=residual_TD is not None,
            **_constants(peers),
            num_warps=_num_warps(block),
        )
    return out_TD


def one_shot(peers: Peers, rows: int, dim: int) -> Tensor:
    """See `kernels.all_reduce.one_shot`."""
    return _one_shot(peers, rows, dim, None, None, 0.0)


def one_shot_add_rms_norm(peers: Peers, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.all_reduce.one_shot_add_rms_norm`; the sum is written over `residual_TD`."""
    rows, dim = residual_TD.shape
    return _one_shot(peers, rows, dim, residual_TD, weight_D, eps), residual_TD


def two_shot(peers: Peers, rows: int, dim: int) -> Tensor:
    """See `kernels.all_reduce.two_shot`."""
    part = peers.parts[peers.rank]
    numel = rows * dim
    if numel:
        share = ceil_div(ceil_div(numel, _TWO_SHOT_BLOCK), len(peers.parts))
        _two_shot_kernel[(min(share, MAX_PROGRAMS),)](
            *_addresses(peers),
            peers.flags_from,
            peers.counts_P,
            numel,
            share,
            BLOCK=_TWO_SHOT_BLOCK,
            **_constants(peers),
            num_warps=8,
        )
    return part[:numel].view(rows, dim)


def share_add_rms_norm(
    peers: Peers, own_SD: Tensor, inbox: Tensor, residual_SD: Tensor, weight_D: Tensor, eps: float, *, share: int
) -> None:
    """See `kernels.all_reduce.share_add_rms_norm`."""
    rows, dim = own_SD.shape
    block = power_of_2(dim)
    _share_kernel[(_num_programs(share),)](
        *_addresses(peers),
        peers.flags_from,
        peers.counts_P,
        own_SD,
        inbox,
        residual_SD,
        weight_D,
        peers.rank * share,
        rows,
        share,
        eps,
        D=dim,
        BLOCK=block,
        **_constants(peers),
        num_warps=_num_warps(block),
    )


def gather_columns(peers: Peers, rows: int, columns: int, mine: slice | None = None) -> Tensor:
    """See `kernels.all_reduce.gather_columns`."""
    # As many programs on every rank, whatever its rows: each of them meets its like.
    most = rows if mine is None else ceil_div(rows, len(peers.parts))
    mine = slice(0, rows) if mine is None else mine
    part = peers.parts[peers.rank]
    count = mine.stop - mine.start
    out_RC = torch.empty((count, len(peers.parts) * columns), dtype=part.dtype, device=part.device)
    if rows:
        tiles = most * ceil_div(columns, _GATHER_BLOCK)
        _gather_kernel[(min(tiles, MAX_PROGRAMS),)](
            *_addresses(peers),
            peers.flags_from,
            peers.counts_P,
            out_RC,
            mine.start,
            count,
            columns,
            BLOCK=_GATHER_BLOCK,
            **_constants(peers),
            num_warps=8,
        )
    return out_RC
