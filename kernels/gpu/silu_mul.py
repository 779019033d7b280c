"""SiLU · mul on the GPU: one pass over gate and up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch_ahead
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

_BLOCK = 1024


@quick
@triton.jit
def _silu_mul_kernel(p_x, p_out, x_stride, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_ahead.release(PDL)
    launch_ahead.wait(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    p_row = p_x + i_row * x_stride
    b_gate = tl.load(p_row + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(p_row + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + i_row * F + o_f, b_out.to(p_out.dtype.element_ty), mask=m_f)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """See `kernels.silu_mul.silu_mul`."""
    tokens, dim = x_T2F.shape[0], x_T2F.shape[1] // 2
    out_TF = torch.empty((tokens, dim), dtype=x_T2F.dtype, device=x_T2F.device)
    if tokens:
        block = min(_BLOCK, power_of_2(dim))
        _silu_mul_kernel[(tokens, ceil_div(dim, block))](
            x_T2F,
            out_TF,
            x_T2F.stride(0),
            F=dim,
            BLOCK=block,
            num_warps=max(1, block // 256),
            **launch_ahead.options(x_T2F.device),
        )
    return out_TF
