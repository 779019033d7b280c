"""A linear layer for a few rows, as one op with the norm before it and the gate or the residual behind it.

A step of few rows reads the weights and little else; each pass over its small activations is a kernel in which nothing of the weights
moves. Knows nothing of layers, nor when another GEMM would be faster (`engine.gemm_table` measures that).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference_linear


def skinny_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_I: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
) -> Tensor:
    """Give x · Wᵀ + b [T, O], where x is normed first if there is a `norm_I`, gated and added to `residual_TO` where asked.

    `x_TI` float32, float16 or bfloat16 with a contiguous last dimension; `weight_OI` contiguous, in x's dtype. `gated`: the
    rows of W are gate and up, one below the other, and the result is silu(gate) · up, [T, O / 2]. Computed in float32; on a GPU the
    normed rows are rounded to x's dtype where the tensor cores multiply them. The result is written into `out_TO`, where
    there is one, or it may be written over `residual_TO`: read what is returned. On a GPU only what `serves` says is served.
    """
    if x_TI.is_cuda:
        from kernels.gpu import skinny_gemm as gpu

        return gpu.skinny_linear(
            x_TI, weight_OI, bias_O, norm_I=norm_I, eps=eps, residual_TO=residual_TO, gated=gated, out_TO=out_TO
        )
    y_TO = reference_linear.skinny_linear(x_TI, weight_OI, bias_O, norm_I=norm_I, eps=eps, residual_TO=residual_TO, gated=gated)
    return y_TO if out_TO is None else out_TO.copy_(y_TO)


def serves(rows: int, weight_OI: Tensor) -> bool:
    """Whether `skinny_linear` can multiply so many rows by this weight: on a CPU always."""
    if weight_OI.is_cuda:
        from kernels.gpu import skinny_gemm as gpu

        return gpu.serves(rows, weight_OI)
    return True


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
    """Compile what `skinny_linear` launches for `rows` rows of a layer [width (of each half where gated), inner], if it serves them.

    For a thread beside the one that loads the weights. Nothing on a CPU.
    """
    if device.type == "cuda":
        from kernels.gpu import skinny_gemm as gpu

        gpu.prepare(
            rows=rows,
            width=width,
            inner=inner,
            dtype=dtype,
            device=device,
            norm=norm,
            gated=gated,
            bias=bias,
            residual=residual,
        )
