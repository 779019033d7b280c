"""Copying whole KV blocks: inside their caches, for requests that fork, and between caches on a device and in host memory.

Knows nothing of who owns a block, nor of when one is worth moving.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]] | Tensor) -> None:
    """Copy block `source` to block `destination` in every cache, for each (source, destination) of `pairs`.

    `caches`: tensors [B, ...], contiguous. No block may be both a source and a destination, nor twice a destination:
    the copies run in no order.
    """
    if not caches or len(pairs) == 0:
        return
    device = caches[0].device
    pairs_P2 = pairs if isinstance(pairs, Tensor) else torch.tensor(pairs, dtype=torch.int64, device=device)
    if caches[0].is_cuda:
        from kernels.gpu import blocks as gpu

        gpu.copy_blocks(caches, pairs_P2)
    else:
        reference.copy_blocks(caches, pairs_P2)


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Sequence[tuple[int, int]] | Tensor) -> None:
    """Copy block `source` of sources[i] to block `destination` of destinations[i], for every i and each pair.

    Both are contiguous tensors [B, ...] with blocks of equal shape and type; one side may lie in pinned host memory
    (ValueError if it is not pinned) and the other on a device, either way round. No block may be twice a destination.
    The copy is work of the device's current stream: host memory may be read, or written again, once that has come so far.
    """
    if len(sources) != len(destinations):
        raise ValueError(f"{len(sources)} caches to swap from and {len(destinations)} to swap to")
    for source, destination in zip(sources, destinations, strict=True):
        if (source.shape[1:], source.dtype) != (destination.shape[1:], destination.dtype):
            raise ValueError(
                f"blocks of {source.shape[1:]} {source.dtype} don't fit {destination.shape[1:]} {destination.dtype}"
            )
    if not sources or len(pairs) == 0:
        return
    device = next((cache.device for cache in (*sources, *destinations) if cache.is_cuda), sources[0].device)
    pairs_P2 = torch.as_tensor(pairs, dtype=torch.int64, device=device)
    if device.type == "cuda":
        from kernels.gpu import blocks as gpu

        gpu.swap_blocks(sources, destinations, pairs_P2)
    else:
        reference.swap_blocks(sources, destinations, pairs_P2)
