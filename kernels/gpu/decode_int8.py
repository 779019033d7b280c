"""Attention of one query token a row over a paged cache of 8-bit integers, on the GPU.

As in `decode_attention` a program takes one unit of the plan and one kv head, and leaves its part in scratch for the last one to combine. What
differs is the way round: positions and dims stand in the M dimension of the matrix instructions and the group's heads in N, of which 8 are
enough. A group of 4 so takes half as many instructions and exponentials, and what a warp computes for every byte is what limits it here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.decode_parts import leave
from kernels.gpu.decode_plan import load_unit
from kernels.gpu.int8_cache import load_values, widened
from kernels.gpu.paging import page_of, tile_slots
from kernels.gpu.quick_launch import quick


@triton.jit
def _attend_tile(
    b_acc, b_sum, b_max, top, b_qt, p_k_cache, p_v_cache, p_k_scales, p_v_scales, p_table, i_page, i_tile, i_head, context, first, K, scale,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2, over the positions of a tile in [first, context)."""
    o_h = tl.arange(0, H_PAD)
    o_slot = tile_slots(p_table, i_page, i_tile, i_head, context, K, S, TILE, True)
    o_kv = (o_slot * H)[:, None] + o_h[None, :]
    o_p = i_tile * TILE + tl.arange(0, TILE)
    # What lies past the context is uninitialised: zero times NaN would reach the sum.
    m_kv = (o_p < context)[:, None] & (o_h < H)[None, :]
    b_k = tl.load(p_k_cache + o_kv, mask=m_kv, other=0)
    b_vt = widened(load_values(p_v_cache, p_table, i_page, i_tile, i_head, context, K, S, H, H_PAD, TILE))
    b_s = tl.dot(widened(b_k), b_qt) * tl.load(p_k_scales + o_slot, mask=o_p < context, other=0.0)[:, None]
    b_s = tl.where(((o_p < context) & (o_p >= first))[:, None], b_s, float("-inf"))
    # Scaled after the maximum: one multiplication a head instead of one an element, the other fuses with the subtraction.
    b_new = tl.maximum(b_max, tl.max(b_s, axis=0) * scale)
    b_p = tl.exp2(b_s * scale - b_new[None, :])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=0)
    b_vs = tl.load(p_v_scales + o_slot, mask=(o_p < context) & (o_p >= first), other=0.0)
    # In units of the largest scale so far, and up to 2^15: a float16 ends at 2^-24, and where one position outweighs the others what these
    # weigh times a small scale would be lost, though their sum is not.
    new_top = tl.maximum(top, tl.max(b_vs, axis=0))
    b_p *= (b_vs * (32768 / new_top))[:, None]
    b_acc = b_acc * (b_scale * (top / new_top))[None, :] + tl.dot(b_vt, b_p.to(tl.float16))
    return b_acc, b_sum, b_new, new_top


@quick
@triton.jit(do_not_specialize=["table_stride", "window"])
def decode_int8_kernel(
    p_q, p_k_cache, p_v_cache, p_k_scales, p_v_scales, p_tables, p_units, p_arrivals, p_out, p_partial, p_lse,
    q_token, q_head, table_stride, scale, window,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_2: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    H_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend one unit for one kv head: see `decode_attention.decode_attention`, which launches it."""
    i_head = tl.program_id(0)
    i_row, i_from, i_end, context, i_part, num_parts, i_slot = load_unit(p_units, tl.program_id(1), FIELDS)
    if i_row < 0:
        return
    p_table = p_tables + i_row * table_stride
    # A padding row has no tile: what its table says is read as a page number, but nothing at that page.
    i_page = page_of(p_table, i_from, S, TILE)
    o_g = tl.arange(0, GROUP_PAD)
    o_h = tl.arange(0, H_PAD)
    m_hg = (o_h < H)[:, None] & (o_g < GROUP)[None, :]
    p_head = p_q + i_row * q_token + (i_head * GROUP + o_g)[None, :] * q_head + o_h[:, None]
    b_qt = tl.load(p_head, mask=m_hg, other=0.0).to(tl.float16)
    b_acc = tl.zeros([H_PAD, GROUP_PAD], dtype=tl.float32)
    b_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
    b_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    top = 1e-30
    first = context * 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    # All tiles in one loop, the last one masked like the others: on its own it would wait for its keys with nothing in flight.
    for i_tile in tl.range(i_from, i_end, num_stages=STAGES):
        # The next page's number is fetched a tile early: waiting for it would leave one tile in flight instead of STAGES.
        i_next = page_of(p_table, tl.minimum(i_tile + 1, i_end - 1), S, TILE)
        b_acc, b_sum, b_max, top = _attend_tile(
            b_acc, b_sum, b_max, top, b_qt, p_k_cache, p_v_cache, p_k_scales, p_v_scales, p_table, i_page, i_tile, i_head, context, first, K, scale,
            S, H, H_PAD, TILE,
        )  # fmt: skip
        i_page = i_next
    b_out = b_acc * (top / 32768) / tl.where(b_sum > 0, b_sum, 1.0)[None, :]
    leave(
        b_out, o_g[None, :] * H + o_h[:, None], m_hg, b_max + tl.log2(b_sum), o_g, p_out, p_partial, p_lse, p_arrivals, (i_row * K + i_head) * GROUP,
        i_slot * K + i_head, i_part, num_parts, K, GROUP, GROUP_2, H, H_PAD, PARTS,
    )  # fmt: skip
