"""The table of rotary angles: which cosine and sine belong to a position, for each way of stretching that we know."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


def cos_sin_table(rope: RopeSpec, *, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """Give float32 [positions, head_dim]: cosines in the first half of a row, sines in the second."""
    inverse_h = _inverse_frequencies(rope, head_dim)
    angles_Mh = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_h
    table_MH = torch.cat([angles_Mh.cos(), angles_Mh.sin()], dim=-1) * rope.attention_factor
    return table_MH.to(device)


class StretchedAngles(NamedTuple):
    """Angles of sequences that each have a base of their own (dynamic NTK). h half of the head dim."""

    inverse_h: Tensor
    """float32: what a position is multiplied with where nothing is stretched."""
    power_h: Tensor
    """float32: a base stretched by s^(H / (H - 2)) multiplies frequency i by s^(-2i / (H - 2))."""

    def table(self, positions_T: Tensor, stretch_T: Tensor) -> Tensor:
        """Give float32 [T, H] as `cos_sin_table` does, for each token by its position and its sequence's stretch (float32)."""
        angles_Th = positions_T[:, None] * (self.inverse_h * stretch_T[:, None] ** self.power_h)
        return torch.cat([angles_Th.cos(), angles_Th.sin()], dim=-1)


def stretched_angles(rope: RopeSpec, *, head_dim: int, device: torch.device) -> StretchedAngles | None:
    """Make them for a rope that is stretched from sequence to sequence; None for others."""
    if rope.kind != "dynamic":
        return None
    power_h = -torch.arange(0, head_dim, 2, dtype=torch.float32) / (head_dim - 2)
    return StretchedAngles(_inverse_frequencies(rope, head_dim).to(device), power_h.to(device))


def _inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    inverse_h = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inverse_h / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inverse_h)
    if rope.kind == "yarn":
        return _yarn(rope, inverse_h, head_dim)
    return inverse_h


def _llama3(rope: RopeSpec, inverse_h: Tensor) -> Tensor:
    """Stretch long waves by the factor, leave short ones, and blend in between."""
    turns_h = rope.original_max_positions * inverse_h / (2 * math.pi)  # how often a wave turns within the trained length
    keep_h = ((turns_h - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return keep_h * inverse_h + (1 - keep_h) * inverse_h / rope.factor


def _yarn(rope: RopeSpec, inverse_h: Tensor, head_dim: int) -> Tensor:
    """Blend like llama3, on a ramp over the dimension's number instead of over its wave length."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # a ramp of no width would divide by zero
    stretch_h = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return inverse_h * (1 - stretch_h) + inverse_h / rope.factor * stretch_h
