"""Sampling on the GPU: one program a row, no sort, no wait of the host.

The filters of `kernels.sampling` are one threshold by value. In one pass over the row a program keeps the largest value of each
of GROUPS interleaved groups. The k-th largest of those is no greater than the k-th largest value of the row, and mostly not
much smaller: the few values not below it are copied out, in vocabulary order, and the exact threshold and the draw are found
among them in registers. Top-p alone is looked for among the CANDIDATES / 2 largest in the same way. Only a row that keeps more
than fit (a flat distribution, a huge k) searches its threshold over the whole vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import power_of_2, quick
from kernels.gpu.thresholds import draw_row, key_of, kth_key, nucleus_key, pick, row_values, value_of

if TYPE_CHECKING:
    from kernels.sampling import SamplingInputs

_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Low bits that are zero in a float32 made of each type: a search over them would find nothing."""
_GROUPS = 2048
_CANDIDATES = 2048


@triton.jit
def _or_nan(best, b_nan):
    """The largest value, or NaN where any was seen: a maximum passes over it."""
    return tl.where(tl.max(b_nan, axis=0) > 0, float("nan"), best)


@triton.jit
def _argmax(p_row, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Lowest index of the row's largest value, and that value: NaN if the row holds one."""
    b_best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_at = tl.zeros([BLOCK], dtype=tl.int32)
    b_nan = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        o_v = start + tl.arange(0, BLOCK)
        b_x = row_values(p_row, start, V, BLOCK)
        m_v = b_x > b_best
        b_best = tl.where(m_v, b_x, b_best)
        b_at = tl.where(m_v, o_v, b_at)
        b_nan |= (b_x != b_x).to(tl.int32)
    best = tl.max(b_best, axis=0)
    return tl.min(tl.where(b_best == best, b_at, 0x7FFFFFFF), axis=0), _or_nan(best, b_nan)


@quick
@triton.jit
def _argmax_kernel(p_logits, p_out, p_best, row_stride, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    at, best = _argmax(p_logits + i_row * row_stride, V, BLOCK, STAGES)
    tl.store(p_out + i_row, at.to(tl.int64))
    tl.store(p_best + i_row, best)


@triton.jit
def _first_pass(p_row, scale, V, GROUPS: tl.constexpr, STAGES: tl.constexpr, MASS: tl.constexpr):
    """Give the groups' largest values [GROUPS], whether they hold a NaN, and, where MASS, the row's weight over its largest value (else 0)."""
    b_best = tl.full([GROUPS], float("-inf"), dtype=tl.float32)
    b_nan = tl.zeros([GROUPS], dtype=tl.int32)
    mass = 0.0
    if MASS:
        b_mass = tl.zeros([GROUPS], dtype=tl.float32)
        for start in tl.range(0, V, GROUPS, num_stages=STAGES):
            b_x = row_values(p_row, start, V, GROUPS)
            b_new = tl.maximum(b_best, b_x)
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_mass = b_mass * tl.exp2((b_best - b_base) * scale) + tl.exp2((b_x - b_base) * scale)
            b_best = b_new
            b_nan |= (b_x != b_x).to(tl.int32)
        mass = tl.sum(b_mass * tl.exp2((b_best - tl.max(b_best, axis=0)) * scale), axis=0)
    else:
        for start in tl.range(0, V, GROUPS, num_stages=STAGES):
            b_x = row_values(p_row, start, V, GROUPS)
            b_best = tl.maximum(b_best, b_x)
            b_nan |= (b_x != b_x).to(tl.int32)
    return b_best, b_nan, mass


@triton.jit
def _groups_of_row(
    p_row, k, top_p, scale, V, GROUPS: tl.constexpr, STAGES: tl.constexpr, ANY_TOP_K: tl.constexpr, ANY_TOP_P: tl.constexpr
):  # fmt: skip
    """Make the first pass; the row's weight is summed where a nucleus alone is asked for."""
    if ANY_TOP_P and not ANY_TOP_K:
        b_best, b_nan, mass = _first_pass(p_row, scale, V, GROUPS, STAGES, True)
    elif ANY_TOP_P:
        mass = 0.0
        if (top_p < 1) & (k == 0):
            b_best, b_nan, mass = _first_pass(p_row, scale, V, GROUPS, STAGES, True)
        else:
            b_best, b_nan, mass = _first_pass(p_row, scale, V, GROUPS, STAGES, False)
    else:
        b_best, b_nan, mass = _first_pass(p_row, scale, V, GROUPS, STAGES, False)
    return b_best, b_nan, mass


@triton.jit
def _gather_candidates(p_row, p_values, p_ids, floor, V, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, STAGES: tl.constexpr):
    """Copy the values not below `floor` and their ids out, in vocabulary order; give how many there are (or more than fit)."""
    count = 0
    for i_start in tl.range(0, V, BLOCK, num_stages=STAGES):
        b_x = row_values(p_row, i_start, V, BLOCK)
        o_v = i_start + tl.arange(0, BLOCK)
        m_v = (b_x >= floor) & (o_v < V)
        here = tl.sum(m_v.to(tl.int32), axis=0)
        if (here > 0) & (count < CANDIDATES):
            o_c = count + tl.cumsum(m_v.to(tl.int32), axis=0) - 1
            m_c = m_v & (o_c < CANDIDATES)
            tl.store(p_values + o_c, b_x, mask=m_c)
            tl.store(p_ids + o_c, o_v, mask=m_c)
        count += here
    return count


@triton.jit
def _candidate_weights(p_values, count, scale, best, CANDIDATES: tl.constexpr):
    """Give the candidates' values (-inf past the last) and weights."""
    o_c = tl.arange(0, CANDIDATES)
    b_x = tl.load(p_values + o_c, mask=o_c < count, other=float("-inf"))
    return b_x, tl.exp2((b_x - best) * scale)


@triton.jit
def _draw_candidates(b_x, b_weight, p_ids, k, top_p, least, u, mass, SHIFT: tl.constexpr):
    """Find the exact threshold among the candidates and draw one."""
    b_key = key_of(b_x, SHIFT)
    # What weighs nothing is never drawn, so no threshold need be looked for below what weighs something.
    low = tl.min(tl.where(b_weight > 0, b_key, 0x7FFFFFFF), axis=0)
    if k > 0:
        low = kth_key(b_key, k, low)
        b_weight = tl.where(b_key >= low, b_weight, 0.0)
        mass = tl.sum(b_weight, axis=0)
    if top_p < 1:
        b_weight = tl.where(b_key >= nucleus_key(b_key, b_weight, top_p * mass, low), b_weight, 0.0)
    b_weight = tl.where(b_x >= least, b_weight, 0.0)
    return tl.load(p_ids + pick(b_weight, u * tl.sum(b_weight, axis=0)))


@quick
@triton.jit(
    do_not_specialize_on_alignment=["p_temperature", "p_top_k", "p_top_p", "p_min_p", "p_seed", "p_position", "p_choice"]
)
def _sample_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_min_p, p_seed, p_position, p_choice, p_greedy, p_values, p_ids, p_out, p_best,
    row_stride, V,
    ANY_TOP_K: tl.constexpr, ANY_TOP_P: tl.constexpr, ANY_MIN_P: tl.constexpr, GROUPS: tl.constexpr, GATHER: tl.constexpr,
    CANDIDATES: tl.constexpr, SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * row_stride
    if tl.load(p_greedy + i_row) != 0:
        at, best = _argmax(p_row, V, GROUPS, STAGES)
        tl.store(p_out + i_row, at.to(tl.int64))
        tl.store(p_best + i_row, best)
        return
    temperature = tl.load(p_temperature + i_row)
    scale = 1.4426950408889634 / temperature
    position = tl.load(p_position + i_row).to(tl.int32)
    word, _, _, _ = tl.philox(tl.load(p_seed + i_row), position, tl.load(p_choice + i_row), position * 0, position * 0)
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    k, top_p = position * 0, temperature * 0.0 + 1.0
    if ANY_TOP_K:
        k = tl.load(p_top_k + i_row)
        k = tl.where(k >= V, 0, k)
    if ANY_TOP_P:
        top_p = tl.load(p_top_p + i_row)
    b_best, b_nan, mass = _groups_of_row(p_row, k, top_p, scale, V, GROUPS, STAGES, ANY_TOP_K, ANY_TOP_P)
    best = tl.max(b_best, axis=0)
    tl.store(p_best + i_row, _or_nan(best, b_nan))
    least = best * 0.0 + float("-inf")  # of what min-p keeps
    if ANY_MIN_P:
        min_p = tl.load(p_min_p + i_row)
        least = tl.where(min_p > 0, best + temperature * tl.log(min_p), least)
    floor = best * 0.0 + float("-inf")
    count = position * 0 + CANDIDATES + 1
    if ANY_TOP_K or ANY_TOP_P or ANY_MIN_P:
        # Without a k, a nucleus is looked for among about as many of the largest values as leave room for collisions.
        wanted = tl.where(k > 0, k, min(CANDIDATES, GROUPS) // 2)
        if ((k > 0) | (top_p < 1)) & (wanted <= GROUPS):
            b_key = key_of(b_best, SHIFT)
            floor = value_of(kth_key(b_key, wanted, tl.min(b_key, axis=0)), SHIFT)
        # A row that a grammar has left few tokens to: those are the candidates, all of them.
        few = ((k > 0) | (top_p < 1)) & (wanted <= GROUPS) & (floor == float("-inf"))
        if V <= CANDIDATES:
            floor = best * 0.0 + float("-inf")
        low = tl.where(k > 0, floor, tl.maximum(floor, least))
        low = tl.where(few, tl.maximum(low, -3.4028234663852886e38), low)
        p_row_values = p_values + i_row * CANDIDATES
        p_row_ids = p_ids + i_row * CANDIDATES
        if (low > float("-inf")) | (V <= CANDIDATES):
            count = _gather_candidates(p_row, p_row_values, p_row_ids, low, V, GATHER, CANDIDATES, STAGES)
        if count <= CANDIDATES:
            # What other threads of this program stored is read next.
            tl.debug_barrier()
            b_x, b_weight = _candidate_weights(p_row_values, count, scale, best, CANDIDATES)
            # Top-p alone is decided here if the candidates hold more than p of the row, or all that min-p keeps.
            decided = (k > 0) | (top_p >= 1) | (least >= floor) | (V <= CANDIDATES) | few
            decided = decided | (tl.sum(b_weight, axis=0) > top_p * mass)
            count = tl.where(decided, count, CANDIDATES + 1)
            if decided:
                token = _draw_candidates(b_x, b_weight, p_row_ids, k, top_p, least, u, mass, SHIFT)
                tl.store(p_out + i_row, tl.minimum(tl.maximum(token, 0), V - 1).to(tl.int64))
    if count > CANDIDATES:
        token = draw_row(p_row, u, k, top_p, scale, best, floor, least, mass, V, GROUPS, STAGES, SHIFT)
        # Logits full of NaN choose nothing: the id must be one of the vocabulary all the same.
        tl.store(p_out + i_row, tl.minimum(tl.maximum(token, 0), V - 1).to(tl.int64))


class SampleShape(NamedTuple):
    """How a row is read."""

    groups: int
    num_warps: int
    stages: int
    gather: int
    """Logits that are looked through at once for candidates."""


def choose_shape(vocab: int, *, any_random: bool, any_top_k: bool) -> SampleShape:
    """Measured on an H200: a greedy row is read by as many threads as there are, the searches of the others by few.

    More groups or warps make every step of a search wait for more threads (512 rows of top-k 40 and top-p: 137 us with 1,024 groups and
    4 warps, 183 with twice both); the loads are hidden by the stages. A nucleus without a k is wide and wants more groups.
    """
    size = power_of_2(vocab)
    if not any_random:
        groups = min(4096, size)
        return SampleShape(groups=groups, num_warps=max(4, min(32, groups // 128)), stages=1, gather=groups)
    groups = min(_GROUPS // 2 if any_top_k else _GROUPS, size)
    return SampleShape(groups=groups, num_warps=max(4, groups // 256), stages=3, gather=groups)


def sample(
    logits_RV: Tensor,
    inputs: SamplingInputs,
    any_random: bool,
    any_top_k: bool,
    any_top_p: bool,
    any_min_p: bool,
    *,
    shape: SampleShape | None = None,
) -> tuple[Tensor, Tensor]:
    """Give the tokens and the best logits of `kernels.sampling.sample`; `shape` is for measuring others than the one chosen."""
    rows, vocab = logits_RV.shape
    tokens_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    best_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    if not rows:
        return tokens_R, best_R
    shape = shape or choose_shape(vocab, any_random=any_random, any_top_k=any_top_k)
    meta = {"STAGES": shape.stages, "num_warps": shape.num_warps}
    if not any_random:
        _argmax_kernel[(rows,)](logits_RV, tokens_R, best_R, logits_RV.stride(0), vocab, BLOCK=shape.groups, **meta)
        return tokens_R, best_R
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
        best_R,
        logits_RV.stride(0),
        vocab,
        ANY_TOP_K=any_top_k,
        ANY_TOP_P=any_top_p,
        ANY_MIN_P=any_min_p,
        GROUPS=shape.groups,
        GATHER=shape.gather,
        CANDIDATES=_CANDIDATES,
        SHIFT=_EMPTY_BITS[logits_RV.dtype],
        **meta,
    )
    return tokens_R, best_R
