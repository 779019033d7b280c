"""The two ends of a decoder: token ids to vectors, and vectors to logits of the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from engine.layers.matrix import Matrix
from engine.parallel import ParallelGroup


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row for each token id, whole on every rank: a gather costs less than the talk that a split would need."""

    weight_VD: Tensor

    def __call__(self, tokens_T: Tensor) -> Tensor:
        """Give [T, D]."""
        return F.embedding(tokens_T, self.weight_VD)


@dataclass(frozen=True, slots=True)
class Head:
    """The output head, split by vocabulary rows. The last rank's share may end in rows of zeros, which are cut off."""

    weight: Matrix
    vocab_size: int
    group: ParallelGroup

    def __call__(self, x_RD: Tensor, mine: slice | None = None) -> Tensor:
        """Give logits [R, V] in the weight's type: a float32 copy costs more than whoever reads them.

        The same on every rank, or where `mine` says so of these rows alone, each rank of its own (see `engine.row_shares`).
        """
        logits_RV = self._gathered(x_RD, mine)
        return logits_RV[:, : self.vocab_size]

    def _gathered(self, x_RD: Tensor, mine: slice | None) -> Tensor:
        sums, rows = self.group.sums, len(x_RD)
        columns = self.weight.plain.shape[0] if sums is not None else 0
        part_RC = None if sums is None else sums.columns(rows, columns)
        if sums is None or part_RC is None:
            logits_RV = self.group.all_gather_columns(self.weight(x_RD))
            return logits_RV if mine is None else logits_RV[mine]
        self.weight.into(part_RC, x_RD)
        return sums.gather_columns(rows, columns, mine)
