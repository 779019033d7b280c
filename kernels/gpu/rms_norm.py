"""RMS norm on the GPU: one program a row, the row held in registers between the sum of squares and the scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch_ahead
from kernels.gpu.quick_launch import power_of_2, quick


@quick
@triton.jit
def _rms_norm_kernel(
    p_x, p_residual, p_weight, p_out, x_stride, residual_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_ahead.release(PDL)
    launch_ahead.wait(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_x = tl.load(p_x + i_row * x_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        p_sum = p_residual + i_row * residual_stride + o_d
        b_sum = b_x + tl.load(p_sum, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_sum.to(p_residual.dtype.element_ty)
        tl.store(p_sum, b_sum, mask=m_d)
        b_x = b_sum.to(tl.float32)
    b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * D + o_d, (b_x * b_scale * b_weight).to(p_out.dtype.element_ty), mask=m_d)


def _num_warps(block: int) -> int:
    """Enough warps that a thread holds about 8 values: with more, a row of 8k spills; with fewer threads it crawls."""
    return min(16, max(1, block // 256))


def _launch(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    dim = x_TD.shape[-1]
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rows = x_TD.reshape(-1, dim)
    residual = rows if residual_TD is None else residual_TD.view(-1, dim)
    if len(rows):
        block = power_of_2(dim)
        _rms_norm_kernel[(len(rows),)](
            rows,
            residual,
            weight_D,
            out,
            rows.stride(0),
            residual.stride(0),
            eps,
            D=dim,
            BLOCK=block,
            ADD=residual_TD is not None,
            **launch_ahead.options(x_TD.device),
            num_warps=_num_warps(block),
        )
    return out


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    return _launch(x_TD, None, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.rms_norm.add_rms_norm`; the sum is written over `residual_TD`."""
    return _launch(x_TD, residual_TD, weight_D, eps), residual_TD
