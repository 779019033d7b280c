"""`kernels.state` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.state import SingleRows


def lay_out_singles(rows_R4: Tensor, token_ids_SL: Tensor, block_tables_SP: Tensor, block_size: int, out: SingleRows) -> None:
    """See `kernels.state.lay_out_singles`."""
    slots_R, positions_R, indices_R, new_R = rows_R4.to(torch.int64).unbind(1)
    padding_R = slots_R < 0
    slots_R, positions_R = slots_R.clamp(min=0), positions_R.clamp(min=0)
    pages_R = positions_R // block_size
    appended = ((new_R >= 0) & ~padding_R).nonzero().squeeze(1)
    block_tables_SP[slots_R[appended], pages_R[appended]] = new_R[appended].to(torch.int32)
    tables_RP = block_tables_SP[slots_R]
    blocks_R = tables_RP.gather(1, pages_R[:, None]).squeeze(1).to(torch.int64)
    out.tokens_R.copy_(token_ids_SL[slots_R, positions_R].masked_fill(padding_R, 0))
    out.positions_R.copy_(positions_R.masked_fill(padding_R, 0))
    out.cache_slots_R.copy_((blocks_R * block_size + positions_R % block_size).masked_fill(padding_R, -1))
    out.context_lens_R.copy_((positions_R + 1).masked_fill(padding_R, 0))
    out.block_tables_RP.copy_(tables_RP)
    out.slots_R.copy_(slots_R)
    out.lengths_R.copy_((positions_R + 1).masked_fill(padding_R, 0))
    out.output_indices_R.copy_(indices_R.masked_fill(padding_R, 0))


def hold_back(logits_QV: Tensor, slots_Q: Tensor, output_indices_Q: Tensor, until_S: Tensor, tokens_SE: Tensor) -> None:
    """See `kernels.state.hold_back`."""
    tokens_QE = tokens_SE[slots_Q]
    held_QE = (tokens_QE >= 0) & (output_indices_Q < until_S[slots_Q])[:, None]
    rows, columns = held_QE.nonzero(as_tuple=True)
    logits_QV[rows, tokens_QE[rows, columns].to(torch.int64)] = float("-inf")


def store_tokens(tokens_Q: Tensor, best_Q: Tensor, slots_Q: Tensor, lengths_Q: Tensor, token_ids_SL: Tensor) -> Tensor:
    """See `kernels.state.store_tokens`."""
    valid_Q = torch.isfinite(best_Q)
    chosen_Q = torch.where(valid_Q, tokens_Q, 0).to(torch.int32)
    token_ids_SL[slots_Q, lengths_Q] = chosen_Q
    return torch.stack([chosen_Q, valid_Q.to(torch.int32)])
