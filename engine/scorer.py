"""Log-probabilities of prompt tokens: from hidden states to what each slot's request asks for. Nothing is sampled here.

P scored positions of a step, D hidden, V vocabulary. Logits of a whole prompt would be the largest tensor of the process
(8192 positions of 152,000 float32 are 5 GB), so they are made and dropped a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from engine.plan import Admission
from engine.state_table import ScoredRows
from headrace.completion import TokenLogprobs
from kernels.sampling import token_logprobs

LEAST_AT_ONCE = 64
"""Positions whose logits are there at once, or as many as a batch has rows: the sampler has had to find room for those."""


class Scores(NamedTuple):
    """A step's scores on the device, one entry for each scored position."""

    counts: tuple[int, ...]
    """Positions of each row that scores, in the plan's order."""
    widths: tuple[int, ...]
    """How many of the top tokens each of those rows asked for."""
    targets_P: Tensor
    logprobs_P: Tensor
    top_logprobs_Pk: Tensor
    top_ids_Pk: Tensor


class Scorer:
    """Scores the rows of a step; knows for each slot how many top tokens its request wants."""

    def __init__(self, *, num_slots: int, vocab_size: int) -> None:
        """Start with no request."""
        self._at_once = max(num_slots, LEAST_AT_ONCE)
        self._vocab_size = vocab_size
        self._widths = [0] * num_slots

    def admit(self, admitted: Sequence[Admission]) -> None:
        """Note what newly taken slots ask for."""
        for one in admitted:
            self._widths[one.slot] = one.request.config.prompt_logprobs or 0

    def score(self, head: Callable[[Tensor], Tensor], hidden_PD: Tensor, rows: ScoredRows) -> Scores:
        """Run the head over the scored positions, `at_once` of them at a time; waits for no device."""
        widths = tuple(self._widths[slot] for slot in rows.slots)
        k = min(max(widths), self._vocab_size)
        pieces = [
            token_logprobs(head(piece_CD), targets_C, k)
            for piece_CD, targets_C in zip(hidden_PD.split(self._at_once), rows.targets_P.split(self._at_once), strict=True)
        ]
        chosen_P, ids_Pk, tops_Pk = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return Scores(rows.counts, widths, rows.targets_P, chosen_P, tops_Pk, ids_Pk)


def read_scores(host: Scores) -> tuple[tuple[TokenLogprobs, ...], ...]:
    """Sort scores that have come to the host by rows."""
    columns = (host.targets_P, host.logprobs_P, host.top_logprobs_Pk, host.top_ids_Pk)
    positions = zip(*(tensor.tolist() for tensor in columns), strict=True)
    return tuple(
        tuple(
            TokenLogprobs(token_id=token, logprob=logprob, top=tuple(zip(ids[:width], tops[:width], strict=True)))
            for token, logprob, tops, ids in islice(positions, count)
        )
        for count, width in zip(host.counts, host.widths, strict=True)
    )
