"""Norms, rotary embedding, activation and block copy in plain PyTorch.

This is the truth that the Triton kernels are held to, and what runs on a CPU. Attention and sampling have files of their own.
Every function computes in float32 (float64 stays float64) and rounds once at the end. Knows no device but the tensors' own.

T tokens, D hidden, F intermediate, N query heads, K kv heads, H head dim, M positions, B blocks, S positions a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kernels.attention import KVScales


def wide(x: Tensor) -> Tensor:
    """`x` in the type the mathematics is done in: float64 stays, anything smaller becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by sqrt(mean(x²) + eps) over the last dimension and multiply by the weight; in x's dtype."""
    x = wide(x_TD)
    return F.rms_norm(x, (x.shape[-1],), weight_D.to(x.dtype), eps).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum, which is rounded to the residual's dtype before it is normed."""
    total_TD = (wide(x_TD) + wide(residual_TD)).to(residual_TD.dtype)
    return rms_norm(total_TD, weight_D, eps), total_TD


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(gate) · up, where gate is the first half of the last dimension."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    if x_T2F.dtype in (torch.float32, torch.float64):
        return F.silu(gate_TF).mul_(up_TF)
    return (F.silu(gate_TF.float()) * up_TF.float()).to(x_T2F.dtype)


def rotate(x_TNH: Tensor, cos_sin_TH: Tensor) -> Tensor:
    """NeoX half rotation of the first R = cos_sin.shape[-1] dims; the dims after them pass unchanged. In x's dtype."""
    rotary = cos_sin_TH.shape[-1]
    half = rotary // 2
    x = wide(x_TNH)
    cos_T1h = cos_sin_TH[:, None, :half]
    sin_T1h = cos_sin_TH[:, None, half:]
    first, second = x[..., :half], x[..., half:rotary]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.sub(first * cos_T1h, second * sin_T1h, out=out[..., :half])
    torch.add(second * cos_T1h, first * sin_T1h, out=out[..., half:rotary])
    if rotary < x.shape[-1]:
        out[..., rotary:] = x[..., rotary:]
    return out.to(x_TNH.dtype)


def quantise(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """Give x / s rounded to int8, and s [T, K] in float32: the largest magnitude of the last dimension over 127, infinite where x isn't finite."""
    x = wide(x_TKH)
    largest_TK = x.abs().amax(-1)
    largest_TK = largest_TK.masked_fill(~largest_TK.isfinite(), torch.inf)
    inverse_TK = 127 / largest_TK.clamp(min=1e-30)  # a head of zeros stays one
    return (x * inverse_TK[..., None] + 0.5).floor().nan_to_num(0).to(torch.int8), (largest_TK / 127).float()


def dequantise(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Give integers times their scales, one for all of the last dimension, rounded once to `dtype`."""
    return (x.to(torch.promote_types(dtype, torch.float32)) * scales[..., None]).to(dtype)


def by_position(v: Tensor) -> Tensor:
    """Give values [..., S / 4, H, 4] of an int8 cache as [..., S, H]."""
    return v.transpose(-1, -2).flatten(-3, -2)


def write_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    slots_T: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    scales: KVScales | None = None,
) -> None:
    """Store each token's key and value at its flat slot (block · S + position); a negative slot is a padding row."""
    size = k_cache_BKSH.shape[2]
    if bool((slots_T < 0).any()):
        keep = slots_T >= 0
        k_TKH, v_TKH, slots_T = k_TKH[keep], v_TKH[keep], slots_T[keep]
    block_T = torch.div(slots_T, size, rounding_mode="floor")
    offset_T = slots_T - block_T * size
    if scales is not None:
        k_cache_BKSH[block_T, :, offset_T], scales.k_BKS[block_T, :, offset_T] = quantise(k_TKH)
        v_cache_BKSH[block_T, :, offset_T // 4, :, offset_T % 4], scales.v_BKS[block_T, :, offset_T] = quantise(v_TKH)
        return
    k_cache_BKSH[block_T, :, offset_T] = k_TKH.to(k_cache_BKSH.dtype)
    v_cache_BKSH[block_T, :, offset_T] = v_TKH.to(v_cache_BKSH.dtype)


def rotary_kv_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_sin_MH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
    scales: KVScales | None = None,
) -> Tensor:
    """Per-head norm (where given), rotation of q and k, and the write of k and v into the cache; gives the new q."""
    cos_sin_TH = cos_sin_MH[positions_T]
    if q_norm_H is not None:
        q_TNH = rms_norm(wide(q_TNH), q_norm_H, eps)
    if k_norm_H is not None:
        k_TKH = rms_norm(wide(k_TKH), k_norm_H, eps)
    write_kv(rotate(k_TKH, cos_sin_TH), v_TKH, slots_T, k_cache_BKSH, v_cache_BKSH, scales)
    return rotate(q_TNH, cos_sin_TH).to(v_TKH.dtype)


def copy_blocks(caches: Sequence[Tensor], pairs_P2: Tensor) -> None:
    """cache[destination] = cache[source] for each (source, destination) row, all sources read before anything is written."""
    source_P, destination_P = pairs_P2.unbind(dim=1)
    for cache in caches:
        cache[destination_P] = cache[source_P]


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs_P2: Tensor) -> None:
    """destinations[i][destination] = sources[i][source] for each (source, destination) row."""
    source_P, destination_P = pairs_P2.unbind(dim=1)
    for source, destination in zip(sources, destinations, strict=True):
        destination[destination_P] = source[source_P]
