"""How the rows of one token are shared among programs: worked out on the device, once for all layers of a step.

A unit of work is a stretch of one row's tiles; each is done for every kv head by a program of its own. Rows longer than the
fair share of the step's tiles are cut into parts of nearly equal length, and the longest units come first: what starts last is
short, so that a few long rows among many short ones take hardly longer than equal rows of the same sum. The number of units
has a bound that depends on the number of rows only; the rest are marked as no work. So one captured graph serves every length.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

FIELDS = 8
"""int32 of a unit: row (-1 = no work), first and end tile, the row's context, part, parts of the row, slot of its first part."""
_BLOCK = 64
_WAYS, _WAYS_INT8 = (2.2, 3.2, 5.0, 7.0, 16.0), (1.2,)
"""Rows times kv heads for each multiprocessor, up to and with which launches are cut one way; another way each, and one above them all."""


class DecodeShape(NamedTuple):
    """How a decode launch is cut."""

    tile: int
    programs: int
    """Rows are cut so that no unit is longer than this share of all tiles and heads."""
    least: int
    """No part has fewer tiles than this: a smaller one costs more to combine than it gains."""
    num_warps: int
    stages: int
    most: int | None = None
    """No more programs than this, where there are fewer rows and heads: units get longer until they fit. None: any number."""


def choose_shape(
    *, rows: int, num_kv_heads: int, head_dim: int, block_size: int, itemsize: int, num_sms: int, shared_memory: int
) -> DecodeShape:
    """Cut a launch for a device whose programs may have `shared_memory` bytes. Nothing here depends on a step's lengths.

    Measured on an H200 with lengths equal, uniform, and a sixteenth of them long: the way with the least time over a plain read, the three
    kinds counted alike. Few units want to be small ones that all run at once, and no programs without work among them: those take places
    that would have evened out the load (up to 5 us of 35). From 37 rows of 8 heads on that leaves too few units to cut the long ones into.
    Then two programs a multiprocessor, up to 82 rows one with four tiles in flight, up to 115 two again even out lengths best, and many
    want room for one another; very many are those that GEMMs before and behind have slowed the clock for, where a third tile in flight is
    worth 1 to 2 % of the step (512 rows).

    Integers (an itemsize of 1) are widened before they are multiplied: programs of one warp, which waits for nobody, and many of them.
    """
    if itemsize == 1:
        warps, few = 1 if head_dim <= 128 else 2, not bisect_left(_WAYS_INT8, rows * num_kv_heads / num_sms)
        return DecodeShape(tile=32, programs=(4 if few else 8) * num_sms, least=4, num_warps=warps, stages=3 if few else 4)
    tile = min(block_size, 64) if block_size >= 32 else 32
    if itemsize == 4 or head_dim > 128:
        return DecodeShape(tile=min(tile, 32), programs=num_sms, least=2, num_warps=4, stages=3)
    in_flight = 4 * 2 * tile * power_of_2(head_dim) * itemsize  # keys and values, as wide as the kernel loads them
    ways = (
        DecodeShape(tile=32, programs=2 * num_sms, least=4, num_warps=2, stages=3, most=3 * num_sms),
        DecodeShape(tile=tile, programs=2 * num_sms, least=2, num_warps=2, stages=3),
        DecodeShape(tile=tile, programs=2 * num_sms, least=2, num_warps=4, stages=4 if in_flight < shared_memory else 3),
        DecodeShape(tile=tile, programs=3 * num_sms, least=2, num_warps=4, stages=3),
        DecodeShape(tile=tile, programs=4 * num_sms, least=2, num_warps=2, stages=2),
        DecodeShape(tile=tile, programs=4 * num_sms, least=2, num_warps=2, stages=3),
    )
    return ways[bisect_left(_WAYS, rows * num_kv_heads / num_sms)]


def first_rows(*, num_kv_heads: int, num_sms: int, itemsize: int) -> tuple[int, ...]:
    """Give the least row count of each way in which launches over a cache of numbers of `itemsize` bytes are cut."""
    ways = _WAYS_INT8 if itemsize == 1 else _WAYS
    return (1, *(int(most * num_sms) // num_kv_heads + 1 for most in ways))


class DecodePlan(NamedTuple):
    """The units of a step, on the device."""

    sliding_window: int | None
    shape: DecodeShape
    units: Tensor
    """int32 [U, 8], see `FIELDS`."""
    arrivals: Tensor
    """int32 [slots, K]: how many parts of a cut row are done, at its first part's slot. Zero between launches."""


@triton.jit
def load_unit(p_units, i_unit, FIELDS: tl.constexpr):
    """Give a unit's row (int64; -1: no work), first and end tile, context, part, parts of the row and slot of its first part."""
    p_unit = p_units + i_unit * FIELDS
    i_row = tl.load(p_unit).to(tl.int64)
    i_from = tl.load(p_unit + 1)
    i_end = tl.load(p_unit + 2)
    context = tl.load(p_unit + 3)
    i_part = tl.load(p_unit + 4)
    num_parts = tl.load(p_unit + 5)
    return i_row, i_from, i_end, context, i_part, num_parts, tl.load(p_unit + 6)


@triton.jit
def visible(context, window, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Give (first visible position, its tile, number of tiles) of one row or of a block of rows."""
    first = context * 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    i_low = first // TILE
    return first, i_low, (context + TILE - 1) // TILE - i_low


@triton.jit
def _parts(p_lens, o_r, R, window, cap, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Give (context, first tile, tiles, parts, tiles a part) of a block of rows; a row past the last has no parts."""
    b_context = tl.load(p_lens + o_r, mask=o_r < R, other=0)
    _first, b_low, b_tiles = visible(b_context, window, TILE, WINDOW)
    b_parts = tl.maximum((b_tiles + cap - 1) // cap, 1)
    b_size = (b_tiles + b_parts - 1) // b_parts
    return b_context, b_low, b_tiles, tl.where(o_r < R, b_parts, 0), b_size


@triton.jit
def _count(p_lens, R, window, cap, TILE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Count the units that the rows are cut into."""
    count = 0
    for start in range(0, R, BLOCK):
        _c, _l, _t, b_parts, _s = _parts(p_lens, start + tl.arange(0, BLOCK), R, window, cap, TILE, WINDOW)
        count += tl.sum(b_parts, axis=0)
    return count


@quick
@triton.jit(do_not_specialize=["R", "window", "share_of", "least", "num_units", "num_arrivals"])
def _plan_kernel(
    p_lens, p_units, p_arrivals, R, window, share_of, least, num_units, num_arrivals,
    TILE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    total = 0
    for start in range(0, R, BLOCK):
        _c, _l, b_tiles, _p, _s = _parts(p_lens, start + tl.arange(0, BLOCK), R, window, 1, TILE, WINDOW)
        total += tl.sum(b_tiles, axis=0)
    cap = tl.maximum((total + share_of - 1) // share_of, least)
    if num_units < R + share_of:
        # There may be more units than room for them: they get longer until they fit, at the latest when no row is cut.
        wanted = _count(p_lens, R, window, cap, TILE, WINDOW, BLOCK)
        while wanted > num_units:
            cap += (cap + 7) // 8
            wanted = _count(p_lens, R, window, cap, TILE, WINDOW, BLOCK)
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_context, b_low, b_tiles, b_parts, b_size = _parts(p_lens, o_r, R, window, cap, TILE, WINDOW)
    b_unit = tl.zeros([BLOCK], dtype=tl.int32)
    b_slot = tl.zeros([BLOCK], dtype=tl.int32)
    used = 0
    for start in range(0, R, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        _c, _l, _t, b_other, b_other_size = _parts(p_lens, o_j, R, window, cap, TILE, WINDOW)
        m_ahead = o_j[None, :] < o_r[:, None]
        m_first = (b_other_size[None, :] > b_size[:, None]) | ((b_other_size[None, :] == b_size[:, None]) & m_ahead)
        b_unit += tl.sum(tl.where(m_first, b_other[None, :], 0), axis=1)
        b_slot += tl.sum(tl.where(m_ahead & (b_other > 1)[None, :], b_other[None, :], 0), axis=1)
        used += tl.sum(b_other, axis=0)
    for i_part in range(tl.max(b_parts, axis=0)):
        p_unit = p_units + (b_unit + i_part) * FIELDS
        m_part = i_part < b_parts
        tl.store(p_unit, o_r, mask=m_part)
        tl.store(p_unit + 1, b_low + i_part * b_size, mask=m_part)
        tl.store(p_unit + 2, b_low + tl.minimum((i_part + 1) * b_size, b_tiles), mask=m_part)
        tl.store(p_unit + 3, b_context, mask=m_part)
        tl.store(p_unit + 4, tl.zeros([BLOCK], dtype=tl.int32) + i_part, mask=m_part)
        tl.store(p_unit + 5, b_parts, mask=m_part)
        tl.store(p_unit + 6, b_slot, mask=m_part)
    if tl.program_id(0) == 0:
        for start in range(0, num_units, BLOCK):
            o_u = start + tl.arange(0, BLOCK)
            tl.store(p_units + o_u * FIELDS, tl.full([BLOCK], -1, dtype=tl.int32), mask=(o_u >= used) & (o_u < num_units))
        for start in range(0, num_arrivals, BLOCK):
            o_a = start + tl.arange(0, BLOCK)
            tl.store(p_arrivals + o_a, tl.zeros([BLOCK], dtype=tl.int32), mask=o_a < num_arrivals)


def plan_decode(context_lens_R: Tensor, *, num_kv_heads: int, sliding_window: int | None, shape: DecodeShape) -> DecodePlan:
    """Share the rows of `context_lens_R` (int32 [R] on a device; 0 = a padding row) among programs."""
    rows, device = len(context_lens_R), context_lens_R.device
    # A row of t tiles has at most t / cap + 1 parts, and at most 2 · t / cap if it is cut at all; cap is at least the tiles
    # of all rows over `share_of`.
    share_of = max(1, shape.programs // num_kv_heads)
    most = rows + share_of if shape.most is None else max(rows, min(rows + share_of, shape.most // num_kv_heads))
    units = torch.empty((most, FIELDS), dtype=torch.int32, device=device)
    arrivals = torch.empty((2 * share_of, num_kv_heads), dtype=torch.int32, device=device)
    _plan_kernel[(ceil_div(rows, _BLOCK),)](
        context_lens_R,
        units,
        arrivals,
        rows,
        sliding_window or 0,
        share_of,
        shape.least,
        len(units),
        arrivals.numel(),
        TILE=shape.tile,
        WINDOW=sliding_window is not None,
        BLOCK=_BLOCK,
        FIELDS=FIELDS,
        num_warps=4,
    )
    return DecodePlan(sliding_window, shape, units, arrivals)
