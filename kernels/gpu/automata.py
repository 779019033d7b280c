"""Automata over bytes on the GPU: the masks of all tokens of a state at once, and two launches a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

if TYPE_CHECKING:
    from kernels.automata import Places, States, Vocabulary

_FREE = tl.constexpr(0)
_DEAD = tl.constexpr(1)
_WORDS = 32
_BLOCK = 8192


@quick
@triton.jit(do_not_specialize_on_alignment=["p_rows"])
def _fill_masks_kernel(p_rows, p_next, p_starts, p_bytes, p_masks, p_counts, V, W, WORDS: tl.constexpr):
    i_state = tl.load(p_rows + tl.program_id(0))
    o_t = tl.program_id(1) * WORDS * 32 + tl.arange(0, WORDS * 32)
    b_at = tl.load(p_starts + o_t, mask=o_t < V, other=0)
    b_stop = tl.load(p_starts + o_t + 1, mask=o_t < V, other=0)
    b_state = tl.where(b_at < b_stop, i_state.to(tl.int32), _DEAD)
    going = tl.max((b_state != _DEAD).to(tl.int32), axis=0)
    while going > 0:
        m_t = (b_state != _DEAD) & (b_at < b_stop)
        b_byte = tl.load(p_bytes + b_at, mask=m_t, other=0)
        b_next = tl.load(p_next + b_state.to(tl.int64) * 256 + b_byte, mask=m_t, other=0)
        b_state = tl.where(m_t, b_next, b_state)
        b_at += 1
        going = tl.max(((b_state != _DEAD) & (b_at < b_stop)).to(tl.int32), axis=0)
    b_may = (b_state != _DEAD).to(tl.int32)
    # Each bit stands in one place, so their sum is their union.
    b_word = tl.sum(tl.reshape(b_may << (o_t & 31), (WORDS, 32)), axis=1)
    o_w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    tl.store(p_masks + i_state * W + o_w, b_word, mask=o_w < W)
    tl.atomic_add(p_counts + i_state, tl.sum(b_may, axis=0))


def fill_masks(states: States, vocabulary: Vocabulary, rows_n: Tensor) -> None:
    """See `kernels.automata.fill_masks`."""
    width = states.masks_NW.shape[1]
    states.counts_N.index_fill_(0, rows_n, 0)
    if len(rows_n):
        _fill_masks_kernel[(len(rows_n), ceil_div(width, _WORDS))](
            rows_n, states.next_N256, vocabulary.starts_V1, vocabulary.bytes_B, states.masks_NW, states.counts_N,
            len(vocabulary.starts_V1) - 1, width, WORDS=_WORDS,
        )  # fmt: skip


@triton.jit
def _mask_bit(p_mask, token, W):
    """Whether a token's bit is set; 0 where there is no such bit."""
    return (tl.load(p_mask + (token >> 5), mask=(token >> 5) < W, other=0) >> (token & 31)) & 1


@quick
@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_indices"])
def _allow_kernel(
    p_logits, p_slots, p_indices, p_places, p_final, p_counts, p_masks, row_stride, V, W, X, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_place = p_places + tl.load(p_slots + i_row) * X
    index = tl.load(p_indices + i_row)
    state = tl.load(p_place + index % 2)
    if state == _FREE:
        return
    p_mask = p_masks + state.to(tl.int64) * W
    i_first = tl.program_id(1) * BLOCK
    o_v = i_first + tl.arange(0, BLOCK)
    b_word = tl.load(p_mask + (o_v >> 5), mask=(o_v >> 5) < W, other=0)
    b_may = (b_word >> (o_v & 31)) & 1
    final = tl.load(p_final + state)
    num_ends = tl.load(p_place + 2)
    num_first = tl.load(p_place + 3)
    others = tl.load(p_counts + state)
    for e in range(num_ends):
        others -= _mask_bit(p_mask, tl.load(p_place + 5 + e), W)
    held = (index < tl.load(p_place + 4)) & (others > 0)
    for e in range(num_ends):
        token = tl.load(p_place + 5 + e)
        if (token >= i_first) & (token < i_first + BLOCK):
            may = tl.where(e < num_first, final, final | _mask_bit(p_mask, token, W))
            b_may = tl.where(o_v == token, tl.where(held, 0, may), b_may)
    # Beyond the masks nothing comes, an end neither.
    m_banned = (o_v < V) & ((b_may == 0) | ((o_v >> 5) >= W))
    tl.store(p_logits + i_row * row_stride + o_v, float("-inf"), mask=m_banned)


def allow_by_state(logits_QV: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States) -> None:
    """See `kernels.automata.allow_by_state`."""
    rows, vocab = logits_QV.shape
    if rows:
        block = min(_BLOCK, power_of_2(vocab))
        _allow_kernel[(rows, ceil_div(vocab, block))](
            logits_QV, slots_Q, indices_Q, places.table_SX, states.final_N, states.counts_N, states.masks_NW,
            logits_QV.stride(0), vocab, states.masks_NW.shape[1], places.table_SX.shape[1], BLOCK=block, num_warps=8,
        )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["Q"], do_not_specialize_on_alignment=["p_slots", "p_indices"])
def _advance_kernel(p_stored, p_slots, p_indices, p_places, p_next, p_final, p_goes_on, p_starts, p_bytes, Q, X):
    i_row = tl.program_id(0)
    p_place = p_places + tl.load(p_slots + i_row) * X
    index = tl.load(p_indices + i_row)
    state = tl.load(p_place + index % 2)
    if state == _FREE:
        return
    if tl.load(p_stored + Q + i_row) != 0:
        token = tl.load(p_stored + i_row)
        at = tl.load(p_starts + token)
        stop = tl.load(p_starts + token + 1)
        while at < stop:
            state = tl.load(p_next + state.to(tl.int64) * 256 + tl.load(p_bytes + at))
            at += 1
        complete = (tl.load(p_final + state) == 1) & (tl.load(p_goes_on + state) == 0)
        tl.store(p_stored + Q + i_row, 1 + complete.to(tl.int32))
    tl.store(p_place + (index + 1) % 2, state)


def advance(
    stored_2Q: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States, vocabulary: Vocabulary
) -> None:
    """See `kernels.automata.advance`."""
    count = stored_2Q.shape[1]
    if count:
        _advance_kernel[(count,)](
            stored_2Q, slots_Q, indices_Q, places.table_SX, states.next_N256, states.final_N, states.goes_on_N,
            vocabulary.starts_V1, vocabulary.bytes_B, count, places.table_SX.shape[1], num_warps=1,
        )  # fmt: skip
