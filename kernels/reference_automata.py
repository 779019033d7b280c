"""`kernels.automata` in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import reference_sampling

if TYPE_CHECKING:
    from kernels.automata import Places, States, Vocabulary

_FREE, _DEAD = 0, 1


def fill_masks(states: States, vocabulary: Vocabulary, rows_n: Tensor) -> None:
    """See `kernels.automata.fill_masks`."""
    starts_V = vocabulary.starts_V1[:-1].long()
    lengths_V = vocabulary.starts_V1[1:].long() - starts_V
    next_X = states.next_N256.view(-1)
    width = states.masks_NW.shape[1]
    for row in rows_n.tolist():
        allowed_V = torch.zeros(width * 32, dtype=torch.bool, device=next_X.device)
        # Most tokens end at their first byte, and only those that haven't are looked at any further.
        going = (lengths_V > 0).nonzero().squeeze(1)
        state_G = torch.full_like(going, row)
        depth = 0
        while len(going):
            state_G = next_X[state_G * 256 + vocabulary.bytes_B[starts_V[going] + depth]].long()
            depth += 1
            alive_G = state_G != _DEAD
            ends_G = lengths_V[going] == depth
            allowed_V[going[alive_G & ends_G]] = True
            stays_G = alive_G & ~ends_G
            going, state_G = going[stays_G], state_G[stays_G]
        states.masks_NW[row] = _pack(allowed_V)
        states.counts_N[row] = allowed_V.sum()


def _pack(bits_T: Tensor) -> Tensor:
    """Pack 32 bools to a word."""
    weights_8 = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits_T.device)
    return (bits_T.view(-1, 8).to(torch.uint8) * weights_8).sum(1, dtype=torch.uint8).view(torch.int32)


def allow_by_state(logits_QV: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States) -> None:
    """See `kernels.automata.allow_by_state`."""
    state_Q = places.states_S2[slots_Q, indices_Q % 2].long()
    rows_q = (state_Q != _FREE).nonzero().squeeze(1)
    if not len(rows_q):
        return
    state_q, slots_q = state_Q[rows_q], slots_Q[rows_q]
    words_qW = states.masks_NW[state_q]
    num_q, num_first_q, until_q = places.rules_S3[slots_q].unbind(1)
    order_E = torch.arange(places.ends_SE.shape[1], device=slots_Q.device)
    ends_qE = places.ends_SE[slots_q].long()
    # An end beyond the masks is none.
    is_end_qE = (order_E < num_q[:, None]) & (ends_qE < 32 * words_qW.shape[1])
    ends_qE = torch.where(is_end_qE, ends_qE, 0)
    mask_qE = ((words_qW.gather(1, ends_qE >> 5) >> (ends_qE & 31)) & 1 == 1) & is_end_qE
    others_q = states.counts_N[state_q] > mask_qE.sum(1)
    held_q1 = ((indices_Q[rows_q] < until_q) & others_q)[:, None]
    final_q1 = (states.final_N[state_q] == 1)[:, None]
    may_qE = ~held_q1 & (final_q1 | (mask_qE & (order_E >= num_first_q[:, None])))
    bit_qE = torch.ones_like(ends_qE, dtype=torch.int32) << (ends_qE & 31).to(torch.int32)
    # One end after the other: two of them may stand in one word.
    for column in range(int(num_q.max())):
        place_q1 = ends_qE[:, column : column + 1] >> 5
        old_q1, bit_q1 = words_qW.gather(1, place_q1), bit_qE[:, column : column + 1]
        new_q1 = torch.where(may_qE[:, column : column + 1], old_q1 | bit_q1, old_q1 & ~bit_q1)
        words_qW.scatter_(1, place_q1, torch.where(is_end_qE[:, column : column + 1], new_q1, old_q1))
    reference_sampling.allow_only(logits_QV, rows_q, words_qW)


def advance(
    stored_2Q: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States, vocabulary: Vocabulary
) -> None:
    """See `kernels.automata.advance`."""
    state_Q = places.states_S2[slots_Q, indices_Q % 2].long()
    rows_q = (state_Q != _FREE).nonzero().squeeze(1)
    if not len(rows_q):
        return
    state_q, slots_q, indices_q = state_Q[rows_q], slots_Q[rows_q], indices_Q[rows_q]
    tokens_q, valid_q = stored_2Q[0, rows_q].long(), stored_2Q[1, rows_q] != 0
    starts_q, stops_q = vocabulary.starts_V1[tokens_q].long(), vocabulary.starts_V1[tokens_q + 1].long()
    for depth in range(int((stops_q - starts_q).max())):
        reads_q = valid_q & (starts_q + depth < stops_q)
        byte_q = vocabulary.bytes_B[torch.where(reads_q, starts_q + depth, 0)].long()
        state_q = torch.where(reads_q, states.next_N256[state_q, byte_q].long(), state_q)
    places.states_S2[slots_q, (indices_q + 1) % 2] = state_q.to(torch.int32)
    complete_q = valid_q & (states.final_N[state_q] == 1) & (states.goes_on_N[state_q] == 0)
    stored_2Q[1, rows_q] += complete_q.to(torch.int32)
