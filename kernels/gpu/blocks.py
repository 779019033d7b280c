"""KV block copy and swap on the GPU: one launch a cache, whatever the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

_CHUNK = 4096


@quick
@triton.jit
def _copy_kernel(p_from, p_to, p_pairs, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    i_pair = tl.program_id(0)
    i_source = tl.load(p_pairs + 2 * i_pair).to(tl.int64)
    i_destination = tl.load(p_pairs + 2 * i_pair + 1).to(tl.int64)
    o_e = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m_e = o_e < SIZE
    b_e = tl.load(p_from + i_source * SIZE + o_e, mask=m_e)
    tl.store(p_to + i_destination * SIZE + o_e, b_e, mask=m_e)


def copy_blocks(caches: Sequence[Tensor], pairs_P2: Tensor) -> None:
    """See `kernels.blocks.copy_blocks`."""
    _copy(caches, caches, pairs_P2)


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs_P2: Tensor) -> None:
    """See `kernels.blocks.swap_blocks`. The device reads or writes the host's memory itself: pinned memory has an address there."""
    for tensor in (*sources, *destinations):
        if pairs_P2.is_cuda and not tensor.is_cuda and not tensor.is_pinned():
            raise ValueError("host blocks are swapped from and to pinned memory only: allocate them with pin_memory=True")
    _copy(sources, destinations, pairs_P2)


def _copy(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs_P2: Tensor) -> None:
    pairs_P2 = pairs_P2.contiguous()
    for source, destination in zip(sources, destinations, strict=True):
        size = source[0].numel()
        chunk = min(_CHUNK, power_of_2(size))
        grid = (len(pairs_P2), ceil_div(size, chunk))
        _copy_kernel[grid](source, destination, pairs_P2, SIZE=size, CHUNK=chunk, num_warps=4)
