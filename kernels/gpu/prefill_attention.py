"""Causal attention of many query tokens a row over the paged cache, on the GPU: prompts packed one after the other.

A program takes BLOCK_M query tokens of one row and one head. Programs of one query block and all heads run side by side, so
that a group's heads find its keys in the L2 cache; the last blocks of a row, which see the most, start first.

What changes from step to step is no reason to compile anew (see `kernels.gpu`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.paging import page_of, tile_slots
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick


@triton.jit
def _prefill_tile(
    b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, o_query, window, K, scale,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2; `o_query` are the absolute positions of the query tokens."""
    o_h = tl.arange(0, H_PAD)
    o_kv = tile_slots(p_table, i_page, i_tile, i_head, context, K, S, TILE, MASKED)[:, None] * H + o_h[None, :]
    o_p = i_tile * TILE + tl.arange(0, TILE)
    if MASKED:
        m_kv = (o_p < context)[:, None] & (o_h < H)[None, :]
        b_k = tl.load(p_k_cache + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_v_cache + o_kv, mask=m_kv, other=0.0)
    elif H_PAD != H:
        b_k = tl.load(p_k_cache + o_kv, mask=(o_h < H)[None, :], other=0.0)
        b_v = tl.load(p_v_cache + o_kv, mask=(o_h < H)[None, :], other=0.0)
    else:
        b_k = tl.load(p_k_cache + o_kv)
        b_v = tl.load(p_v_cache + o_kv)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        m_s = o_p[None, :] <= o_query[:, None]
        if WINDOW:
            m_s &= o_p[None, :] > o_query[:, None] - window
        b_s = tl.where(m_s, b_s, float("-inf"))
    # Scaled after the maximum: one multiplication a row instead of one an element, the other fuses with the subtraction.
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_base = b_new
    if WINDOW:
        # A query may see nothing of the tiles that an earlier query of its block still sees: -inf - -inf is NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_scale = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_acc = b_acc * b_scale[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_sum, b_new


@quick
@triton.jit(do_not_specialize=["table_stride", "window", "first_row"])
def _prefill_kernel(
    p_q, p_k_cache, p_v_cache, p_tables, p_starts, p_lens, p_out, q_token, q_head, table_stride, scale, window, first_row,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_block = tl.num_programs(1) - 1 - tl.program_id(1)
    i_row = (tl.program_id(2) + first_row).to(tl.int64)
    start = tl.load(p_starts + i_row)
    length = tl.load(p_starts + i_row + 1) - start
    i_first = i_block * BLOCK_M
    if i_first >= length:
        return
    context = tl.load(p_lens + i_row)
    o_m = i_first + tl.arange(0, BLOCK_M)
    o_h = tl.arange(0, H_PAD)
    m_mh = (o_m < length)[:, None] & (o_h < H)[None, :]
    o_token = (start + o_m).to(tl.int64)
    b_q = tl.load(p_q + o_token[:, None] * q_token + i_n * q_head + o_h[None, :], mask=m_mh, other=0.0)
    b_acc = tl.zeros([BLOCK_M, H_PAD], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    p_table = p_tables + i_row * table_stride
    i_head = i_n // (N // K)
    position = context - length + i_first  # of the block's first query
    o_query = context - length + o_m
    i_end = tl.cdiv(tl.minimum(position + BLOCK_M, context), TILE)
    i_full = tl.minimum((position + 1) // TILE, i_end)
    i_low = 0
    if WINDOW:
        i_low = tl.maximum(position - window + 1, 0) // TILE
        i_full = i_low
    # Each tile's page number is fetched a tile early: waiting for it would leave one tile in flight instead of STAGES.
    i_page = page_of(p_table, i_low, S, TILE)
    for i_tile in tl.range(i_low, i_full, num_stages=STAGES):
        i_next = page_of(p_table, tl.minimum(i_tile + 1, i_end - 1), S, TILE)
        b_acc, b_sum, b_max = _prefill_tile(
            b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, o_query, window, K, scale,
            S, H, H_PAD, TILE, False, WINDOW, PRECISION,
        )  # fmt: skip
        i_page = i_next
    for i_tile in tl.range(i_full, i_end, num_stages=STAGES):
        i_next = page_of(p_table, tl.minimum(i_tile + 1, i_end - 1), S, TILE)
        b_acc, b_sum, b_max = _prefill_tile(
            b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, o_query, window, K, scale,
            S, H, H_PAD, TILE, True, WINDOW, PRECISION,
        )  # fmt: skip
        i_page = i_next
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    p_to = p_out + (o_token[:, None] * N + i_n) * H + o_h[None, :]
    tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=m_mh)


class PrefillShape(NamedTuple):
    """How a prefill launch is cut."""

    block_m: int
    tile: int
    num_warps: int
    stages: int


def choose_shape(*, head_dim: int, block_size: int, itemsize: int) -> PrefillShape:
    """Cut a launch so that it fits the 160 KB of shared memory that the smallest supported device (sm_80) has."""
    if itemsize == 4:
        return PrefillShape(block_m=32, tile=32, num_warps=4, stages=1)
    if head_dim > 128:
        return PrefillShape(block_m=64, tile=32, num_warps=4, stages=2)
    return PrefillShape(block_m=64, tile=min(max(block_size, 32), 64), num_warps=4, stages=3)


def prefill_attention(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    block_tables_RP: Tensor,
    query_start_R1: Tensor,
    context_lens_R: Tensor,
    out_TNH: Tensor,
    *,
    first_row: int,
    num_rows: int,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    shape: PrefillShape,
) -> None:
    """Attend the query tokens of rows `first_row` .. `first_row + num_rows - 1` into `out_TNH` (contiguous)."""
    _, num_heads, head_dim = q_TNH.shape
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    _prefill_kernel[(num_heads, ceil_div(max_query_len, shape.block_m), num_rows)](
        q_TNH,
        k_cache_BKSH,
        v_cache_BKSH,
        block_tables_RP,
        query_start_R1,
        context_lens_R,
        out_TNH,
        *q_TNH.stride()[:2],
        block_tables_RP.stride(0),
        scale * 1.4426950408889634,
        sliding_window or 0,
        first_row,
        N=num_heads,
        K=num_kv_heads,
        S=size,
        H=head_dim,
        H_PAD=power_of_2(head_dim),
        BLOCK_M=shape.block_m,
        TILE=shape.tile,
        WINDOW=sliding_window is not None,
        PRECISION="ieee",
        STAGES=shape.stages,
        num_warps=shape.num_warps,
    )
