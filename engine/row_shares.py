"""Many rows are sampled by all ranks of a group, each its share of them: each rank brings together the logits of its rows only.

Every rank has all rows' sampling parameters and draws by the same seeds, so that whoever samples a row gives it the same token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.parallel import ParallelGroup, row_share

LEAST_ROWS = 128
"""By the times of docs/decisions/0014 bringing the logits together costs more from here on than telling the tokens; the bound itself wasn't measured."""
_WIDTH = 16
"""Words are told by multiples of so many: Triton compiles for widths and addresses that divide by 16, and for others apart."""


class RowShares:
    """What this rank's share of a step's rows is, and how all ranks get to know all draws."""

    def __init__(self, group: ParallelGroup, *, device: torch.device) -> None:
        """Every rank of the group makes one at the same time: the first telling compiles what tells."""
        self._group = group
        if group.size > 1:
            self.tell(torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device), rows=group.size)

    def mine(self, rows: int) -> slice | None:
        """Give this rank's of `rows` rows; None: every rank samples all of them."""
        if self._group.size == 1 or rows < LEAST_ROWS:
            return None
        return row_share(rows, rank=self._group.rank, size=self._group.size)

    def tell(self, tokens_q: Tensor, best_q: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
        """Give all rows' (tokens int64 [Q], largest logits float32 [Q]), where this rank drew those of its share."""
        share, count = -(-rows // self._group.size), len(tokens_q)
        width = -(-share // _WIDTH) * _WIDTH
        words_2W = torch.zeros((2, width), dtype=torch.int32, device=tokens_q.device)
        words_2W[0, :count] = tokens_q
        words_2W[1, :count] = best_q.float().view(torch.int32)
        told_2GW = self._group.all_gather_words(words_2W).view(2, self._group.size, width)
        tokens_Q, best_Q = (one_GW[:, :share].reshape(-1)[:rows] for one_GW in told_2GW)
        return tokens_Q.long(), best_Q.view(torch.float32)
