"""Attention of one query token a row over the paged cache, on the GPU.

A program takes one unit of the plan (`decode_plan`: a row, or a part of one) and one kv head. The query heads of the kv head's
group stand together in the M dimension, padded to the 16 rows of a matrix instruction, so the cache is read once for all of
them. The programs of a row's parts leave their partial results in scratch, and the last of them to arrive combines them, in
the order of the parts: the result does not depend on who that was.

It neither starts ahead of the kernel before it nor lets the next one start (`kernels.gpu.launch_ahead`): with 512 rows nothing is gained, and
with one row the GEMMs' programs that wait beside it cost more than the start does (H200: 32 layers 3.70 ms so, 3.93 and 4.03 with).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.decode_plan import FIELDS, DecodePlan
from kernels.gpu.paging import page_of, tile_slots
from kernels.gpu.quick_launch import power_of_2, quick

# Partial results that the combining program loads at once: enough to hide one load behind another, and numbers a thread for its registers.
_PARTS, _NUMBERS = 8, 64


@triton.jit
def _attend_tile(
    b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, first, K, scale,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2, over the positions of a tile in [first, context)."""
    o_t = tl.arange(0, TILE)
    o_h = tl.arange(0, H_PAD)
    o_kv = tile_slots(p_table, i_page, i_tile, i_head, context, K, S, TILE, True)[:, None] * H + o_h[None, :]
    o_p = i_tile * TILE + o_t
    # What lies past the context is uninitialised: zero times NaN would reach the sum.
    m_kv = (o_p < context)[:, None] & (o_h < H)[None, :]
    b_k = tl.load(p_k_cache + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(p_v_cache + o_kv, mask=m_kv, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_s = tl.where(((o_p < context) & (o_p >= first))[None, :], b_s, float("-inf"))
    # Scaled after the maximum: one multiplication a row instead of one an element, the other fuses with the subtraction.
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_acc, b_sum, b_new


@triton.jit
def combine(
    p_partial, p_lse, p_to, i_first, count, K,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combine the `count` partial results of one row's head, K slots apart from `i_first` on, into `p_to`."""
    o_g = tl.arange(0, GROUP_2)
    o_h = tl.arange(0, H_PAD)
    b_acc = tl.zeros([GROUP_2, H_PAD], dtype=tl.float32)
    b_sum = tl.zeros([GROUP_2], dtype=tl.float32)
    b_max = tl.full([GROUP_2], float("-inf"), dtype=tl.float32)
    for start in range(0, count, PARTS):
        o_c = start + tl.arange(0, PARTS)
        o_part = (i_first + o_c * K)[:, None] * GROUP + o_g[None, :]
        m_part = (o_c < count)[:, None] & (o_g < GROUP)[None, :]
        b_lse = tl.load(p_lse + o_part, mask=m_part, other=float("-inf"), cache_modifier=".cg")
        m_h = m_part[:, :, None] & (o_h < H)[None, None, :]
        b_part = tl.load(p_partial + o_part[:, :, None] * H + o_h[None, None, :], mask=m_h, other=0.0, cache_modifier=".cg")
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # of the group's padding
        b_weight = tl.exp2(b_lse - b_base[None, :])
        b_scale = tl.exp2(b_max - b_base)
        b_acc = b_acc * b_scale[:, None] + tl.sum(b_part * b_weight[:, :, None], axis=0)
        b_sum = b_sum * b_scale + tl.sum(b_weight, axis=0)
        b_max = b_new
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    m_gh = (o_g < GROUP)[:, None] & (o_h < H)[None, :]
    tl.store(p_to + o_g[:, None] * H + o_h[None, :], b_out.to(p_to.dtype.element_ty), mask=m_gh)


@quick
@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode_kernel(
    p_q, p_k_cache, p_v_cache, p_tables, p_units, p_arrivals, p_out, p_partial, p_lse, q_token, q_head, table_stride, scale, window,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_2: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    H_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0)
    p_unit = p_units + tl.program_id(1) * FIELDS
    i_row = tl.load(p_unit).to(tl.int64)
    i_from = tl.load(p_unit + 1)
    i_end = tl.load(p_unit + 2)
    context = tl.load(p_unit + 3)
    i_part = tl.load(p_unit + 4)
    num_parts = tl.load(p_unit + 5)
    i_first = tl.load(p_unit + 6) * K + i_head
    if i_row < 0:
        return
    p_table = p_tables + i_row * table_stride
    # A padding row has no tile: what its table says is read as a page number, but nothing at that page.
    i_page = page_of(p_table, i_from, S, TILE)
    o_g = tl.arange(0, GROUP_PAD)
    o_h = tl.arange(0, H_PAD)
    m_gh = (o_g < GROUP)[:, None] & (o_h < H)[None, :]
    p_head = p_q + i_row * q_token + (i_head * GROUP + o_g)[:, None] * q_head + o_h[None, :]
    b_q = tl.load(p_head, mask=m_gh, other=0.0)
    b_acc = tl.zeros([GROUP_PAD, H_PAD], dtype=tl.float32)
    b_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
    b_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    first = context * 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    # All tiles in one loop, the last one masked like the others: on its own it would wait for its keys with nothing in flight.
    for i_tile in tl.range(i_from, i_end, num_stages=STAGES):
        # The next page's number is fetched a tile early: waiting for it would leave one tile in flight instead of STAGES.
        i_next = page_of(p_table, tl.minimum(i_tile + 1, i_end - 1), S, TILE)
        b_acc, b_sum, b_max = _attend_tile(
            b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, first, K, scale,
            S, H, H_PAD, TILE, PRECISION,
        )  # fmt: skip
        i_page = i_next
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    o_out = (i_row * K + i_head) * GROUP
    if num_parts == 1:
        tl.store(p_out + (o_out + o_g)[:, None] * H + o_h[None, :], b_out.to(p_out.dtype.element_ty), mask=m_gh)
    else:
        o_part = (i_first + i_part * K) * GROUP + o_g
        tl.store(p_partial + o_part[:, None] * H + o_h[None, :], b_out, mask=m_gh)
        tl.store(p_lse + o_part, b_max + tl.log2(b_sum), mask=o_g < GROUP)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        if tl.atomic_add(p_arrivals + i_first, 1, sem="acq_rel") == num_parts - 1:
            combine(p_partial, p_lse, p_out + o_out * H, i_first, num_parts, K, GROUP, GROUP_2, H, H_PAD, PARTS)
            tl.store(p_arrivals + i_first, 0)


def parts_at_once(group: int, head_dim: int, num_warps: int) -> int:
    """Give how many partial results a program combines at once."""
    return max(1, min(_PARTS, 32 * num_warps * _NUMBERS // (power_of_2(group) * power_of_2(head_dim))))


def decode_attention(
    q_RNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    block_tables_RP: Tensor,
    plan: DecodePlan,
    out_RNH: Tensor,
    *,
    scale: float,
) -> None:
    """Attend one token for each of q's R rows (the first R of the tables) into `out_RNH` (contiguous), by a plan for R rows."""
    _, num_heads, head_dim = q_RNH.shape
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    group = num_heads // num_kv_heads
    partial = torch.empty((*plan.arrivals.shape, group, head_dim), dtype=torch.float32, device=q_RNH.device)
    lse = torch.empty((*plan.arrivals.shape, group), dtype=torch.float32, device=q_RNH.device)
    _decode_kernel[(num_kv_heads, len(plan.units))](
        q_RNH,
        k_cache_BKSH,
        v_cache_BKSH,
        block_tables_RP,
        plan.units,
        plan.arrivals,
        out_RNH,
        partial,
        lse,
        *q_RNH.stride()[:2],
        block_tables_RP.stride(0),
        scale * 1.4426950408889634,
        plan.sliding_window or 0,
        K=num_kv_heads,
        GROUP=group,
        GROUP_2=power_of_2(group),
        GROUP_PAD=max(16, power_of_2(group)),
        S=size,
        H=head_dim,
        H_PAD=power_of_2(head_dim),
        TILE=plan.shape.tile,
        PARTS=parts_at_once(group, head_dim, plan.shape.num_warps),
        FIELDS=FIELDS,
        WINDOW=plan.sliding_window is not None,
        PRECISION="ieee",
        STAGES=plan.shape.stages,
        num_warps=plan.shape.num_warps,
    )
