"""The gated activation of a Llama-like MLP. Knows nothing of the matrices around it."""

from __future__ import annotations

from torch import Tensor

from kernels import reference


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(gate) · up, where `x_T2F` [T, 2F] holds gate in its first F columns and up in the others. Gives [T, F]."""
    if x_T2F.is_cuda:
        from kernels.gpu import silu_mul as gpu

        return gpu.silu_mul(x_T2F)
    return reference.silu_mul(x_T2F)
