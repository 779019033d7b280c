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


def share_add_rms_norm(
    parts: Sequence[Tensor],
    rank: int,
    own_SD: Tensor,
    inbox: Tensor,
    residual_SD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    share: int,
) -> None:
    """Sum, add and norm `rank`'s rows, write the sum over `residual_SD` and the normed rows into every part."""
    rows, dim = own_SD.shape
    others = [inbox[number * share * dim :][: rows * dim] for number in range(len(parts) - 1)]
    mine = [*others[:rank], own_SD.reshape(-1), *others[rank:]]
    x_SD, total_SD = one_shot_add_rms_norm(mine, residual_SD, weight_D, eps)
    residual_SD.copy_(total_SD)
    for part in parts:
        part[rank * share * dim :][: rows * dim] = x_SD.view(-1)


def gather_columns(parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Put [rows, columns] of each part side by side."""
    return torch.cat([part[: rows * columns].view(rows, columns) for part in parts], dim=1)
