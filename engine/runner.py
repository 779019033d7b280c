"""Runs step plans on one rank: state table → model → sampler → state table, with no wait for the device in between.

`forward` is a public argument: `engine.graphs` may put a replayed CUDA graph in its place for plans of single tokens.
Knows nothing of requests beyond their slot, and nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import LayerCache, StepInputs
from engine.plan import RunningStep, StepOutput, StepPlan
from engine.sampler import Sampled, Sampler
from engine.state_table import StateTable, upload
from headrace.completion import TokenLogprobs
from kernels.blocks import copy_blocks

Forward = Callable[[StepInputs, Sequence[LayerCache]], Tensor]
"""Writes the step's keys and values into the caches and gives float32 logits [R, V] of the rows that sample."""


class Runner:
    """One rank's hands. Not thread-safe; plans run in the order launched."""

    def __init__(self, *, forward: Forward, caches: Sequence[LayerCache], table: StateTable, sampler: Sampler) -> None:
        """Take the parts; the runner owns the table and the sampler from here on."""
        self._forward = forward
        self._caches = caches
        self._table = table
        self._sampler = sampler

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> RunningStep:
        """Start a step; on a CPU it is done on return."""
        self._table.admit(plan.admitted)
        self._sampler.admit(plan.admitted)
        if plan.copies:
            self._copy(plan.copies)
        if not plan.rows:
            return _Done(StepOutput(step=plan.step, tokens=()))
        inputs, rows = self._table.inputs(plan)
        logits_QV = self._forward(inputs, self._caches)
        if not rows.host:
            return _Done(StepOutput(step=plan.step, tokens=()))
        sampled = self._sampler.sample(logits_QV, rows, self._table.token_ids_SL)
        self._table.store(rows, sampled.tokens_Q)
        return _Launched(plan.step, sampled)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks before anything of the step reads or writes them; a replayed graph comes after it on the same stream."""
        pairs_P2 = upload(np.array(pairs, dtype=np.int64), self._caches[0].k_BKSH.device)
        copy_blocks([part for cache in self._caches for part in cache], pairs_P2)


class _Done:
    """A step without tokens."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def result(self) -> StepOutput:
        return self._output


class _Launched:
    """A step whose tokens are on their way to the host."""

    def __init__(self, step: int, sampled: Sampled) -> None:
        self._step = step
        self._rows = sampled.logprob_rows
        self._widths = sampled.logprob_widths
        wanted = [sampled.tokens_Q, sampled.valid_Q]
        if self._rows:
            wanted += [sampled.logprobs_q, sampled.top_logprobs_qk, sampled.top_ids_qk]
        self._host = [_to_host(tensor) for tensor in wanted]
        self._event: torch.cuda.Event | None = None
        if sampled.tokens_Q.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepOutput:
        if self._event is not None:
            self._event.synchronize()
        tokens, valid = self._host[0].tolist(), self._host[1].tolist()
        return StepOutput(
            step=self._step,
            tokens=tuple(tokens),
            invalid=frozenset(number for number, good in enumerate(valid) if not good),
            logprobs=self._logprobs(tokens) if self._rows else (),
        )

    def _logprobs(self, tokens: list[int]) -> tuple[TokenLogprobs | None, ...]:
        chosen, tops, ids = (tensor.tolist() for tensor in self._host[2:])
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
