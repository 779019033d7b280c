"""x · Wᵀ for a few rows of x, on the GPU: what counts is that the weights stream without a pause.

A program takes a few outputs, all rows of x and the whole inner dimension: no sum is shared between programs, so a run equals the
one before bit for bit, and norm, gate and residual cost no pass of their own. What a kernel loses is its start and its end, when
too little is in flight; so the first weights are fetched before the kernel ahead has ended (`kernels.gpu.launch_ahead`).

One or two rows are multiplied on the plain cores: a thread holds neighbouring inputs of a few outputs and adds up by itself, and
threads meet once, at the end. More rows go to the tensor cores.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch_ahead
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick
from kernels.gpu.rms_norm import rms_norm

MAX_ROWS = 64
_STREAM_ROWS = 2
"""More rows than this on the plain cores, and arithmetic takes longer than the weights (H200: four rows 77 us against 56)."""
_PROGRAMS = 160
"""Programs that give every multiprocessor of a large GPU one, and some a second."""
_FEW_PROGRAMS = 96
"""Programs below which too many multiprocessors have none."""


@triton.jit
def _no_blocks():
    """An empty tuple, to which a block for each row of x is added."""
    return ()


@triton.jit
def _load_rows(p_x, x_stride, o_k, m_k, ROWS: tl.constexpr):
    """One block for each row of x."""
    b_rows = _no_blocks()
    for i_row in tl.static_range(ROWS):
        b_rows += (tl.load(p_x + i_row * x_stride + o_k, mask=m_k, other=0.0),)
    return b_rows


@triton.jit
def _sums(b_products, BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr):
    """Sums of VEC neighbours, [BN, BK / VEC]: neighbours lie in one thread."""
    return tl.sum(tl.reshape(b_products, (BN, BK // VEC, VEC)), axis=2)


@triton.jit
def _finish(
    b_y, b_up, p_bias, p_residual, o_n, m_n, N, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """Bias, gate and residual of outputs in float32. `o_n`, `m_n` and the residual's addresses broadcast to them."""
    if BIAS:
        b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        if GATED:
            b_up += tl.load(p_bias + N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if GATED:
        b_y = b_y / (1.0 + tl.exp(-b_y)) * b_up
    if RESIDUAL:
        b_y += tl.load(p_residual, mask=m_n, other=0.0).to(tl.float32)
    return b_y


@quick
@triton.jit(do_not_specialize=["N"])
def _stream_kernel(
    p_x, p_weight, p_bias, p_norm, p_residual, p_out, N, K, x_stride, residual_stride, out_stride, eps,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_ahead.release(PDL)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n = (o_n < N)[:, None]
    p_w = p_weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    gap = N.to(tl.int64) * K  # from a row of gate to its row of up
    b_w = tl.load(p_w, mask=m_n & (o_k < K)[None, :], other=0.0)
    if GATED:
        b_v = tl.load(p_w + gap, mask=m_n & (o_k < K)[None, :], other=0.0)
    if NORM:
        b_g = tl.load(p_norm + o_k, mask=o_k < K, other=0.0)
    launch_ahead.wait(PDL)
    b_x = _load_rows(p_x, x_stride, o_k, o_k < K, ROWS)
    b_acc = _no_blocks()
    b_up = _no_blocks()
    b_square = _no_blocks()
    for _ in tl.static_range(ROWS):
        b_acc += (tl.zeros([BN, BK // VEC], dtype=tl.float32),)
        b_up += (tl.zeros([BN, BK // VEC], dtype=tl.float32),)
        b_square += (tl.zeros([BK], dtype=tl.float32),)
    for i_k in range(0, K, BK):
        # Everything that the next step multiplies is on its way before this one's products are made.
        m_next = o_k < K - i_k - BK
        b_next_x = _load_rows(p_x + i_k + BK, x_stride, o_k, m_next, ROWS)
        b_next_w = tl.load(p_w + i_k + BK, mask=m_n & m_next[None, :], other=0.0)
        if GATED:
            b_next_v = tl.load(p_w + gap + i_k + BK, mask=m_n & m_next[None, :], other=0.0)
        if NORM:
            b_next_g = tl.load(p_norm + i_k + BK + o_k, mask=m_next, other=0.0)
        b_sum = _no_blocks()
        b_up_sum = _no_blocks()
        b_square_sum = _no_blocks()
        for i_row in tl.static_range(ROWS):
            b_wide = b_x[i_row].to(tl.float32)
            if NORM:
                b_square_sum += (b_square[i_row] + b_wide * b_wide,)
                b_wide *= b_g.to(tl.float32)
            b_wide = b_wide[None, :]
            b_sum += (b_acc[i_row] + _sums(b_w.to(tl.float32) * b_wide, BN, BK, VEC),)
            if GATED:
                b_up_sum += (b_up[i_row] + _sums(b_v.to(tl.float32) * b_wide, BN, BK, VEC),)
        b_acc, b_x, b_w = b_sum, b_next_x, b_next_w
        if GATED:
            b_up, b_v = b_up_sum, b_next_v
        if NORM:
            b_square, b_g = b_square_sum, b_next_g
    for i_row in tl.static_range(ROWS):
        b_y = tl.sum(b_acc[i_row], axis=1)
        b_u = tl.sum(b_up[i_row], axis=1)
        if NORM:
            # One factor for the whole row, so it may come after the sums.
            scale = 1.0 / tl.sqrt(tl.sum(b_square[i_row], axis=0) / K + eps)
            b_y *= scale
            b_u *= scale
        p_from = p_residual + i_row * residual_stride + o_n
        b_y = _finish(b_y, b_u, p_bias, p_from, o_n, o_n < N, N, GATED, BIAS, RESIDUAL)
        tl.store(p_out + i_row * out_stride + o_n, b_y.to(p_out.dtype.element_ty), mask=o_n < N)


@quick
@triton.jit(do_not_specialize=["rows", "N"])
def _dot_kernel(
    p_x, p_weight, p_bias, p_residual, p_out, rows, N, K, x_stride, residual_stride, out_stride,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, BK)
    # Outputs past the end repeat the last one and are not stored: a mask on each load of the loop would cost more.
    p_w = p_weight + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    gap = N.to(tl.int64) * K
    launch_ahead.wait(PDL)
    m_m = (o_m < rows)[:, None]
    p_row = p_x + o_m[:, None] * x_stride + o_k[None, :]
    b_y = tl.zeros([M, BN], dtype=tl.float32)
    b_up = tl.zeros([M, BN], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        b_x = tl.load(p_row + i_k, mask=m_m, other=0.0)
        b_y = tl.dot(b_x, tl.trans(tl.load(p_w + i_k)), b_y, input_precision="ieee")
        if GATED:
            b_up = tl.dot(b_x, tl.trans(tl.load(p_w + gap + i_k)), b_up, input_precision="ieee")
    launch_ahead.release(PDL)
    m_mn = m_m & (o_n < N)[None, :]
    p_from = p_residual + o_m[:, None] * residual_stride + o_n[None, :]
    b_y = _finish(b_y, b_up, p_bias, p_from, o_n[None, :], m_mn, N, GATED, BIAS, RESIDUAL)
    tl.store(p_out + o_m[:, None] * out_stride + o_n[None, :], b_y.to(p_out.dtype.element_ty), mask=m_mn)


class SkinnyShape(NamedTuple):
    """How a launch is cut."""

    dot: bool
    """On the tensor cores."""
    columns: int
    """Outputs of a program (of each half, where gated)."""
    depth: int
    """Inputs of a step."""
    stages: int
    """Steps in flight; the plain cores always have two."""
    num_warps: int


@cache
def choose_shape(*, rows: int, width: int, inner: int, itemsize: int) -> SkinnyShape:
    """Cut a launch that gives `width` outputs of `rows` rows: on an H200 the best of those tried, in a whole decode step.

    On the tensor cores the widest programs that still give each multiprocessor more than one, or, where there are too few outputs
    for that, deeper steps.
    """
    wide = width >= 64 * _PROGRAMS
    if rows == 1 or (rows <= _STREAM_ROWS and not (wide and _fits_dot(inner, itemsize))):
        return SkinnyShape(dot=False, columns=4, depth=4 * 32 * 16 // itemsize, stages=2, num_warps=4)
    if wide:
        return SkinnyShape(dot=True, columns=64, depth=128, stages=3 if rows <= 16 else 4, num_warps=4)
    if rows > 32 and width >= 64 * _FEW_PROGRAMS:
        return SkinnyShape(dot=True, columns=64, depth=128, stages=4, num_warps=4)
    if width >= 32 * _PROGRAMS:
        return SkinnyShape(dot=True, columns=32, depth=128, stages=5, num_warps=4)
    if width >= 32 * _FEW_PROGRAMS:
        depth, stages = (256, 4) if rows <= 16 else (128, 6)
        return SkinnyShape(dot=True, columns=32, depth=depth, stages=stages, num_warps=4)
    return SkinnyShape(dot=True, columns=16, depth=128, stages=6, num_warps=2)


def _fits_dot(inner: int, itemsize: int) -> bool:
    """Whether the tensor cores may be used: they would round float32, and their loop has no mask, so it needs whole steps."""
    return itemsize == 2 and inner % 256 == 0


def serves(rows: int, weight_OI: Tensor) -> bool:
    """See `kernels.skinny_gemm.serves`."""
    aligned = weight_OI.is_contiguous() and weight_OI.data_ptr() % 16 == 0
    return aligned and _serves(rows, weight_OI.shape[1], weight_OI.element_size())


def _serves(rows: int, inner: int, itemsize: int) -> bool:
    if inner * itemsize % 16:
        return False
    return rows <= _STREAM_ROWS or (rows <= MAX_ROWS and _fits_dot(inner, itemsize))


def skinny_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    norm_I: Tensor | None,
    eps: float,
    residual_TO: Tensor | None,
    gated: bool,
    out_TO: Tensor | None = None,
    shape: SkinnyShape | None = None,
) -> Tensor:
    """See `kernels.skinny_gemm.skinny_linear`; the sum is written over `residual_TO`."""
    rows, inner = x_TI.shape
    width = len(weight_OI) // 2 if gated else len(weight_OI)
    if out_TO is None:
        out_TO = torch.empty((rows, width), dtype=x_TI.dtype, device=x_TI.device) if residual_TO is None else residual_TO
    if shape is None:
        shape = choose_shape(rows=rows, width=width, inner=inner, itemsize=x_TI.element_size())
    if shape.dot and norm_I is not None:
        # The tensor cores take x as it lies in memory.
        x_TI, norm_I = rms_norm(x_TI, norm_I, eps), None
    flags: dict[str, Any] = {"GATED": gated, "BIAS": bias_O is not None, "RESIDUAL": residual_TO is not None}
    flags |= {"BN": shape.columns, "BK": shape.depth, "num_warps": shape.num_warps, **launch_ahead.options(x_TI.device)}
    grid = (ceil_div(width, shape.columns),)
    sizes = (width, inner, x_TI.stride(0), out_TO.stride(0), out_TO.stride(0))
    if shape.dot:
        rows_padded = max(16, power_of_2(rows))
        _dot_kernel[grid](
            x_TI, weight_OI, bias_O, out_TO, out_TO, rows, *sizes, M=rows_padded, STAGES=shape.stages, **flags
        )  # fmt: skip
    else:
        vector = 16 // x_TI.element_size()
        _stream_kernel[grid](
            x_TI, weight_OI, bias_O, norm_I, out_TO, out_TO, *sizes, eps, ROWS=rows, VEC=vector, NORM=norm_I is not None, **flags
        )  # fmt: skip
    return out_TO


def prepare(
    *,
    rows: int,
    width: int,
    inner: int,
    dtype: torch.dtype,
    device: torch.device,
    norm: bool,
    gated: bool,
    bias: bool,
    residual: bool,
) -> None:
    """See `kernels.skinny_gemm.prepare`."""
    if not _serves(rows, inner, dtype.itemsize):
        return
    shape = choose_shape(rows=rows, width=width, inner=inner, itemsize=dtype.itemsize)
    # A launch is compiled for types, alignment and shape: a small layer of the same kind does for the real one.
    small = 256 if inner % 256 == 0 else inner
    outputs = 128 if gated else 64

    def fake(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    skinny_linear(
        fake(rows, small),
        fake(outputs, small),
        fake(outputs) if bias else None,
        norm_I=fake(small) if norm and not shape.dot else None,
        eps=1e-6,
        residual_TO=fake(rows, 64) if residual else None,
        gated=gated,
        shape=shape,
    )
