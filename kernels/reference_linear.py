"""The linear layer of a few rows, with what stands before and behind it, in plain PyTorch: the truth of `kernels.skinny_gemm`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels import reference


def skinny_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_I: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Norm, product, bias, gate and residual in float32 (float64 stays), rounded once at the end to x's dtype."""
    x = reference.wide(x_TI)
    if norm_I is not None:
        x = reference.rms_norm(x, norm_I, eps)
    y = F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
    if gated:
        y = reference.silu_mul(y)
    if residual_TO is not None:
        y = y + residual_TO.to(x.dtype)
    return y.to(x_TI.dtype)
