"""Where a tile of positions lies in the paged cache: the addressing that both attention kernels share.

A tile is TILE positions of one row. Where a block holds at least a tile (S >= TILE; both are powers of two), its page number is
one scalar and its keys one contiguous run; where it does not, each position has a page number of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_of(p_table, i_tile, S: tl.constexpr, TILE: tl.constexpr):
    """Page number of a tile that lies in one block."""
    return tl.load(p_table + i_tile * TILE // S)


@triton.jit
def tile_slots(
    p_table,
    i_page,
    i_tile,
    i_head,
    context,
    K,
    S: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    EACH: tl.constexpr = 1,
):
    """Count the slots [TILE], int64, of a tile's positions from the cache's start, for one kv head: H numbers and one scale each.

    `i_page` is the tile's page where S >= TILE; elsewhere the table is read here, up to the context where MASKED.
    """
    o_t = tl.arange(0, TILE // EACH) * EACH
    if S >= TILE:
        return (i_page.to(tl.int64) * K + i_head) * S + i_tile * TILE % S + o_t
    o_p = i_tile * TILE + o_t
    if MASKED:
        i_pages = tl.load(p_table + o_p // S, mask=o_p < context, other=0).to(tl.int64)
    else:
        i_pages = tl.load(p_table + o_p // S).to(tl.int64)
    return (i_pages * K + i_head) * S + o_p % S
