"""The state table of one rank: for each running request a slot with its token ids and its block table, on the device.

A plan names slots and ranges of positions; from those few numbers the step's inputs are made on the device, so that a plan
can follow another whose sampled tokens no host has read. Knows nothing of sampling or of models.

S slots, L positions, P blocks of a sequence, R rows of the step, Q rows that sample, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.models.decoder import StepInputs, Stretches
from engine.plan import Admission, StepPlan
from kernels.attention import AttentionMetadata
from kernels.state import SingleRows, lay_out_singles, store_tokens

Ints = npt.NDArray[np.int64]


class _Columns(NamedTuple):
    """`PlanRow`'s fields, each of all rows of a plan."""

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    samples: tuple[bool, ...]
    output_indices: tuple[int, ...]
    new_blocks: tuple[tuple[int, ...], ...]
    scores: tuple[int, ...]


class ScoredRows(NamedTuple):
    """The rows of a step whose tokens' own log-probabilities are wanted. P scored positions."""

    slots: tuple[int, ...]
    counts: tuple[int, ...]
    targets_P: Tensor
    """int64: the tokens that follow the scored positions."""


class SampledRows(NamedTuple):
    """The rows of a step that sample, in the plan's order, on the host and on the device."""

    slots: Ints
    """[Q], on the host, as the next two."""
    lengths: Ints
    """Tokens before the one that is chosen; it is stored at this position."""
    output_indices: Ints
    slots_Q: Tensor
    """int64, on the device, as the next two."""
    lengths_Q: Tensor
    output_indices_Q: Tensor
    scored: ScoredRows | None = None
    """Their positions stand before those that sample among what reaches the head."""

    def some(self, which: slice) -> SampledRows:
        """Give these rows, without those that are scored."""
        on_host = (self.slots[which], self.lengths[which], self.output_indices[which])
        return SampledRows(*on_host, self.slots_Q[which], self.lengths_Q[which], self.output_indices_Q[which])


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    host = torch.from_numpy(values)
    # From pageable memory the copy would wait for all the work that the device still has; the pinned block goes back to
    # torch's pool only when the copy is done.
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def table_bytes(*, num_slots: int, session_len: int, block_size: int) -> int:
    """Bytes that a `StateTable` of this size takes: an int32 for each position, two block tables, and a few words."""
    a_slot = 4 * (session_len + 1) + 2 * 4 * -(-session_len // block_size) + 64
    return num_slots * a_slot


class StateTable:
    """Token ids and block tables of `num_slots` requests."""

    def __init__(
        self, *, num_slots: int, session_len: int, block_size: int, device: torch.device, stretched: bool = False
    ) -> None:
        """Allocate the table. A row has one position more than a session: a step launched blind may sample past its end.

        `stretched`: whether requests have a rope of their own each.
        """
        self.stretch_S = torch.ones(num_slots, device=device) if stretched else None
        self._width = session_len + 1
        self._blocks = -(-session_len // block_size)
        self._block_size = block_size
        self._device = device
        self.token_ids_SL = torch.zeros((num_slots, self._width), dtype=torch.int32, device=device)
        self._block_tables_SP = torch.zeros((num_slots, self._blocks), dtype=torch.int32, device=device)
        self.singles = SingleRows.allocate(num_slots, self._blocks, device)
        """The inputs of a step of single tokens, always here: a captured graph may read them."""
        self._query_start_R1 = torch.arange(num_slots + 1, dtype=torch.int32, device=device)

    def admit(self, admitted: Sequence[Admission]) -> None:
        """Fill slots anew: token ids and the blocks to start with."""
        if not admitted:
            return
        ids = [np.array(one.token_ids, dtype=np.int64) for one in admitted]
        places = [np.arange(len(one.token_ids)) + one.slot * self._width for one in admitted]
        self._scatter(self.token_ids_SL, np.concatenate(places), np.concatenate(ids))
        self._append_blocks([(one.slot, 0, one.blocks) for one in admitted])
        if self.stretch_S is not None:
            slots_A = upload(np.array([one.slot for one in admitted], dtype=np.int64), self._device)
            stretch_A = upload(np.array([one.request.rope_stretch for one in admitted], dtype=np.float32), self._device)
            self.stretch_S.index_copy_(0, slots_A, stretch_A)

    def stretches(self, slots_T: Tensor) -> Stretches | None:
        """Say where the tokens of these slots find their ropes; None where all have the model's."""
        return None if self.stretch_S is None else Stretches(self.stretch_S, slots_T)

    def inputs(self, plan: StepPlan) -> tuple[StepInputs, SampledRows]:
        """Append the plan's new blocks and lay out its rows (at least one) for the model."""
        # By columns: a thousand rows looked at one by one take a millisecond of a small model's step.
        rows = _Columns(*zip(*plan.rows, strict=True))
        if rows.counts.count(1) == len(rows.counts) and all(rows.samples) and not any(rows.scores):
            return self._single_inputs(rows)
        return self._packed_inputs(rows)

    def _single_inputs(self, rows: _Columns) -> tuple[StepInputs, SampledRows]:
        """Lay out rows of one token each in `singles`: one copy up and one launch, whatever their number."""
        count = len(rows.slots)
        packed_R4 = np.full((len(self.singles.slots_R), 4), -1, dtype=np.int32)
        packed_R4[:count, 0], packed_R4[:count, 1], packed_R4[:count, 2] = rows.slots, rows.starts, rows.output_indices
        packed_R4[:count, 3] = [blocks[0] if blocks else -1 for blocks in rows.new_blocks]
        lay_out_singles(
            upload(packed_R4, self._device), self.token_ids_SL, self._block_tables_SP, self._block_size, self.singles
        )
        slots, starts, indices = packed_R4[:count, :3].T.astype(np.int64)
        lengths = starts + 1
        longest = int(lengths.max())
        pages = -(-longest // self._block_size)
        singles = self.singles
        attention = AttentionMetadata(
            block_tables_RP=singles.block_tables_RP[:count, :pages],
            query_start_R1=self._query_start_R1[: count + 1],
            context_lens_R=singles.context_lens_R[:count],
            num_single=count,
            max_query_len=1,
            max_context_len=longest,
            query_lens=(1,) * count,
            # Only the CPU's attention reads it; on a GPU the host's time of such a step counts.
            host_context_lens=tuple(lengths.tolist()) if self._device.type == "cpu" else None,
        )
        inputs = StepInputs(
            tokens_T=singles.tokens_R[:count],
            positions_T=singles.positions_R[:count],
            slots_T=singles.cache_slots_R[:count],
            attention=attention,
            sampled_R=None,
            stretches=self.stretches(singles.slots_R[:count]),
        )
        on_device = singles.slots_R[:count], singles.lengths_R[:count], singles.output_indices_R[:count]
        return inputs, SampledRows(slots, lengths, indices, *on_device)

    def _packed_inputs(self, rows: _Columns) -> tuple[StepInputs, SampledRows]:
        """Lay out rows of any length one behind the other."""
        news = zip(rows.slots, rows.starts, rows.new_blocks, strict=True)
        self._append_blocks([(slot, start, blocks) for slot, start, blocks in news if blocks])
        num_rows = len(rows.slots)
        slots, starts, counts, scores, indices = (
            np.array(column, dtype=np.int64)
            for column in (rows.slots, rows.starts, rows.counts, rows.scores, rows.output_indices)
        )
        contexts, ends = starts + counts, np.cumsum(counts)
        picked = np.flatnonzero(rows.samples)
        sampled = slots[picked], contexts[picked], indices[picked]
        packed = upload(np.concatenate([slots, starts, counts, contexts, [0], ends, *sampled, ends[picked] - 1]), self._device)
        sizes = [num_rows] * 4 + [num_rows + 1] + [len(picked)] * 4
        slots_R, starts_R, counts_R, contexts_R, query_start_R1, slots_Q, lengths_Q, indices_Q, last_Q = packed.split(sizes)
        longest = int(contexts.max())
        attention = AttentionMetadata(
            block_tables_RP=self._block_tables_SP.index_select(0, slots_R)[:, : -(-longest // self._block_size)].contiguous(),
            query_start_R1=query_start_R1.to(torch.int32),
            context_lens_R=contexts_R.to(torch.int32),
            num_single=_count_single(rows.counts),
            max_query_len=int(counts.max()),
            max_context_len=longest,
            query_lens=rows.counts,
            host_context_lens=tuple(contexts.tolist()),
        )
        num_tokens = int(ends[-1])
        if num_tokens == num_rows:
            slot_T, positions_T = slots_R, starts_R
        else:
            row_T = torch.repeat_interleave(torch.arange(num_rows, device=self._device), counts_R, output_size=num_tokens)
            slot_T = slots_R[row_T]
            positions_T = torch.arange(num_tokens, device=self._device) - query_start_R1[row_T] + starts_R[row_T]
        scored: ScoredRows | None = None
        if scores.any():  # not in a decode step, whose host time counts
            scored, places_P = self._scored(rows, ends - counts)
            last_Q = torch.cat([places_P, last_Q])
        inputs = StepInputs(
            tokens_T=self.token_ids_SL.view(-1).index_select(0, slot_T * self._width + positions_T),
            positions_T=positions_T,
            slots_T=self._cache_slots(slot_T, positions_T),
            attention=attention,
            sampled_R=None if len(picked) == num_tokens and scored is None else last_Q,
            stretches=self.stretches(slot_T),
        )
        return inputs, SampledRows(*sampled, slots_Q, lengths_Q, indices_Q, scored)

    def store(self, rows: SampledRows, tokens_Q: Tensor, best_Q: Tensor) -> Tensor:
        """Write the sampled tokens behind their rows' last ones, from where the next plan computes them.

        `best_Q`: each row's largest logit. Gives int32 [2, Q]: the tokens as stored, and whether they mean anything.
        """
        return store_tokens(tokens_Q, best_Q, rows.slots_Q, rows.lengths_Q, self.token_ids_SL)

    def _scored(self, rows: _Columns, firsts: Ints) -> tuple[ScoredRows, Tensor]:
        """Find the rows that score and where in the step their scored positions stand; `firsts`: where each row does."""
        scoring = [one for one in zip(rows.slots, rows.starts, rows.scores, firsts.tolist(), strict=True) if one[2]]
        places = [np.arange(first, first + scores) for _, _, scores, first in scoring]
        following = [np.arange(scores) + slot * self._width + start + 1 for slot, start, scores, _ in scoring]
        places_P, following_P = upload(np.concatenate(places + following), self._device).chunk(2)
        targets_P = self.token_ids_SL.view(-1).index_select(0, following_P).to(torch.int64)
        slots, _, counts, _ = zip(*scoring, strict=True)
        return ScoredRows(slots, counts, targets_P), places_P

    def _cache_slots(self, slot_T: Tensor, positions_T: Tensor) -> Tensor:
        """Where each token's key and value lie in the pool."""
        page_T = torch.div(positions_T, self._block_size, rounding_mode="floor")
        block_T = self._block_tables_SP.view(-1).index_select(0, slot_T * self._blocks + page_T).to(torch.int64)
        return block_T * self._block_size + positions_T - page_T * self._block_size

    def _append_blocks(self, appended: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Write blocks into tables: slot, position from which on they are needed, blocks.

        Nothing counts them here: a plan that didn't run for want of memory is followed by another one for the same positions.
        """
        places: list[range] = []
        for slot, position, blocks in appended:
            index = -(-position // self._block_size)
            assert index + len(blocks) <= self._blocks, "a plan gives a slot more blocks than a session has"
            places.append(range(slot * self._blocks + index, slot * self._blocks + index + len(blocks)))
        if any(places):
            indices = np.fromiter(chain.from_iterable(places), dtype=np.int64)
            values = np.fromiter(chain.from_iterable(blocks for *_, blocks in appended), dtype=np.int64)
            self._scatter(self._block_tables_SP, indices, values)

    def _scatter(self, table: Tensor, indices: Ints, values: Ints) -> None:
        places, contents = upload(np.concatenate([indices, values]), self._device).view(2, -1)
        table.view(-1).index_copy_(0, places, contents.to(torch.int32))


def _count_single(counts: Sequence[int]) -> int:
    """Count the leading rows of one token."""
    return next((number for number, count in enumerate(counts) if count != 1), len(counts))
