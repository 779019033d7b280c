"""Thresholds by value and draws, for the sampling kernel: in a block of candidates, or the slow way over a whole row.

Thresholds are searched by bisection over the floats' bits, which as integers are ordered like the floats; of logits in 16 bits
only as many bits as tell them apart.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """An int32 for each float32 whose low SHIFT bits are zero, in the same order (-0 counts as 0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 of a `key_of`."""
    bits = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """The integer halfway, rounded up, of two int32 whose difference may not fit one."""
    return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)


@triton.jit
def kth_key(b_key, k, low):
    """The k-th largest of a block of keys, or `low` if that is larger."""
    high = tl.max(b_key, axis=0)
    while low < high:
        half = middle(low, high)
        if tl.sum((b_key >= half).to(tl.int32), axis=0) >= k:
            low = half
        else:
            high = half - 1
    return low


@triton.jit
def nucleus_key(b_key, b_weight, bound, low):
    """The smallest key t, from `low` up, for which the weight of all keys greater than t is at most `bound`."""
    high = tl.max(b_key, axis=0)
    while low < high:
        half = middle(low, high) - 1
        if tl.sum(tl.where(b_key > half, b_weight, 0.0), axis=0) <= bound:
            high = half
        else:
            low = half + 1
    return low


@triton.jit
def row_values(p_row, start, V, BLOCK: tl.constexpr):
    """A block of the row's logits in float32; -inf past the vocabulary."""
    o_v = start + tl.arange(0, BLOCK)
    return tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def row_weights(p_row, start, scale, best, threshold, V, BLOCK: tl.constexpr):
    """The block's probabilities over the best one's, 0 where not kept; `scale` is log2(e) / temperature."""
    b_x = row_values(p_row, start, V, BLOCK)
    return tl.where(b_x >= threshold, tl.exp2((b_x - best) * scale), 0.0)


@triton.jit
def pick(b_weight, target):
    """Index of the first entry whose cumulative weight exceeds `target`; of the last with any weight if rounding hid it."""
    o_c = tl.arange(0, b_weight.shape[0])
    m_hit = (tl.cumsum(b_weight, axis=0) > target) & (b_weight > 0)
    i_hit = tl.min(tl.where(m_hit, o_c, 0x7FFFFFFF), axis=0)
    i_last = tl.max(tl.where(b_weight > 0, o_c, 0), axis=0)
    return tl.minimum(i_hit, i_last)


@triton.jit
def walk(p_row, u, scale, best, threshold, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Draw from the whole row's kept values: sum them, then walk to the block in which u falls."""
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        b_total += row_weights(p_row, start, scale, best, threshold, V, BLOCK)
    target = u * tl.sum(b_total, axis=0)
    before = 0.0
    at = 0
    hit = 0
    i_start = 0
    while (hit == 0) & (i_start < V):
        b_weight = row_weights(p_row, i_start, scale, best, threshold, V, BLOCK)
        here = tl.sum(b_weight, axis=0)
        if here > 0:
            # The last block with any weight is remembered: the sums may round to just below the target.
            at = i_start + pick(b_weight, target - before)
            hit = (before + here > target).to(tl.int32)
        before += here
        i_start += BLOCK
    return at


@triton.jit
def search_row(
    p_row, floor, bound, scale, best, least, V, BLOCK: tl.constexpr, COUNT: tl.constexpr, SHIFT: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The greatest value from which up the row holds more than `bound`: values if COUNT, else weight of those >= `least`.

    Two bits a pass over the whole row: the rare, slow way. `floor` must hold more than the bound.
    """
    low = key_of(floor, SHIFT)
    high = key_of(best, SHIFT)
    while low < high:
        span = high.to(tl.int64) - low.to(tl.int64)
        i_1 = (low + (span + 3) // 4).to(tl.int32)
        i_2 = (low + (span + 1) // 2).to(tl.int32)
        i_3 = (low + (3 * span + 3) // 4).to(tl.int32)
        # Summed over the row before they are summed over the threads: a sum over threads waits for all of them.
        b_held_1 = tl.zeros([BLOCK], dtype=tl.float32)
        b_held_2 = tl.zeros([BLOCK], dtype=tl.float32)
        b_held_3 = tl.zeros([BLOCK], dtype=tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            b_x = row_values(p_row, start, V, BLOCK)
            b_key = key_of(b_x, SHIFT)
            if COUNT:
                b_weight = (b_x > float("-inf")).to(tl.float32)
            else:
                b_weight = tl.where(b_x >= least, tl.exp2((b_x - best) * scale), 0.0)
            b_held_1 += tl.where(b_key >= i_1, b_weight, 0.0)
            b_held_2 += tl.where(b_key >= i_2, b_weight, 0.0)
            b_held_3 += tl.where(b_key >= i_3, b_weight, 0.0)
        held_1 = tl.sum(b_held_1, axis=0)
        held_2 = tl.sum(b_held_2, axis=0)
        held_3 = tl.sum(b_held_3, axis=0)
        if held_3 > bound:
            low = i_3
        elif held_2 > bound:
            low = i_2
            high = i_3 - 1
        elif held_1 > bound:
            low = i_1
            high = i_2 - 1
        else:
            high = i_1 - 1
    return value_of(low, SHIFT)


@triton.jit
def draw_row(
    p_row, u, k, top_p, scale, best, floor, least, mass, V, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """Draw where the candidates do not decide: unfiltered rows, and rows that keep more than fit."""
    threshold = least
    if k > 0:
        threshold = search_row(p_row, floor, k - 0.5, scale, best, least, V, BLOCK, True, SHIFT, STAGES)
    if top_p < 1:
        kept = best * 0.0 + float("-inf")
        if k > 0:
            kept = threshold
            b_mass = tl.zeros([BLOCK], dtype=tl.float32)
            for start in tl.range(0, V, BLOCK, num_stages=STAGES):
                b_mass += row_weights(p_row, start, scale, best, kept, V, BLOCK)
            mass = tl.sum(b_mass, axis=0)
        # All that lies below this value weighs less together than what the nucleus leaves out: no use in looking there.
        lowest = best + (tl.log2((1.0 - top_p) * mass / V) - 1.0) / scale
        threshold = search_row(p_row, tl.maximum(kept, lowest), top_p * mass, scale, best, kept, V, BLOCK, False, SHIFT, STAGES)
    return walk(p_row, u, scale, best, tl.maximum(threshold, least), V, BLOCK, STAGES)
