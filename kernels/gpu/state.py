"""The engine's state on the GPU: a launch for what a decode step reads, one before its tokens are drawn and one behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

if TYPE_CHECKING:
    from kernels.state import SingleRows

_PAGES = 128
_ROWS = 128


@quick
@triton.jit
def _lay_out_kernel(
    p_rows, p_token_ids, p_tables, p_tokens, p_positions, p_cache_slots, p_contexts, p_row_tables, p_slots, p_lengths, p_indices,
    L, P, S: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_rows + i_row * 4).to(tl.int64)
    if i_slot < 0:
        tl.store(p_tokens + i_row, 0)
        tl.store(p_positions + i_row, 0)
        tl.store(p_cache_slots + i_row, -1)
        tl.store(p_contexts + i_row, 0)
        tl.store(p_slots + i_row, 0)
        tl.store(p_lengths + i_row, 0)
        tl.store(p_indices + i_row, 0)
        return
    position = tl.load(p_rows + i_row * 4 + 1)
    new_block = tl.load(p_rows + i_row * 4 + 3)
    i_page = position // S
    p_table = p_tables + i_slot * P
    if new_block >= 0:
        tl.store(p_table + i_page, new_block)
    # Not read back: another thread of this program may have stored it.
    block = tl.where(new_block >= 0, new_block, tl.load(p_table + i_page))
    tl.store(p_tokens + i_row, tl.load(p_token_ids + i_slot * L + position))
    tl.store(p_positions + i_row, position.to(tl.int64))
    tl.store(p_cache_slots + i_row, block.to(tl.int64) * S + position % S)
    tl.store(p_contexts + i_row, position + 1)
    tl.store(p_slots + i_row, i_slot)
    tl.store(p_lengths + i_row, (position + 1).to(tl.int64))
    tl.store(p_indices + i_row, tl.load(p_rows + i_row * 4 + 2).to(tl.int64))
    for start in range(0, i_page + 1, PAGES):
        o_p = start + tl.arange(0, PAGES)
        m_p = o_p <= i_page
        b_block = tl.where(o_p == i_page, block, tl.load(p_table + o_p, mask=m_p, other=0))
        tl.store(p_row_tables + i_row * P + o_p, b_block, mask=m_p)


def lay_out_singles(rows_R4: Tensor, token_ids_SL: Tensor, block_tables_SP: Tensor, block_size: int, out: SingleRows) -> None:
    """See `kernels.state.lay_out_singles`."""
    _lay_out_kernel[(len(rows_R4),)](
        rows_R4,
        token_ids_SL,
        block_tables_SP,
        out.tokens_R,
        out.positions_R,
        out.cache_slots_R,
        out.context_lens_R,
        out.block_tables_RP,
        out.slots_R,
        out.lengths_R,
        out.output_indices_R,
        token_ids_SL.shape[1],
        block_tables_SP.shape[1],
        S=block_size,
        PAGES=_PAGES,
        num_warps=1,
    )


@quick
@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_indices"])
def _hold_back_kernel(p_logits, p_slots, p_indices, p_until, p_tokens, row_stride, E: tl.constexpr, E_PAD: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_slots + i_row)
    o_e = tl.arange(0, E_PAD)
    m_e = (o_e < E) & (tl.load(p_indices + i_row) < tl.load(p_until + i_slot))
    b_token = tl.load(p_tokens + i_slot * E + o_e, mask=m_e, other=-1)
    tl.store(p_logits + i_row * row_stride + b_token, float("-inf"), mask=b_token >= 0)


def hold_back(logits_QV: Tensor, slots_Q: Tensor, output_indices_Q: Tensor, until_S: Tensor, tokens_SE: Tensor) -> None:
    """See `kernels.state.hold_back`."""
    most = tokens_SE.shape[1]
    if len(slots_Q):
        _hold_back_kernel[(len(slots_Q),)](
            logits_QV, slots_Q, output_indices_Q, until_S, tokens_SE, logits_QV.stride(0),
            E=most, E_PAD=power_of_2(most), num_warps=1,
        )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["Q"], do_not_specialize_on_alignment=["p_slots", "p_lengths"])
def _store_tokens_kernel(p_tokens, p_best, p_slots, p_lengths, p_token_ids, p_out, Q, L, ROWS: tl.constexpr):
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_q = o_q < Q
    b_best = tl.load(p_best + o_q, mask=m_q, other=0.0).to(tl.float32)
    m_valid = tl.abs(b_best) < float("inf")  # of a NaN nothing is true
    b_token = tl.where(m_valid, tl.load(p_tokens + o_q, mask=m_q, other=0), 0).to(tl.int32)
    i_place = tl.load(p_slots + o_q, mask=m_q, other=0) * L + tl.load(p_lengths + o_q, mask=m_q, other=0)
    tl.store(p_token_ids + i_place, b_token, mask=m_q)
    tl.store(p_out + o_q, b_token, mask=m_q)
    tl.store(p_out + Q + o_q, m_valid.to(tl.int32), mask=m_q)


def store_tokens(tokens_Q: Tensor, best_Q: Tensor, slots_Q: Tensor, lengths_Q: Tensor, token_ids_SL: Tensor) -> Tensor:
    """See `kernels.state.store_tokens`."""
    count = len(tokens_Q)
    out_2Q = torch.empty((2, count), dtype=torch.int32, device=tokens_Q.device)
    if count:
        _store_tokens_kernel[(ceil_div(count, _ROWS),)](
            tokens_Q, best_Q, slots_Q, lengths_Q, token_ids_SL, out_2Q, count, token_ids_SL.shape[1], ROWS=_ROWS, num_warps=4
        )
    return out_2Q
