"""Attention of one query token a row over the paged cache, on the GPU.

A program takes one unit of the plan (`decode_plan`: a row, or a part of one) and one kv head. The query heads of the kv head's
group stand together in the M dimension, padded to the 16 rows of a matrix instruction, so the cache is read once for all of
them. The programs of a row's parts leave their partial results in scratch, and the last of them to arrive combines them, in
the order of the parts: the result does not depend on who that was.

It neither starts ahead of the kernel before it nor lets the next one start (`kernels.gpu.launch_ahead`): with 512 rows nothing is gained, and
with one row the GEMMs' programs that wait beside it cost more than the start does (H200: 32 layers 3.70 ms so, 3.93 and 4.03 with).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.decode_int8 import decode_int8_kernel
from kernels.gpu.decode_parts import leave, parts_at_once
from kernels.gpu.decode_plan import FIELDS, DecodePlan, load_unit
from kernels.gpu.paging import page_of, tile_slots
from kernels.gpu.quick_launch import power_of_2, quick

if TYPE_CHECKING:
    from kernels.attention import KVScales


@triton.jit
def _attend_tile(
    b_acc, b_sum, b_max, b_q, p_k_cache, p_v_cache, p_table, i_page, i_tile, i_head, context, first, K, scale,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr,
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
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = tl.where(((o_p < context) & (o_p >= first))[None, :], b_s, float("-inf"))
    # Scaled after the maximum: one multiplication a row instead of one an element, the other fuses with the subtraction.
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_acc, b_sum, b_new


@quick
@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode_kernel(
    p_q, p_k_cache, p_v_cache, p_tables, p_units, p_arrivals, p_out, p_partial, p_lse, q_token, q_head, table_stride, scale, window,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_2: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    H_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0)
    i_row, i_from, i_end, context, i_part, num_parts, i_slot = load_unit(p_units, tl.program_id(1), FIELDS)
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
            S, H, H_PAD, TILE,
        )  # fmt: skip
        i_page = i_next
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    leave(
        b_out, o_g[:, None] * H + o_h[None, :], m_gh, b_max + tl.log2(b_sum), o_g, p_out, p_partial, p_lse, p_arrivals, (i_row * K + i_head) * GROUP,
        i_slot * K + i_head, i_part, num_parts, K, GROUP, GROUP_2, H, H_PAD, PARTS,
    )  # fmt: skip


def decode_attention(
    q_RNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    block_tables_RP: Tensor,
    plan: DecodePlan,
    out_RNH: Tensor,
    *,
    scale: float,
    scales: KVScales | None = None,
) -> None:
    """Attend one token for each of q's R rows (the first R of the tables) into `out_RNH` (contiguous), by a plan for R rows.

    With `scales` the caches are of integers.
    """
    # Heads of a group stand where a matrix instruction has 16 places, or where it has 8.
    kernel, places = (_decode_kernel, 16) if scales is None else (decode_int8_kernel, 8)
    _, num_heads, head_dim = q_RNH.shape
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    group = num_heads // num_kv_heads
    partial = torch.empty((*plan.arrivals.shape, group, head_dim), dtype=torch.float32, device=q_RNH.device)
    lse = torch.empty((*plan.arrivals.shape, group), dtype=torch.float32, device=q_RNH.device)
    kernel[(num_kv_heads, len(plan.units))](
        q_RNH,
        k_cache_BKSH,
        v_cache_BKSH,
        *(scales or ()),
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
        GROUP_PAD=max(places, power_of_2(group)),
        S=size,
        H=head_dim,
        H_PAD=power_of_2(head_dim),
        TILE=plan.shape.tile,
        PARTS=parts_at_once(group, head_dim, plan.shape.num_warps),
        FIELDS=FIELDS,
        WINDOW=plan.sliding_window is not None,
        STAGES=plan.shape.stages,
        num_warps=plan.shape.num_warps,
    )
