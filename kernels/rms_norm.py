"""Root-mean-square norm, alone or fused with the residual addition before it. Knows nothing of layers."""

from __future__ import annotations

from torch import Tensor

from kernels import reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by sqrt(mean(x²) + eps) over the last dimension and multiply by the weight.

    `x_TD` [..., D] float32, float16 or bfloat16 with a contiguous last dimension; `weight_D` [D]. Gives x's shape and dtype.
    Computed in float32, rounded once.
    """
    if x_TD.is_cuda:
        from kernels.gpu import rms_norm as gpu

        return gpu.rms_norm(x_TD, weight_D, eps)
    return reference.rms_norm(x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the end of one sublayer and the start of the next in one pass.

    The sum is rounded to the residual's dtype before it is normed. It may be written over `residual_TD`: read the returned
    tensor, not the argument.
    """
    if x_TD.is_cuda:
        from kernels.gpu import rms_norm as gpu

        return gpu.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)
