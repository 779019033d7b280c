"""Sums over the ranks in plain PyTorch, all ranks' parts at hand: the truth that the kernels over peer memory are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference import add_rms_norm, wide


def one_shot(parts: Sequence[Tensor], rows: int, dim: int) -> Tensor:
    """Sum the first rows · dim elements of each part in their order, in float32, rounded once: [rows, dim]."""
    total = wide(parts[0][: rows * dim])
    for part in parts[1:]:
        total = total + wide(part[: rows * dim])
    return total.to(parts[0].dtype).view(rows, dim)


def one_shot_add_rms_norm(
    parts: Sequence[Tensor], residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rms_norm(sum + residual), sum + residual)."""
    return add_rms_norm(one_shot(parts, *residual_TD.shape), residual_TD, weight_D, eps)


def two_shot(parts: Sequence[Tensor], rank: int, rows: int, dim: int) -> Tensor:
    """Write the sum into every part and give this rank's."""
    total_TD = one_shot(parts, rows, dim)
    for part in parts:
        part[: rows * dim] = total_TD.view(-1)
    return parts[rank][: rows * dim].view(rows, dim)


def gather_columns(parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Put [rows, columns] of each part side by side."""
    return torch.cat([part[: rows * columns].view(rows, columns) for part in parts], dim=1)
