"""From a step's logits to its tokens: what each slot's request asks for, brought to the kernels in the documented order.

Order on the logits of a row: the mask of its response format, bias, repetition, frequency and presence penalties, bans (bad words, end tokens that may
not come yet), temperature, top-k, top-p, min-p, draw. Bans may come last of the edits because nothing moves minus infinity.
Only the rows that ask for an edit pay for it. Raw log-probabilities are taken before any of it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admission
from engine.request import TokenRequest
from engine.state_table import SampledRows, upload
from engine.token_automata import TokenAutomata, follows_on_device
from engine.token_masks import TokenMasks
from kernels.sampling import (
    PenaltyInputs,
    SamplingInputs,
    TokenLogprobs,
    add_bias,
    allow_only,
    apply_penalties,
    ban,
    sample,
    token_logprobs,
)
from kernels.state import hold_back

_LEAST_TEMPERATURE = 1e-30
"""A smaller one makes float32 infinities of many logits, which are then equally likely; this one draws the best token already."""


_FOR_EVER = (1 << 31) - 1
_MOST_ENDS = 8
"""End tokens of a slot that the device knows; a request with more has them banned row by row."""


class _Trait(enum.IntFlag):
    """What a slot's request asks of a step that samples it; a step does what any of its rows asks."""

    RANDOM = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    ENDS = 16
    """End tokens are held back, for ever or up to `min_new_tokens`."""
    EDITS = 32
    """The logits are changed in another way."""
    REPORTS = 64
    """Log-probabilities are wanted."""
    GUIDED = 128
    """It follows a grammar: the step's sampling waits for its mask."""
    HELD = 256
    """It follows an automaton, which is on the device."""


class Sampled(NamedTuple):
    """A step's draws on the device, one for each row that samples."""

    tokens_Q: Tensor
    """int64."""
    best_Q: Tensor
    """The largest logit: where it isn't finite nothing could be drawn, and the token means nothing."""
    reports: tuple[int, ...]
    """Which rows asked for log-probabilities."""
    widths: tuple[int, ...]
    """How many of the top tokens each of them asked for."""
    logprobs: TokenLogprobs | None
    """Of the rows that asked; None: none did."""
    held: bool = False
    """Whether a row follows an automaton, which `Sampler.advance` moves on once the tokens are stored."""


class _Edits(NamedTuple):
    """What one slot's request changes in its logits, worked out once when it is admitted."""

    bias: tuple[tuple[int, float], ...]
    banned: tuple[int, ...]
    """Tokens that never come."""
    late: tuple[int, ...]
    """Tokens that don't come before output index `until`."""
    until: int
    sequences: tuple[tuple[int, ...], ...]
    """Sequences of two or more tokens that never come to their end."""
    penalties: tuple[float, float, float] | None
    """Repetition, presence, frequency; None: all off."""
    prompt_len: int

    @property
    def are_any(self) -> bool:
        """Whether the rows of this slot need more than their ends held back by the device."""
        many_ends = len(self.late) > _MOST_ENDS
        return bool(self.bias or self.banned or self.sequences or self.penalties or many_ends)


def _edits(request: TokenRequest, vocab_size: int) -> _Edits:
    config = request.config
    penalties = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty)
    # Masks hold ends back themselves, because only the host knows when a grammar leaves nothing else.
    until = 0 if config.response_format is not None else config.min_new_tokens
    until = _FOR_EVER if config.ignore_eos else until
    # An id beyond the vocabulary can't come anyway, and would be a write out of bounds.
    ends = {token for token in (*request.eos_ids, *request.stop_ids) if token < vocab_size}
    return _Edits(
        bias=tuple((token, value) for token, value in dict(config.logit_bias).items() if token < vocab_size),
        banned=tuple(sorted({ids[0] for ids in request.bad_sequences if len(ids) == 1 and ids[0] < vocab_size})),
        late=tuple(sorted(ends)) if until else (),
        until=until,
        sequences=tuple(ids for ids in request.bad_sequences if len(ids) > 1 and max(ids) < vocab_size),
        penalties=None if penalties == (1.0, 0.0, 0.0) else penalties,
        prompt_len=len(request.prompt_ids),
    )


def _traits(request: TokenRequest, edits: _Edits) -> _Trait:
    config = request.config
    random = not config.is_greedy
    asked = (
        (random, _Trait.RANDOM),
        (random and config.top_k > 0, _Trait.TOP_K),
        (random and config.top_p < 1, _Trait.TOP_P),
        (random and config.min_p > 0, _Trait.MIN_P),
        (edits.late, _Trait.ENDS),
        (edits.are_any, _Trait.EDITS),
        (config.logprobs is not None, _Trait.REPORTS),
        (config.response_format is not None, _Trait.HELD if follows_on_device(request) else _Trait.GUIDED),
    )
    found = _Trait(0)
    for wish, trait in asked:
        if wish:
            found |= trait
    return found


class Sampler:
    """Sampling parameters of all slots, on the device as columns; what only some rows ask for, on the host."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device, automata: TokenAutomata | None = None) -> None:
        """Allocate the columns. `automata`: without them no request may have a response format that is regular."""
        self._automata = automata
        self._device = device
        self._vocab_size = vocab_size
        # Rows: temperature, top-p and min-p (the bits of float32), top-k, choice, greedy.
        self._columns_6S = torch.zeros((6, num_slots), dtype=torch.int32, device=device)
        self._seeds_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # End tokens (-1: none) and the output index before which they don't come.
        self._ends_SE = torch.full((num_slots, _MOST_ENDS), -1, dtype=torch.int32, device=device)
        self._until_S = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._traits_S = np.zeros(num_slots, dtype=np.int64)
        self._edits: dict[int, _Edits] = {}
        self._widths: dict[int, int] = {}

    def admit(self, admitted: Sequence[Admission]) -> None:
        """Fill the columns of newly taken slots."""
        if not admitted:
            return
        slots = np.array([one.slot for one in admitted], dtype=np.int64)
        seeds = np.array([_signed(one.request.seed) for one in admitted], dtype=np.int64)
        numbers = np.full((len(admitted), 6 + 1 + _MOST_ENDS), -1, dtype=np.int32)
        for number, (slot, request, *_) in enumerate(admitted):
            config = request.config
            edits = self._edits[slot] = _edits(request, self._vocab_size)
            self._widths[slot] = config.logprobs or 0
            self._traits_S[slot] = _traits(request, edits)
            # Greedy rows divide by 1: a temperature of 0 would make NaNs that nobody reads but everybody finds.
            temperature = 1.0 if config.is_greedy else max(config.temperature, _LEAST_TEMPERATURE)
            numbers[number, :3] = np.array((temperature, config.top_p, config.min_p), dtype=np.float32).view(np.int32)
            numbers[number, 3:6] = (min(config.top_k, self._vocab_size), request.choice, config.is_greedy)
            numbers[number, 6] = edits.until
            ends = edits.late[:_MOST_ENDS]
            numbers[number, 7 : 7 + len(ends)] = ends
        slots_A, seeds_A = upload(np.stack([slots, seeds]), self._device)
        numbers_AC = upload(numbers, self._device)
        self._seeds_S.index_copy_(0, slots_A, seeds_A)
        self._columns_6S.index_copy_(1, slots_A, numbers_AC[:, :6].T)
        self._until_S.index_copy_(0, slots_A, numbers_AC[:, 6])
        self._ends_SE.index_copy_(0, slots_A, numbers_AC[:, 7:])
        if self._automata is not None:
            self._automata.admit(admitted, slots_A)

    def waits_for_masks(self, rows: SampledRows) -> bool:
        """Whether a row follows a grammar, so that the step can't be sampled before the host has read the step before."""
        return _Trait.GUIDED in self._asked(rows)

    def may_be_shared(self, rows: SampledRows) -> bool:
        """Whether a rank could sample some of the rows and know only the tokens of the others."""
        return not self._asked(rows) & (_Trait.REPORTS | _Trait.GUIDED | _Trait.HELD)

    def _asked(self, rows: SampledRows) -> _Trait:
        """Give what any row of the step asks for."""
        return _Trait(int(np.bitwise_or.reduce(self._traits_S[rows.slots])))

    def sample(self, logits_QV: Tensor, rows: SampledRows, token_ids_SL: Tensor, masks: TokenMasks | None = None) -> Sampled:
        """Choose a token for each row. `logits_QV`, of any float type, may be changed; `token_ids_SL` is the table's history."""
        asked = self._asked(rows)
        reports, raw_qV = self._rows_with(_Trait.REPORTS, rows) if _Trait.REPORTS in asked else (), logits_QV
        if reports:
            raw_qV = logits_QV[self._index(reports)]
        if _Trait.EDITS in asked:
            logits_QV = logits_QV.float()  # sums in a narrower type would be rounded one after the other
        if masks is not None and masks.entries:
            words = upload(masks.words_qW, self._device)
            allow_only(logits_QV, self._index(masks.entries), words)
        held = _Trait.HELD in asked
        if held:
            assert self._automata is not None, "a sampler without automata was given a request that follows one"
            self._automata.allow(logits_QV, rows)
        if _Trait.EDITS in asked:
            editing = self._rows_with(_Trait.EDITS, rows)
            self._edit(logits_QV, rows, [(number, self._edits[int(rows.slots[number])]) for number in editing], token_ids_SL)
        if _Trait.ENDS in asked:
            hold_back(logits_QV, rows.slots_Q, rows.output_indices_Q, self._until_S, self._ends_SE)
        tokens_Q, best_Q = sample(
            logits_QV,
            self._inputs(rows),
            any_random=_Trait.RANDOM in asked,
            any_top_k=_Trait.TOP_K in asked,
            any_top_p=_Trait.TOP_P in asked,
            any_min_p=_Trait.MIN_P in asked,
        )
        if not reports:
            return Sampled(tokens_Q, best_Q, (), (), None, held)
        widths = tuple(self._widths[int(rows.slots[number])] for number in reports)
        chosen_q = torch.where(torch.isfinite(best_Q), tokens_Q, 0)[self._index(reports)]
        logprobs = token_logprobs(raw_qV, chosen_q, min(max(widths), self._vocab_size))
        return Sampled(tokens_Q, best_Q, reports, widths, logprobs, held)

    def advance(self, stored_2Q: Tensor, rows: SampledRows) -> None:
        """Move the rows that follow an automaton on; `stored_2Q`, what `StateTable.store` gave, says 2 where an answer is complete."""
        assert self._automata is not None, "nobody follows an automaton"
        self._automata.advance(stored_2Q, rows)

    def _rows_with(self, trait: _Trait, rows: SampledRows) -> tuple[int, ...]:
        traits_Q = self._traits_S[rows.slots]
        return tuple(np.flatnonzero(traits_Q & trait).tolist())

    def _inputs(self, rows: SampledRows) -> SamplingInputs:
        bits_6Q = self._columns_6S.index_select(1, rows.slots_Q)
        temperature_Q, top_p_Q, min_p_Q = bits_6Q[:3].view(torch.float32)
        top_k_Q, choice_Q, greedy_Q = bits_6Q[3:]
        return SamplingInputs(
            temperature_R=temperature_Q,
            top_k_R=top_k_Q,
            top_p_R=top_p_Q,
            min_p_R=min_p_Q,
            seed_R=self._seeds_S.index_select(0, rows.slots_Q),
            position_R=rows.output_indices_Q,
            choice_R=choice_Q,
            greedy_R=greedy_Q.to(torch.bool),
        )

    def _edit(self, logits_QV: Tensor, rows: SampledRows, asking: Sequence[tuple[int, _Edits]], token_ids_SL: Tensor) -> None:
        """Apply what the asking rows ask for, in place."""
        bias = [(number, token, value) for number, wish in asking for token, value in wish.bias]
        if bias:
            places = self._pairs([(number, token) for number, token, _ in bias])
            values = np.array([value for *_, value in bias], dtype=np.float64)
            add_bias(logits_QV, *places, upload(values.view(np.int64), self._device).view(torch.float64))
        punished = [(number, wish) for number, wish in asking if wish.penalties]
        if punished:
            apply_penalties(logits_QV, self._penalties(rows, punished, token_ids_SL))
        banned = [(number, token) for number, wish in asking for token in wish.banned]
        banned += [
            (number, token)
            for number, wish in asking
            if rows.output_indices[number] < wish.until
            for token in wish.late[_MOST_ENDS:]
        ]
        if banned:
            ban(logits_QV, *self._pairs(banned))
        ending = [(number, ids) for number, wish in asking for ids in wish.sequences if len(ids) <= rows.lengths[number] + 1]
        if ending:
            self._ban_ends(logits_QV, rows, ending, token_ids_SL)

    def _penalties(self, rows: SampledRows, punished: Sequence[tuple[int, _Edits]], token_ids_SL: Tensor) -> PenaltyInputs:
        numbers = self._index([number for number, _ in punished])
        longest = int(max(rows.lengths[number] for number, _ in punished))
        factors = np.array([wish.penalties for _, wish in punished], dtype=np.float64).T.copy()
        repetition_q, presence_q, frequency_q = upload(factors.view(np.int64), self._device).view(torch.float64).float()
        return PenaltyInputs(
            token_ids_QL=token_ids_SL[:, :longest].index_select(0, rows.slots_Q[numbers]),
            prompt_lens_Q=self._index([wish.prompt_len for _, wish in punished]),
            total_lens_Q=rows.lengths_Q[numbers],
            repetition_Q=repetition_q,
            presence_Q=presence_q,
            frequency_Q=frequency_q,
            rows_Q=numbers,
        )

    def _ban_ends(
        self, logits_QV: Tensor, rows: SampledRows, ending: Sequence[tuple[int, tuple[int, ...]]], token_ids_SL: Tensor
    ) -> None:
        """Ban the last token of each (row, sequence) whose other tokens are the row's last ones. B pairs, W longest of those."""
        width = max(len(ids) for _, ids in ending) - 1
        # Right-aligned: column w is compared with the token at length - W + w; the columns before a shorter one always match.
        wanted_BW = self._index(list(chain.from_iterable((0,) * (width + 1 - len(ids)) + ids[:-1] for _, ids in ending))).view(
            -1, width
        )
        lengths_B = self._index([len(ids) - 1 for _, ids in ending])
        numbers_B, tokens_B = self._pairs([(number, ids[-1]) for number, ids in ending])
        column_W = torch.arange(width, device=self._device)
        places_BW = (rows.lengths_Q[numbers_B, None] - width + column_W).clamp_(min=0)
        found_BW = token_ids_SL[rows.slots_Q[numbers_B, None], places_BW]
        matches_B = ((found_BW == wanted_BW) | (column_W < width - lengths_B[:, None])).all(dim=1)
        # Added, not stored: two sequences may end in the same token, and one that doesn't match must not undo the other.
        logits_QV.index_put_((numbers_B, tokens_B), torch.where(matches_B, float("-inf"), 0.0), accumulate=True)

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(np.array(values, dtype=np.int64), self._device)

    def _pairs(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        first, second = self._index(list(chain.from_iterable(zip(*pairs, strict=True)))).view(2, -1)
        return first, second


def _signed(seed: int) -> int:
    """Give the int64 with the same 64 bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
