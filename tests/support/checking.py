"""What a check of a kernel is, where checks run, and how large the error of one may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Check(NamedTuple):
    """One comparison: an error that is NaN or above its bound failed."""

    op: str
    case: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


class Scale(NamedTuple):
    """Where checks run and how large they may be (the interpreter needs 10 to 30 ms a program)."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    small: bool
    shapes: Sequence[tuple[int, int, int, int]]
    """Attention's query heads, kv heads, head dim and block size."""


def randn(scale: Scale, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=scale.device).mul_(2).to(dtype)
