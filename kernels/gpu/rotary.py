"""Rotary embedding, q/k norm and KV write on the GPU: one launch, one program for a few heads of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch_ahead
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

if TYPE_CHECKING:
    from kernels.attention import KVScales

_HEADS = 8


@triton.jit
def _largest(b_x):
    """Give the largest magnitude of each row; infinite where one is no number."""
    return tl.max(tl.where(b_x == b_x, tl.abs(b_x), float("inf")), axis=1)


@triton.jit
def _whole(b_x, b_largest):
    """Give the whole numbers from -127 to 127 that rows stand for whose largest magnitudes are given."""
    b_inverse = 127 / tl.maximum(b_largest, 1e-30)  # a head of zeros stays one
    return tl.floor(b_x * b_inverse[:, None] + 0.5)


@triton.jit
def _rotate_heads(
    p_from, from_stride, p_to, to_stride, p_weight, p_angle, p_scale, scale_stride, eps, o_n, m_n,
    H: tl.constexpr, ROTARY: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, NORM: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Norm (if asked) and rotate the heads `o_n` of one token, from `p_from` to `p_to`; in float32, rounded once.

    With INT8 a head's scale goes to `p_scale`, `scale_stride` from head to head.
    """
    HALF: tl.constexpr = ROTARY // 2
    REST: tl.constexpr = H - ROTARY
    o_h = tl.arange(0, HALF_PAD)
    m_h = o_h < HALF
    m_nh = m_n[:, None] & m_h[None, :]
    p_first = p_from + o_n[:, None] * from_stride + o_h[None, :]
    b_first = tl.load(p_first, mask=m_nh, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + HALF, mask=m_nh, other=0.0).to(tl.float32)
    if NORM:
        b_square = tl.sum(b_first * b_first + b_second * b_second, axis=1)
    if REST > 0:
        o_r = ROTARY + tl.arange(0, REST_PAD)
        m_nr = m_n[:, None] & (o_r < H)[None, :]
        b_rest = tl.load(p_from + o_n[:, None] * from_stride + o_r[None, :], mask=m_nr, other=0.0).to(tl.float32)
        if NORM:
            b_square += tl.sum(b_rest * b_rest, axis=1)
    if NORM:
        b_scale = (1.0 / tl.sqrt(b_square / H + eps))[:, None]
        b_first *= b_scale * tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
        b_second *= b_scale * tl.load(p_weight + HALF + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_cos = tl.load(p_angle + o_h, mask=m_h, other=0.0)[None, :]
    b_sin = tl.load(p_angle + HALF + o_h, mask=m_h, other=0.0)[None, :]
    b_turned = b_first * b_cos - b_second * b_sin
    b_second = b_second * b_cos + b_first * b_sin
    if REST > 0 and NORM:
        b_rest *= b_scale * tl.load(p_weight + o_r, mask=o_r < H, other=0.0).to(tl.float32)[None, :]
    if INT8:
        b_largest = tl.maximum(_largest(b_turned), _largest(b_second))
        if REST > 0:
            b_largest = tl.maximum(b_largest, _largest(b_rest))
        tl.store(p_scale + o_n * scale_stride, b_largest / 127, mask=m_n)
        b_turned = _whole(b_turned, b_largest)
        b_second = _whole(b_second, b_largest)
        if REST > 0:
            b_rest = _whole(b_rest, b_largest)
    p_out = p_to + o_n[:, None] * to_stride + o_h[None, :]
    tl.store(p_out, b_turned.to(p_to.dtype.element_ty), mask=m_nh)
    tl.store(p_out + HALF, b_second.to(p_to.dtype.element_ty), mask=m_nh)
    if REST > 0:
        tl.store(p_to + o_n[:, None] * to_stride + o_r[None, :], b_rest.to(p_to.dtype.element_ty), mask=m_nr)


@quick
@triton.jit(do_not_specialize_on_alignment=["p_positions", "p_slots"])
def _rotary_kernel(
    p_q, p_k, p_v, p_out, p_k_cache, p_v_cache, p_k_scales, p_v_scales, p_angles, p_positions, p_slots, p_q_norm, p_k_norm, eps,
    q_token, q_head, k_token, k_head, v_token, v_head, angle_stride,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_ahead.release(PDL)
    launch_ahead.wait(PDL)
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (N + HEADS - 1) // HEADS
    K_PARTS: tl.constexpr = (K + HEADS - 1) // HEADS
    p_angle = p_angles + tl.load(p_positions + i_token) * angle_stride
    if i_part < Q_PARTS:
        o_n = i_part * HEADS + tl.arange(0, HEADS)
        _rotate_heads(
            p_q + i_token * q_token, q_head, p_out + i_token * N * H, H, p_q_norm, p_angle, p_k_scales, 0, eps, o_n, o_n < N,
            H, ROTARY, HALF_PAD, REST_PAD, Q_NORM, False,
        )  # fmt: skip
    else:
        i_slot = tl.load(p_slots + i_token)
        if i_slot >= 0:
            # (block, kv head 0, position); the heads of a block are S such apart.
            i_first = (i_slot // S) * (K * S) + i_slot % S
            i_cache = i_first * H
            if i_part < Q_PARTS + K_PARTS:
                o_k = (i_part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
                _rotate_heads(
                    p_k + i_token * k_token, k_head, p_k_cache + i_cache, S * H, p_k_norm, p_angle, p_k_scales + i_first, S,
                    eps, o_k, o_k < K, H, ROTARY, HALF_PAD, REST_PAD, K_NORM, INT8,
                )  # fmt: skip
            else:
                o_k = (i_part - Q_PARTS - K_PARTS) * HEADS + tl.arange(0, HEADS)
                o_h = tl.arange(0, H_PAD)
                m_kh = (o_k < K)[:, None] & (o_h < H)[None, :]
                b_v = tl.load(p_v + i_token * v_token + o_k[:, None] * v_head + o_h[None, :], mask=m_kh, other=0.0)
                if INT8:
                    b_v = b_v.to(tl.float32)
                    b_largest = _largest(b_v)
                    tl.store(p_v_scales + i_first + o_k * S, b_largest / 127, mask=o_k < K)
                    b_v = _whole(b_v, b_largest)
                p_to = p_v_cache + i_cache + o_k[:, None] * (S * H) + o_h[None, :]
                if INT8:
                    # [S / 4, H, 4]: four positions of a dimension are one word.
                    i_word = (i_slot // S) * (K * S * H) + (i_slot % S // 4) * (4 * H) + i_slot % 4
                    p_to = p_v_cache + i_word + o_k[:, None] * (S * H) + o_h[None, :] * 4
                tl.store(p_to, b_v.to(p_v_cache.dtype.element_ty), mask=m_kh)


def rotary_kv_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_sin_MH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    scales: KVScales | None = None,
) -> Tensor:
    """See `kernels.rotary.rotary_kv_write`."""
    tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    rotary = cos_sin_MH.shape[1]
    out_TNH = torch.empty((tokens, num_heads, head_dim), dtype=q_TNH.dtype, device=q_TNH.device)
    if not tokens:
        return out_TNH
    heads = min(_HEADS, power_of_2(num_heads))
    grid = (tokens, ceil_div(num_heads, heads) + 2 * ceil_div(num_kv_heads, heads))
    _rotary_kernel[grid](
        q_TNH,
        k_TKH,
        v_TKH,
        out_TNH,
        k_cache_BKSH,
        v_cache_BKSH,
        *(scales or (q_TNH, q_TNH)),
        cos_sin_MH,
        positions_T,
        slots_T,
        q_TNH if q_norm_H is None else q_norm_H,
        q_TNH if k_norm_H is None else k_norm_H,
        eps,
        *q_TNH.stride()[:2],
        *k_TKH.stride()[:2],
        *v_TKH.stride()[:2],
        cos_sin_MH.stride(0),
        N=num_heads,
        K=num_kv_heads,
        S=size,
        H=head_dim,
        H_PAD=power_of_2(head_dim),
        ROTARY=rotary,
        HALF_PAD=power_of_2(rotary // 2),
        REST_PAD=power_of_2(max(1, head_dim - rotary)),
        HEADS=heads,
        Q_NORM=q_norm_H is not None,
        K_NORM=k_norm_H is not None,
        INT8=scales is not None,
        **launch_ahead.options(q_TNH.device),
        num_warps=2,
    )
    return out_TNH
