"""What a step reads from the engine's state on the device, and what it writes there: token ids and block tables by slot.

Knows tensors, no requests: a slot is a row of them. S slots, L positions of a slot, P blocks of a slot, R rows of a step, Q of
them that sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference_state


class SingleRows(NamedTuple):
    """What a step of rows of one token reads, in tensors that stay where they are: a captured graph finds each step's here."""

    tokens_R: Tensor
    """int32."""
    positions_R: Tensor
    """int64, as all but those that say otherwise."""
    cache_slots_R: Tensor
    """Where the token's key and value go, block · block_size + offset; -1: a padding row."""
    context_lens_R: Tensor
    """int32; 0: a padding row."""
    block_tables_RP: Tensor
    """int32; what stands past a row's context means nothing."""
    slots_R: Tensor
    lengths_R: Tensor
    """Where the next token goes: position + 1."""
    output_indices_R: Tensor

    @classmethod
    def allocate(cls, rows: int, blocks: int, device: torch.device) -> SingleRows:
        """Make room for `rows` rows of at most `blocks` blocks: padding, all of them."""
        one, two = torch.int32, torch.int64
        sizes = (
            (rows, one),
            (rows, two),
            (rows, two),
            (rows, one),
            ((rows, blocks), one),
            (rows, two),
            (rows, two),
            (rows, two),
        )
        made = cls(*(torch.zeros(size, dtype=dtype, device=device) for size, dtype in sizes))
        made.cache_slots_R.fill_(-1)
        return made


def lay_out_singles(rows_R4: Tensor, token_ids_SL: Tensor, block_tables_SP: Tensor, block_size: int, out: SingleRows) -> None:
    """Append new blocks to block tables, then fill `out` for rows of (slot, position, output index, new block).

    `rows_R4` int32, as many as `out` has; a slot of -1 is a padding row, a new block of -1 none. A new block becomes the one
    that holds the row's position. No slot twice.
    """
    if rows_R4.is_cuda:
        from kernels.gpu import state as gpu

        gpu.lay_out_singles(rows_R4, token_ids_SL, block_tables_SP, block_size, out)
    else:
        reference_state.lay_out_singles(rows_R4, token_ids_SL, block_tables_SP, block_size, out)


def hold_back(logits_QV: Tensor, slots_Q: Tensor, output_indices_Q: Tensor, until_S: Tensor, tokens_SE: Tensor) -> None:
    """logits[q, tokens[slot, e]] = -inf, in place, for each row whose output index is below its slot's `until`.

    `until_S` and `tokens_SE` int32, a token of -1 is none; logits of any float type with a contiguous last dimension.
    """
    if logits_QV.is_cuda:
        from kernels.gpu import state as gpu

        gpu.hold_back(logits_QV, slots_Q, output_indices_Q, until_S, tokens_SE)
    else:
        reference_state.hold_back(logits_QV, slots_Q, output_indices_Q, until_S, tokens_SE)


def store_tokens(tokens_Q: Tensor, best_Q: Tensor, slots_Q: Tensor, lengths_Q: Tensor, token_ids_SL: Tensor) -> Tensor:
    """Write each row's token (int64) behind its slot's last one, and give what the host reads: int32 [2, Q], token and validity.

    `best_Q` is the row's largest logit. Where it isn't finite no token can be drawn (a NaN, an overflow, or nothing was left to
    choose): the row is not valid and its token is 0.
    """
    if tokens_Q.is_cuda:
        from kernels.gpu import state as gpu

        return gpu.store_tokens(tokens_Q, best_Q, slots_Q, lengths_Q, token_ids_SL)
    return reference_state.store_tokens(tokens_Q, best_Q, slots_Q, lengths_Q, token_ids_SL)
