"""KV block copy on the GPU: one launch a cache, whatever the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096


@triton.jit
def _copy_kernel(p_cache, p_pairs, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    i_pair = tl.program_id(0)
    i_source = tl.load(p_pairs + 2 * i_pair).to(tl.int64)
    i_destination = tl.load(p_pairs + 2 * i_pair + 1).to(tl.int64)
    o_e = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m_e = o_e < SIZE
    b_e = tl.load(p_cache + i_source * SIZE + o_e, mask=m_e)
    tl.store(p_cache + i_destination * SIZE + o_e, b_e, mask=m_e)


def copy_blocks(caches: Sequence[Tensor], pairs_P2: Tensor) -> None:
    """See `kernels.blocks.copy_blocks`."""
    pairs_P2 = pairs_P2.contiguous()
    for cache in caches:
        size = cache[0].numel()
        chunk = min(_CHUNK, triton.next_power_of_2(size))
        _copy_kernel[(len(pairs_P2), triton.cdiv(size, chunk))](cache, pairs_P2, SIZE=size, CHUNK=chunk, num_warps=4)
