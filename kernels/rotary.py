"""Rotary embedding, with the optional q/k norm before it and the KV write after it, as one op.

So a token's key and value go from the projection to the paged cache without another trip through memory. Knows nothing of how
the angles were scaled.
"""

from __future__ import annotations

from torch import Tensor

from kernels import reference
from kernels.attention import KVScales


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
    """Rotate q and k (NeoX halves), write k and v into the cache, and give the rotated q [T, N, H] as a new tensor.

    q, k and v may be strided views of one projection, with a contiguous last dimension. `cos_sin_MH` is float32: row m
    holds the cosines of position m's angles in its first half and the sines in its second; when it is narrower than H,
    only that many leading dims are rotated. `positions_T` and `slots_T` are int64; a slot is block · S + position in
    the block, and a row with slot -1 is padding: its k and v are not written (its position must still be a row of
    `cos_sin_MH`). `q_norm_H` and `k_norm_H`: weights of a per-head RMS norm before the rotation (Qwen3).

    With `scales` the caches are int8: a key or value x [H] is written as floor(x / s + 1/2) with s = max |x| / 127, and s beside it. Where
    one of its numbers isn't finite s is infinite, so that what is read is no number either.
    """
    arguments = (
        q_TNH,
        k_TKH,
        v_TKH,
        cos_sin_MH,
        positions_T,
        slots_T,
        k_cache_BKSH,
        v_cache_BKSH,
        q_norm_H,
        k_norm_H,
        eps,
        scales,
    )
    if q_TNH.is_cuda:
        from kernels.gpu import rotary as gpu

        return gpu.rotary_kv_write(*arguments)
    return reference.rotary_kv_write(*arguments)
