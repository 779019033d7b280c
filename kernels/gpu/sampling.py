"""Sampling on the GPU: one program a row, no sort, no wait of the host.

The filters of `kernels.sampling` are one threshold by value. In one pass over the row a program keeps the largest value of each
of GROUPS interleaved groups. The k-th largest of those is no greater than the k-th largest value of the row, and mostly not
much smaller: the few values not below it are copied out, in vocabulary order, and the exact threshold and the draw are found
among them in registers. Top-p is bounded from below by the groups' largest values in the same way. Only a row that keeps more
than CANDIDATES values (a flat distribution, a huge k) searches its threshold over the whole vocabulary.

Thresholds are searched by bisection over the floats' bits, which as integers are ordered like the floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.sampling import SamplingInputs

_GROUPS = 4096
_CANDIDATES = 2048


@triton.jit
def _key(x):
    """An int32 for each float32, in the same order (-0 counts as 0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """The integer halfway, rounded up, of two int32 whose difference may not fit one."""
    return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)


@triton.jit
def _kth_key(b_key, k):
    """The k-th largest of a block of keys."""
    low = tl.min(b_key, axis=0)
    high = tl.max(b_key, axis=0)
    while low < high:
        middle = _middle(low, high)
        if tl.sum((b_key >= middle).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _nucleus_key(b_key, b_weight, bound):
    """The smallest key t for which the weight of all keys greater than t is at most `bound`."""
    low = tl.min(b_key, axis=0)
    high = tl.max(b_key, axis=0)
    while low < high:
        middle = _middle(low, high) - 1
        if tl.sum(tl.where(b_key > middle, b_weight, 0.0), axis=0) <= bound:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _scaled(p_row, start, temperature, V, BLOCK: tl.constexpr):
    """A block of the row over its temperature; -inf past the vocabulary."""
    o_v = start + tl.arange(0, BLOCK)
    return tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")) / temperature


@triton.jit
def _weights(p_row, start, temperature, best, threshold, V, BLOCK: tl.constexpr):
    """exp(x - best) of the block's values that are kept, 0 of the others."""
    b_x = _scaled(p_row, start, temperature, V, BLOCK)
    return tl.where(b_x >= threshold, tl.exp(b_x - best), 0.0)


@triton.jit
def _argmax(p_row, V, BLOCK: tl.constexpr):
    """Lowest index of the row's largest value."""
    b_best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_at = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf"))
        m_v = b_x > b_best
        b_best = tl.where(m_v, b_x, b_best)
        b_at = tl.where(m_v, o_v, b_at)
    return tl.min(tl.where(b_best == tl.max(b_best, axis=0), b_at, 0x7FFFFFFF), axis=0)


@triton.jit
def _pick(b_weight, target):
    """Index of the first entry whose cumulative weight exceeds `target`; of the last with any weight if rounding hid it."""
    o_c = tl.arange(0, b_weight.shape[0])
    m_hit = (tl.cumsum(b_weight, axis=0) > target) & (b_weight > 0)
    i_hit = tl.min(tl.where(m_hit, o_c, 0x7FFFFFFF), axis=0)
    i_last = tl.max(tl.where(b_weight > 0, o_c, 0), axis=0)
    return tl.minimum(i_hit, i_last)


@triton.jit
def _walk(p_row, u, temperature, best, threshold, V, BLOCK: tl.constexpr):
    """Draw from the whole row's kept values: sum them, then walk to the block in which u falls."""
    total = 0.0
    for start in range(0, V, BLOCK):
        total += tl.sum(_weights(p_row, start, temperature, best, threshold, V, BLOCK), axis=0)
    target = u * total
    before = 0.0
    at = 0
    hit = 0
    i_start = 0
    while (hit == 0) & (i_start < V):
        b_weight = _weights(p_row, i_start, temperature, best, threshold, V, BLOCK)
        here = tl.sum(b_weight, axis=0)
        if here > 0:
            # The last block with any weight is remembered: the sums may round to just below the target.
            at = i_start + _pick(b_weight, target - before)
            hit = (before + here > target).to(tl.int32)
        before += here
        i_start += BLOCK
    return at


@triton.jit
def _search_row(p_row, k, top_p, mass, temperature, best, floor, V, BLOCK: tl.constexpr):
    """Find the threshold of top-k and top-p by bisection with a pass over the row for each bit: the rare, slow way."""
    low = _key(floor)
    high = _key(best)
    if k > 0:
        while low < high:
            middle = _middle(low, high)
            at_least = _value(middle)
            count = 0
            for start in range(0, V, BLOCK):
                count += tl.sum((_scaled(p_row, start, temperature, V, BLOCK) >= at_least).to(tl.int32), axis=0)
            if count >= k:
                low = middle
            else:
                high = middle - 1
        floor = _value(low)
        mass = 0.0
        for start in range(0, V, BLOCK):
            mass += tl.sum(_weights(p_row, start, temperature, best, floor, V, BLOCK), axis=0)
    if top_p < 1:
        high = _key(best)
        while low < high:
            middle = _middle(low, high)
            # Keeping values from `middle` up must leave out more than the bound admits: then the nucleus ends at or above it.
            above = 0.0
            at_least = _value(middle)
            for start in range(0, V, BLOCK):
                above += tl.sum(_weights(p_row, start, temperature, best, at_least, V, BLOCK), axis=0)
            if above > top_p * mass:
                low = middle
            else:
                high = middle - 1
        floor = _value(low)
    return floor


@triton.jit
def _argmax_kernel(p_logits, p_out, row_stride, V, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    tl.store(p_out + i_row, _argmax(p_logits + i_row * row_stride, V, BLOCK).to(tl.int64))


@triton.jit
def _bounds(p_row, k, top_p, min_p, temperature, V, GROUPS: tl.constexpr):
    """One pass: give (largest value, mass of exp(x - largest), a value that no kept value is smaller than).

    The mass is 0 unless top-p without top-k asks for it.
    """
    b_best = tl.full([GROUPS], float("-inf"), dtype=tl.float32)
    mass = 0.0
    if (top_p < 1) & (k == 0):
        b_mass = tl.zeros([GROUPS], dtype=tl.float32)
        for start in range(0, V, GROUPS):
            b_x = _scaled(p_row, start, temperature, V, GROUPS)
            b_new = tl.maximum(b_best, b_x)
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_mass = b_mass * tl.exp(b_best - b_base) + tl.exp(b_x - b_base)
            b_best = b_new
        best = tl.max(b_best, axis=0)
        b_weight = tl.exp(b_best - best)
        mass = tl.sum(b_mass * b_weight, axis=0)
        b_key = _key(b_best)
        low = tl.min(b_key, axis=0)
        high = tl.max(b_key, axis=0)
        # The greatest value from which up the groups' best alone weigh more than p of the mass.
        while low < high:
            middle = _middle(low, high)
            if tl.sum(tl.where(b_key >= middle, b_weight, 0.0), axis=0) > top_p * mass:
                low = middle
            else:
                high = middle - 1
        floor = _value(low)
        if tl.sum(tl.where(b_key >= low, b_weight, 0.0), axis=0) <= top_p * mass:
            floor = float("-inf")
    else:
        for start in range(0, V, GROUPS):
            b_best = tl.maximum(b_best, _scaled(p_row, start, temperature, V, GROUPS))
        best = tl.max(b_best, axis=0)
        floor = float("-inf")
        if (k > 0) & (k <= GROUPS):
            floor = _value(_kth_key(_key(b_best), k))
    if (k == 0) & (min_p > 0):
        floor = tl.maximum(floor, best + tl.log(min_p))
    return best, mass, floor


@triton.jit
def _gather_candidates(p_row, p_values, p_ids, floor, temperature, V, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr):
    """Copy the values not below `floor` and their ids out, in vocabulary order; give how many there are (or more than fit)."""
    count = 0
    i_start = 0
    while (i_start < V) & (count <= CANDIDATES):
        b_x = _scaled(p_row, i_start, temperature, V, BLOCK)
        o_v = i_start + tl.arange(0, BLOCK)
        m_v = (b_x >= floor) & (o_v < V)
        here = tl.sum(m_v.to(tl.int32), axis=0)
        if here > 0:
            o_c = count + tl.cumsum(m_v.to(tl.int32), axis=0) - 1
            m_c = m_v & (o_c < CANDIDATES)
            tl.store(p_values + o_c, b_x, mask=m_c)
            tl.store(p_ids + o_c, o_v, mask=m_c)
        count += here
        i_start += BLOCK
    return count


@triton.jit
def _draw_candidates(p_values, p_ids, count, k, top_p, min_p, u, best, mass, CANDIDATES: tl.constexpr):
    """Find the exact threshold among the candidates and draw one."""
    o_c = tl.arange(0, CANDIDATES)
    b_x = tl.load(p_values + o_c, mask=o_c < count, other=float("-inf"))
    b_key = _key(b_x)
    b_weight = tl.exp(b_x - best)
    if k > 0:
        b_weight = tl.where(b_key >= _kth_key(b_key, k), b_weight, 0.0)
        mass = tl.sum(b_weight, axis=0)
    if top_p < 1:
        b_weight = tl.where(b_key >= _nucleus_key(b_key, b_weight, top_p * mass), b_weight, 0.0)
    if min_p > 0:
        b_weight = tl.where(b_x >= best + tl.log(min_p), b_weight, 0.0)
    return tl.load(p_ids + _pick(b_weight, u * tl.sum(b_weight, axis=0)))


@triton.jit
def _sample_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_min_p, p_seed, p_position, p_choice, p_greedy, p_values, p_ids, p_out,
    row_stride, V,
    ANY_TOP_K: tl.constexpr, ANY_TOP_P: tl.constexpr, ANY_MIN_P: tl.constexpr, GROUPS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * row_stride
    if tl.load(p_greedy + i_row) != 0:
        tl.store(p_out + i_row, _argmax(p_row, V, GROUPS).to(tl.int64))
        return
    temperature = tl.load(p_temperature + i_row)
    k = 0
    top_p = 1.0
    min_p = 0.0
    if ANY_TOP_K:
        k = tl.load(p_top_k + i_row)
        k = tl.where(k >= V, 0, k)
    if ANY_TOP_P:
        top_p = tl.load(p_top_p + i_row)
    if ANY_MIN_P:
        min_p = tl.load(p_min_p + i_row)
    position = tl.load(p_position + i_row).to(tl.int32)
    choice = tl.load(p_choice + i_row)
    word, _, _, _ = tl.philox(tl.load(p_seed + i_row), position, choice, position * 0, position * 0)
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    best, mass, floor = _bounds(p_row, k, top_p, min_p, temperature, V, GROUPS)
    p_row_values = p_values + i_row * CANDIDATES
    p_row_ids = p_ids + i_row * CANDIDATES
    count = CANDIDATES + 1
    if floor > float("-inf"):
        count = _gather_candidates(p_row, p_row_values, p_row_ids, floor, temperature, V, GROUPS, CANDIDATES)
    if count <= CANDIDATES:
        # What other threads of this program stored is read next.
        tl.debug_barrier()
        token = _draw_candidates(p_row_values, p_row_ids, count, k, top_p, min_p, u, best, mass, CANDIDATES)
    else:
        threshold = floor
        if (k > 0) | (top_p < 1):
            threshold = _search_row(p_row, k, top_p, mass, temperature, best, floor, V, GROUPS)
        if min_p > 0:
            threshold = tl.maximum(threshold, best + tl.log(min_p))
        token = _walk(p_row, u, temperature, best, threshold, V, GROUPS)
    # Logits full of NaN choose nothing: the id must be one of the vocabulary all the same.
    tl.store(p_out + i_row, tl.minimum(tl.maximum(token, 0), V - 1).to(tl.int64))


def sample(
    logits_RV: Tensor, inputs: SamplingInputs, any_random: bool, any_top_k: bool, any_top_p: bool, any_min_p: bool
) -> Tensor:
    """See `kernels.sampling.sample`."""
    rows, vocab = logits_RV.shape
    tokens_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    if not rows:
        return tokens_R
    groups = min(_GROUPS, triton.next_power_of_2(vocab))
    num_warps = 8 if groups >= 2048 else 4
    if not any_random:
        _argmax_kernel[(rows,)](logits_RV, tokens_R, logits_RV.stride(0), vocab, BLOCK=groups, num_warps=num_warps)
        return tokens_R
    values = torch.empty((rows, _CANDIDATES), dtype=torch.float32, device=logits_RV.device)
    ids = torch.empty((rows, _CANDIDATES), dtype=torch.int32, device=logits_RV.device)
    _sample_kernel[(rows,)](
        logits_RV,
        inputs.temperature_R,
        inputs.top_k_R,
        inputs.top_p_R,
        inputs.min_p_R,
        inputs.seed_R,
        inputs.position_R,
        inputs.choice_R,
        inputs.greedy_R,
        values,
        ids,
        tokens_R,
        logits_RV.stride(0),
        vocab,
        ANY_TOP_K=any_top_k,
        ANY_TOP_P=any_top_p,
        ANY_MIN_P=any_min_p,
        GROUPS=groups,
        CANDIDATES=_CANDIDATES,
        num_warps=num_warps,
    )
    return tokens_R
