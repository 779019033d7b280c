"""Attention of one query token a row over the paged cache, on the GPU.

A program takes one row, one kv head and, where the context is split, one share of its tiles. The query heads of the kv head's
group stand together in the M dimension, padded to the 16 rows of a matrix instruction, so the cache is read once for all of
them. Lengths are read from device memory and the grid depends on the number of rows only: one captured graph serves every length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.paging import page_of, tile_offsets

# A context is split only where rows and heads alone leave multiprocessors with fewer programs than this.
_PROGRAMS_PER_SM = 2
_MAX_SPLITS = 32
# A share smaller than this costs more in the combining pass than it gains.
_MIN_SPLIT_POSITIONS = 256


@triton.jit
def _attend_tile(
    b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, first, K, scale,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2. Positions outside [first, context) are masked where MASKED."""
    o_t = tl.arange(0, TILE)
    o_h = tl.arange(0, H_PAD)
    o_kv = tile_offsets(p_table, i_page, i_tile, i_head, context, K, S, H, TILE, MASKED)[:, None] + o_h[None, :]
    o_p = i_tile * TILE + o_t
    if MASKED:
        # What lies past the context is uninitialised: zero times NaN would reach the sum.
        m_kv = (o_p < context)[:, None] & (o_h < H)[None, :]
        b_k = tl.load(p_k_cache + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_v_cache + o_kv, mask=m_kv, other=0.0)
    elif H_PAD != H:
        b_k = tl.load(p_k_cache + o_kv, mask=(o_h < H)[None, :], other=0.0)
        b_v = tl.load(p_v_cache + o_kv, mask=(o_h < H)[None, :], other=0.0)
    else:
        b_k = tl.load(p_k_cache + o_kv)
        b_v = tl.load(p_v_cache + o_kv)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if MASKED:
        b_s = tl.where(((o_p < context) & (o_p >= first))[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_acc, b_sum, b_new


@triton.jit
def _share(context, window, i_split, TILE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_TILES: tl.constexpr):
    """Give (first visible position, first tile, end tile, shares in use) of a split: the combining kernel asks the same."""
    first = context * 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    i_low = first // TILE
    i_end = tl.cdiv(context, TILE)
    if SPLITS == 1:
        return first, i_low, i_end, 1
    num_tiles = i_end - i_low
    per_split = tl.cdiv(num_tiles, SPLITS)
    per_split = tl.maximum(per_split, MIN_TILES)
    used = tl.cdiv(num_tiles, per_split)
    i_from = i_low + i_split * per_split
    return first, i_from, tl.minimum(i_from + per_split, i_end), used


@triton.jit
def _decode_kernel(
    p_q, p_k_cache, p_v_cache, p_tables, p_lens, p_out, p_lse, q_token, q_head, table_stride, scale, window,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    i_split = tl.program_id(2)
    context = tl.load(p_lens + i_row)
    first, i_from, i_end, _used = _share(context, window, i_split, TILE, WINDOW, SPLITS, MIN_TILES)
    if SPLITS > 1:
        if i_from >= i_end:
            return
    o_g = tl.arange(0, GROUP_PAD)
    o_h = tl.arange(0, H_PAD)
    m_gh = (o_g < GROUP)[:, None] & (o_h < H)[None, :]
    p_row = p_q + i_row * q_token + (i_head * GROUP + o_g)[:, None] * q_head + o_h[None, :]
    b_q = tl.load(p_row, mask=m_gh, other=0.0)
    b_acc = tl.zeros([GROUP_PAD, H_PAD], dtype=tl.float32)
    b_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
    b_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    p_table = p_tables + i_row * table_stride
    i_full = tl.minimum(i_end, context // TILE)
    i_page = page_of(p_table, i_from, S, TILE)
    for i_tile in tl.range(i_from, i_full, num_stages=STAGES):
        # The next page's number is fetched a tile early: waiting for it would leave one tile in flight instead of STAGES.
        i_next = page_of(p_table, tl.minimum(i_tile + 1, i_end - 1), S, TILE)
        b_acc, b_sum, b_max = _attend_tile(
            b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, first, K, scale,
            S, H, H_PAD, TILE, WINDOW, PRECISION,
        )  # fmt: skip
        i_page = i_next
    if i_end * TILE > context:
        b_acc, b_sum, b_max = _attend_tile(
            b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_end - 1, i_head, context, first, K, scale,
            S, H, H_PAD, TILE, True, PRECISION,
        )  # fmt: skip
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    if SPLITS == 1:
        o_out = (i_row * K + i_head) * GROUP + o_g
        tl.store(p_out + o_out[:, None] * H + o_h[None, :], b_out.to(p_out.dtype.element_ty), mask=m_gh)
    else:
        o_out = ((i_row * SPLITS + i_split) * K + i_head) * GROUP + o_g
        tl.store(p_out + o_out[:, None] * H + o_h[None, :], b_out, mask=m_gh)
        tl.store(p_lse + o_out, b_max + tl.log2(b_sum), mask=o_g < GROUP)


@triton.jit
def _combine_kernel(
    p_partial, p_lse, p_lens, p_out, window, N: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1)
    context = tl.load(p_lens + i_row)
    _first, _from, _end, used = _share(context, window, 0, TILE, WINDOW, SPLITS, MIN_TILES)
    o_s = tl.arange(0, SPLITS)
    o_h = tl.arange(0, H_PAD)
    o_part = (i_row * SPLITS + o_s) * N + i_n
    b_lse = tl.load(p_lse + o_part, mask=o_s < used, other=float("-inf"))
    b_max = tl.max(b_lse, axis=0)
    b_weight = tl.where(o_s < used, tl.exp2(b_lse - b_max), 0.0)
    m_sh = (o_s < used)[:, None] & (o_h < H)[None, :]
    b_part = tl.load(p_partial + o_part[:, None] * H + o_h[None, :], mask=m_sh, other=0.0)
    b_total = tl.sum(b_weight, axis=0)
    b_out = tl.sum(b_part * b_weight[:, None], axis=0) / tl.where(b_total > 0, b_total, 1.0)
    tl.store(p_out + (i_row * N + i_n) * H + o_h, b_out.to(p_out.dtype.element_ty), mask=o_h < H)


class DecodeShape(NamedTuple):
    """How a decode launch is cut."""

    tile: int
    splits: int
    num_warps: int
    stages: int


def choose_shape(
    *, rows: int, num_kv_heads: int, head_dim: int, block_size: int, itemsize: int, max_context: int, num_sms: int
) -> DecodeShape:
    """Cut a launch by what it must read: no split where the rows alone fill the device, and no share too small to pay.

    Depends on nothing that changes between two steps with equal rows and `max_context`, so a graph may keep it.
    """
    tile = min(block_size, 64) if block_size >= 32 else 32
    if itemsize == 4 or head_dim > 128:
        tile = min(tile, 32)
    wanted = _PROGRAMS_PER_SM * num_sms // max(1, rows * num_kv_heads)
    useful = max(1, max_context // _MIN_SPLIT_POSITIONS)
    splits = triton.next_power_of_2(max(1, min(wanted, useful, _MAX_SPLITS)))
    # Measured on an H200: few programs want more tiles in flight each, many want room for one another.
    few = wanted >= 1 or itemsize == 4 or head_dim > 128
    return DecodeShape(tile=tile, splits=splits, num_warps=4 if few else 2, stages=3 if few else 2)


def decode_attention(
    q_RNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    block_tables_RP: Tensor,
    context_lens_R: Tensor,
    out_RNH: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    shape: DecodeShape,
) -> None:
    """Attend one token for each of q's R rows (the first R of the tables and lengths) into `out_RNH` (contiguous)."""
    rows, num_heads, head_dim = q_RNH.shape
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    group = num_heads // num_kv_heads
    meta = {"H": head_dim, "H_PAD": triton.next_power_of_2(head_dim), "TILE": shape.tile, "SPLITS": shape.splits}
    meta |= {"MIN_TILES": triton.cdiv(_MIN_SPLIT_POSITIONS, shape.tile), "WINDOW": sliding_window is not None}
    target, lse = out_RNH, context_lens_R
    if shape.splits > 1:
        target = torch.empty((rows, shape.splits, num_heads, head_dim), dtype=torch.float32, device=q_RNH.device)
        lse = torch.empty((rows, shape.splits, num_heads), dtype=torch.float32, device=q_RNH.device)
    _decode_kernel[(rows, num_kv_heads, shape.splits)](
        q_RNH,
        k_cache_BKSH,
        v_cache_BKSH,
        block_tables_RP,
        context_lens_R,
        target,
        lse,
        *q_RNH.stride()[:2],
        block_tables_RP.stride(0),
        scale * 1.4426950408889634,
        sliding_window or 0,
        K=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        S=size,
        PRECISION="ieee",
        STAGES=shape.stages,
        num_warps=shape.num_warps,
        **meta,
    )
    if shape.splits > 1:
        _combine_kernel[(rows, num_heads)](
            target, lse, context_lens_R, out_RNH, sliding_window or 0, N=num_heads, num_warps=2, **meta
        )
