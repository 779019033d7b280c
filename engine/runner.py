"""Runs step plans on one rank: state table → model → sampler → state table, with no wait for the device in between.

`forward` is a public argument: `engine.graphs` may put a replayed CUDA graph in its place for plans of single tokens.
Knows nothing of requests beyond their slot, and nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import LayerCache, StepInputs
from engine.plan import RunningStep, StepOutput, StepPlan
from engine.row_shares import RowShares
from engine.sampler import Sampled, Sampler
from engine.scorer import Scorer, Scores, read_scores
from engine.state_table import SampledRows, StateTable, upload
from engine.token_masks import TokenMasks
from headrace.completion import TokenLogprobs
from kernels.blocks import copy_blocks

Forward = Callable[[StepInputs, Sequence[LayerCache]], Tensor]
"""Writes the step's keys and values into the caches and gives what the head reads: hidden states [R, D] of the positions asked for."""


class Head(Protocol):
    """Makes logits [R, V] of them, in the model's type; of the rows `mine` alone where it is given, on each rank of others."""

    def __call__(self, x_RD: Tensor, mine: slice | None = None) -> Tensor:
        """Give the logits."""
        ...


class _Unsampled(NamedTuple):
    """A step that has run up to its logits."""

    logits_QV: Tensor
    rows: SampledRows
    running: _Launched


class Runner:
    """One rank's hands. Not thread-safe; plans run in the order launched."""

    def __init__(
        self,
        *,
        forward: Forward,
        head: Head,
        caches: Sequence[LayerCache],
        table: StateTable,
        sampler: Sampler,
        scorer: Scorer,
        shares: RowShares,
    ) -> None:
        """Take the parts; the runner owns the table and the sampler from here on."""
        self._forward = forward
        self._head = head
        self._scorer = scorer
        self._caches = caches
        self._table = table
        self._sampler = sampler
        self._shares = shares
        self._unsampled: _Unsampled | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> RunningStep:
        """Start a step; on a CPU it is done on return. One that waits for masks is sampled by `choose`."""
        assert self._unsampled is None, "a step is launched while another one waits for its masks"
        self._table.admit(plan.admitted)
        self._sampler.admit(plan.admitted)
        self._scorer.admit(plan.admitted)
        if plan.copies:
            self._copy(plan.copies)
        if not plan.rows:
            return _Done(StepOutput(step=plan.step, tokens=()))
        inputs, rows = self._table.inputs(plan)
        hidden_RD = self._forward(inputs, self._caches)
        running = _Launched(plan.step)
        if rows.scored is not None:
            count = sum(rows.scored.counts)
            running.report(self._scorer.score(self._head, hidden_RD[:count], rows.scored))
            hidden_RD = hidden_RD[count:]
        if not len(rows.slots):
            return running
        mine = self._shares.mine(len(rows.slots))
        if mine is not None and not self._sampler.may_be_shared(rows):
            mine = None
        logits_QV = self._head(hidden_RD, mine)
        if self._sampler.waits_for_masks(rows):
            self._unsampled = _Unsampled(logits_QV, rows, running)
        else:
            self._sample(logits_QV, rows, running, mine=mine)
        return running

    @property
    def waits_for_masks(self) -> bool:
        """Whether the step launched last isn't sampled yet."""
        return self._unsampled is not None

    @torch.inference_mode()
    def choose(self, masks: TokenMasks) -> None:
        """Sample the step launched last."""
        assert self._unsampled is not None, "masks for a step that doesn't wait for any"
        (logits_QV, rows, running), self._unsampled = self._unsampled, None
        self._sample(logits_QV, rows, running, masks=masks)

    def _sample(
        self,
        logits_qV: Tensor,
        rows: SampledRows,
        running: _Launched,
        *,
        masks: TokenMasks | None = None,
        mine: slice | None = None,
    ) -> None:
        """Sample the rows, or this rank's of them, whose logits these are, and store the tokens of all."""
        own = rows if mine is None else rows.some(mine)
        sampled = self._sampler.sample(logits_qV, own, self._table.token_ids_SL, masks)
        tokens_Q, best_Q = sampled.tokens_Q, sampled.best_Q
        if mine is not None:
            tokens_Q, best_Q = self._shares.tell(tokens_Q, best_Q, rows=len(rows.slots))
        stored_2Q = self._table.store(rows, tokens_Q, best_Q)
        if sampled.held:
            self._sampler.advance(stored_2Q, rows)
        running.start(stored_2Q, sampled)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks before anything of the step reads or writes them; a replayed graph comes after it on the same stream."""
        pairs_P2 = upload(np.array(pairs, dtype=np.int64), self._caches[0].k_BKSH.device)
        copy_blocks([part for cache in self._caches for part in cache.tensors], pairs_P2)


class _Done:
    """A step without tokens."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def result(self) -> StepOutput:
        return self._output


class _Launched:
    """A step whose tokens are on their way to the host."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._rows: tuple[int, ...] = ()
        self._host: list[Tensor] = []
        self._scores: Scores | None = None
        self._event: torch.cuda.Event | None = None

    def report(self, scores: Scores) -> None:
        """Send the prompt's log-probabilities on their way."""
        sent = [_to_host(tensor) for tensor in (scores.targets_P, scores.logprobs_P, scores.top_logprobs_Pk, scores.top_ids_Pk)]
        self._scores = Scores(scores.counts, scores.widths, *sent)
        self._mark(scores.targets_P)

    def _mark(self, sent: Tensor) -> None:
        """Remember the moment up to which `result` waits."""
        if sent.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def start(self, stored_2Q: Tensor, sampled: Sampled) -> None:
        """Send the sampled tokens on their way; `stored_2Q` is what `StateTable.store` gave."""
        self._rows, self._widths = sampled.reports, sampled.widths
        wanted = [stored_2Q, *(sampled.logprobs or ())]
        self._host = [_to_host(tensor) for tensor in wanted]
        self._mark(stored_2Q)

    def result(self) -> StepOutput:
        if self._event is not None:
            self._event.synchronize()
        tokens, valid = self._host[0].tolist() if self._host else ([], [])
        return StepOutput(
            step=self._step,
            tokens=tuple(tokens),
            invalid=frozenset() if all(valid) else frozenset(number for number, good in enumerate(valid) if not good),
            complete=frozenset(number for number, good in enumerate(valid) if good == 2) if 2 in valid else frozenset(),
            logprobs=self._logprobs(tokens) if self._rows else (),
            prompt_logprobs=() if self._scores is None else read_scores(self._scores),
        )

    def _logprobs(self, tokens: list[int]) -> tuple[TokenLogprobs | None, ...]:
        chosen, ids, tops = (tensor.tolist() for tensor in self._host[1:])
        out: list[TokenLogprobs | None] = [None] * len(tokens)
        for number, row in enumerate(self._rows):
            width = self._widths[number]
            top = tuple(zip(ids[number][:width], tops[number][:width], strict=True))
            out[row] = TokenLogprobs(token_id=tokens[row], logprob=chosen[number], top=top)
        return tuple(out)


def _to_host(tensor: Tensor) -> Tensor:
    """Start a copy to pinned memory, which needs no wait; a CPU tensor is there already."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
