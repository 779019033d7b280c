"""Automata over bytes that hold rows to a form: which tokens may come in a state, and where a token leads. All on the device.

Many automata share one table; a row of it is a state. Knows no grammar, no request and no text: a token is the bytes it stands for.

N states, V tokens, W = V / 32 words rounded up, S slots, Q rows of a step that sample, E ends of a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference_automata

FREE = 0
"""The state of rows that follow no automaton."""
DEAD = 1
"""The state that nothing leads out of; its bytes all lead to itself."""


class Vocabulary(NamedTuple):
    """What tokens stand for."""

    starts_V1: Tensor
    """int32, one more than there are tokens: where each token's bytes start, and the last one's end. Tokens without bytes never come."""
    bytes_B: Tensor
    """int32."""


class States(NamedTuple):
    """The table of all states."""

    next_N256: Tensor
    """int32: the state after each byte."""
    final_N: Tensor
    """int32: 1 where a text may end."""
    goes_on_N: Tensor
    """int32: 1 where any byte leads on."""
    masks_NW: Tensor
    """int32: bit t % 32 of word t // 32: whether token t may come. Filled by `fill_masks`, as is the next."""
    counts_N: Tensor
    """int32: how many tokens may come."""


class Places(NamedTuple):
    """Where each slot stands, and how it may end: parts of one table, int32, so that a slot is filled by one write."""

    table_SX: Tensor

    @classmethod
    def allocate(cls, slots: int, ends: int, device: torch.device) -> Places:
        """Make room for `ends` ends a slot; nobody follows anything."""
        return cls(torch.zeros((slots, 5 + ends), dtype=torch.int32, device=device))

    @property
    def states_S2(self) -> Tensor:
        """The state before output index i stands in column i % 2. So a step that runs a second time finds what it found."""
        return self.table_SX[:, :2]

    @property
    def rules_S3(self) -> Tensor:
        """How many ends there are, how many of them are of the first kind, and the index before which they don't come while others may."""
        return self.table_SX[:, 2:5]

    @property
    def ends_SE(self) -> Tensor:
        """Tokens that end the answer, where a text may end.

        The first ones come only there, whatever bytes they have; the others also where their bytes may come.
        """
        return self.table_SX[:, 5:]


def fill_masks(states: States, vocabulary: Vocabulary, rows_n: Tensor) -> None:
    """Work out masks and counts of some states (int64, none twice), whose bytes' states are there."""
    if rows_n.is_cuda:
        from kernels.gpu import automata as gpu

        gpu.fill_masks(states, vocabulary, rows_n)
    else:
        reference_automata.fill_masks(states, vocabulary, rows_n)


def allow_by_state(logits_QV: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States) -> None:
    """logits[q, t] = -inf, in place, for each token that may not come in the state of q's slot at its output index.

    Rows whose state is `FREE` are not touched. Logits of any float type with a contiguous last dimension; `slots_Q` and `indices_Q`
    int64. A token beyond the masks never comes.
    """
    if logits_QV.is_cuda:
        from kernels.gpu import automata as gpu

        gpu.allow_by_state(logits_QV, slots_Q, indices_Q, places, states)
    else:
        reference_automata.allow_by_state(logits_QV, slots_Q, indices_Q, places, states)


def advance(
    stored_2Q: Tensor, slots_Q: Tensor, indices_Q: Tensor, places: Places, states: States, vocabulary: Vocabulary
) -> None:
    """Move each row's state on by the bytes of its token, to the column of the next output index.

    `stored_2Q` as `kernels.state.store_tokens` gives it: tokens, and 1 where they mean anything, which becomes 2 where the text is
    complete by this token and nothing can follow. A token without bytes, or one that means nothing, leaves the state as it is.
    """
    if stored_2Q.is_cuda:
        from kernels.gpu import automata as gpu

        gpu.advance(stored_2Q, slots_Q, indices_Q, places, states, vocabulary)
    else:
        reference_automata.advance(stored_2Q, slots_Q, indices_Q, places, states, vocabulary)
