"""What a program of decode attention leaves behind: a row's output, or a part of it in scratch, which the last one to arrive combines.

Parts are combined in their order: the result does not depend on who was last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.quick_launch import power_of_2

# Partial results that the combining program loads at once: enough to hide one load behind another, and numbers a thread for its registers.
_PARTS, _NUMBERS = 8, 64


@triton.jit
def _combine(
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


@triton.jit
def leave(
    b_out, o_gh, m_gh, b_lse, o_g, p_out, p_partial, p_lse, p_arrivals, o_row, i_first, i_part, num_parts, K,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store one kv head's result of a unit, `b_out` at the offsets `o_gh` from head `o_row`; `b_lse` [G] are its log-sums in base 2.

    `i_first`: the slot of the row's first part. What a row of several parts comes to is stored by the last of them.
    """
    if num_parts == 1:
        tl.store(p_out + o_row * H + o_gh, b_out.to(p_out.dtype.element_ty), mask=m_gh)
    else:
        o_part = (i_first + i_part * K) * GROUP
        tl.store(p_partial + o_part * H + o_gh, b_out, mask=m_gh)
        tl.store(p_lse + o_part + o_g, b_lse, mask=o_g < GROUP)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        if tl.atomic_add(p_arrivals + i_first, 1, sem="acq_rel") == num_parts - 1:
            _combine(p_partial, p_lse, p_out + o_row * H, i_first, num_parts, K, GROUP, GROUP_2, H, H_PAD, PARTS)
            tl.store(p_arrivals + i_first, 0)


def parts_at_once(group: int, head_dim: int, num_warps: int) -> int:
    """Give how many partial results a program combines at once."""
    return max(1, min(_PARTS, 32 * num_warps * _NUMBERS // (power_of_2(group) * power_of_2(head_dim))))
