"""Copying whole KV blocks inside their caches, for requests that fork. Knows nothing of who owns a block."""

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
