"""From a step's logits to its tokens: what each slot's request asks for, brought to the kernels in the documented order.

Order on the float32 logits of a row: the mask of its response format, bias, repetition, frequency and presence penalties, bans (bad words, end tokens that may
not come yet), temperature, top-k, top-p, min-p, draw. Bans may come last of the edits because nothing moves minus infinity.
Only the rows that ask for an edit pay for it. Raw log-probabilities are taken before any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admission
from engine.request import TokenRequest
from engine.state_table import SampledRows, upload
from engine.token_masks import TokenMasks
from kernels.sampling import (
    PenaltyInputs,
    SamplingInputs,
    add_bias,
    allow_only,
    apply_penalties,
    ban,
    has_nan,
    sample,
    token_logprobs,
)

_LEAST_TEMPERATURE = 1e-30
"""A smaller one makes float32 infinities of many logits, which are then equally likely; this one draws the best token already."""


class Sampled(NamedTuple):
    """A step's tokens on the device, one for each row that samples."""

    tokens_Q: Tensor
    """int64; 0 where the row is not valid."""
    valid_Q: Tensor
    """bool; false where the logits held a NaN or nothing was left to choose."""
    logprob_rows: tuple[int, ...]
    """Which rows asked for log-probabilities; the tensors below have an entry for each."""
    logprob_widths: tuple[int, ...]
    """How many of the top tokens each of them asked for."""
    logprobs_q: Tensor
    top_logprobs_qk: Tensor
    top_ids_qk: Tensor


class _Wishes(NamedTuple):
    """What one slot's request asks of the sampler, worked out once when it is admitted."""

    random: bool
    top_k: bool
    top_p: bool
    min_p: bool
    bias: tuple[tuple[int, float], ...]
    banned: tuple[int, ...]
    """Tokens that never come."""
    late: tuple[int, ...]
    """Tokens that don't come before `min_new_tokens`."""
    min_new_tokens: int
    sequences: tuple[tuple[int, ...], ...]
    """Sequences of two or more tokens that never come to their end."""
    penalties: tuple[float, float, float] | None
    """Repetition, presence, frequency; None: all off."""
    prompt_len: int
    logprobs: int | None
    guided: bool
    """Whether it follows a grammar: the step's sampling waits for its mask."""

    @property
    def is_plain(self) -> bool:
        """Whether the logits are used as they are and nothing is reported of them."""
        return not (self.bias or self.banned or self.late or self.sequences or self.penalties) and self.logprobs is None


def _wishes(request: TokenRequest, vocab_size: int) -> _Wishes:
    config = request.config
    guided = config.response_format is not None
    ends = (*request.eos_ids, *request.stop_ids)
    banned = [ids[0] for ids in request.bad_sequences if len(ids) == 1]
    banned += ends if config.ignore_eos else ()
    penalties = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty)
    return _Wishes(
        random=not config.is_greedy,
        top_k=config.top_k > 0,
        top_p=config.top_p < 1,
        min_p=config.min_p > 0,
        # An id beyond the vocabulary can't come anyway, and would be a write out of bounds.
        bias=tuple((token, value) for token, value in dict(config.logit_bias).items() if token < vocab_size),
        banned=tuple(sorted({token for token in banned if token < vocab_size})),
        # Masks hold ends back themselves, because only the host knows when a grammar leaves nothing else.
        late=tuple(sorted({token for token in ends if token < vocab_size})) if config.min_new_tokens and not guided else (),
        min_new_tokens=config.min_new_tokens,
        sequences=tuple(ids for ids in request.bad_sequences if len(ids) > 1 and max(ids) < vocab_size),
        penalties=None if penalties == (1.0, 0.0, 0.0) else penalties,
        prompt_len=len(request.prompt_ids),
        logprobs=config.logprobs,
        guided=guided,
    )


class Sampler:
    """Sampling parameters of all slots, on the device as columns and on the host as wishes."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Allocate the columns."""
        self._device = device
        self._vocab_size = vocab_size
        # Rows: temperature, top-p, min-p.
        self._reals_3S = torch.ones((3, num_slots), dtype=torch.float32, device=device)
        # Rows: seed, top-k, choice, greedy.
        self._wholes_4S = torch.zeros((4, num_slots), dtype=torch.int64, device=device)
        self._wishes: dict[int, _Wishes] = {}

    def admit(self, admitted: Sequence[Admission]) -> None:
        """Fill the columns of newly taken slots."""
        if not admitted:
            return
        slots = upload(np.array([one.slot for one in admitted], dtype=np.int64), self._device)
        reals, wholes = [], []
        for one in admitted:
            config = one.request.config
            self._wishes[one.slot] = _wishes(one.request, self._vocab_size)
            # Greedy rows divide by 1: a temperature of 0 would make NaNs that nobody reads but everybody finds.
            temperature = 1.0 if config.is_greedy else max(config.temperature, _LEAST_TEMPERATURE)
            reals.append((temperature, config.top_p, config.min_p))
            wholes.append(
                (_signed(one.request.seed), min(config.top_k, self._vocab_size), one.request.choice, int(config.is_greedy))
            )
        self._wholes_4S.index_copy_(1, slots, upload(np.array(wholes, dtype=np.int64).T.copy(), self._device))
        bits = np.array(reals, dtype=np.float32).T.astype(np.float64).copy().view(np.int64)
        self._reals_3S.index_copy_(1, slots, upload(bits, self._device).view(torch.float64).float())

    def waits_for_masks(self, rows: SampledRows) -> bool:
        """Whether a row follows a grammar, so that the step can't be sampled before the host has read the step before."""
        return any(self._wishes[row.slot].guided for row in rows.host)

    def sample(self, logits_QV: Tensor, rows: SampledRows, token_ids_SL: Tensor, masks: TokenMasks | None = None) -> Sampled:
        """Choose a token for each row. `logits_QV` float32 may be changed; `token_ids_SL` is the state table's history."""
        wishes = [self._wishes[row.slot] for row in rows.host]
        asking = tuple((number, wish) for number, wish in enumerate(wishes) if not wish.is_plain)
        reporting = tuple(number for number, wish in asking if wish.logprobs is not None)
        raw_qV = logits_QV[self._index(reporting)] if reporting else logits_QV[:0]
        if masks is not None and masks.entries:
            words = upload(masks.words_qW.view(np.int64), self._device).view(torch.int32)
            allow_only(logits_QV, self._index(masks.entries), words)
        if asking:
            self._edit(logits_QV, rows, asking, token_ids_SL)
        valid_Q = ~has_nan(logits_QV)
        any_random = any(wish.random for wish in wishes)
        tokens_Q = sample(
            logits_QV,
            self._inputs(rows),
            any_random=any_random,
            any_top_k=any(wish.top_k and wish.random for wish in wishes),
            any_top_p=any(wish.top_p and wish.random for wish in wishes),
            any_min_p=any(wish.min_p and wish.random for wish in wishes),
        )
        tokens_Q = torch.where(valid_Q, tokens_Q, 0)
        widths = tuple(wishes[number].logprobs or 0 for number in reporting)
        chosen_q = tokens_Q[self._index(reporting)] if reporting else tokens_Q[:0]
        report = token_logprobs(raw_qV, chosen_q, min(max(widths, default=0), self._vocab_size))
        return Sampled(tokens_Q, valid_Q, reporting, widths, report.logprob_R, report.top_logprobs_Rk, report.top_ids_Rk)

    def _inputs(self, rows: SampledRows) -> SamplingInputs:
        temperature_Q, top_p_Q, min_p_Q = self._reals_3S.index_select(1, rows.slots_Q)
        seed_Q, top_k_Q, choice_Q, greedy_Q = self._wholes_4S.index_select(1, rows.slots_Q)
        return SamplingInputs(
            temperature_R=temperature_Q,
            top_k_R=top_k_Q.to(torch.int32),
            top_p_R=top_p_Q,
            min_p_R=min_p_Q,
            seed_R=seed_Q,
            position_R=rows.output_indices_Q,
            choice_R=choice_Q.to(torch.int32),
            greedy_R=greedy_Q.to(torch.bool),
        )

    def _edit(self, logits_QV: Tensor, rows: SampledRows, asking: Sequence[tuple[int, _Wishes]], token_ids_SL: Tensor) -> None:
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
            if rows.host[number].output_index < wish.min_new_tokens
            for token in wish.late
        ]
        if banned:
            ban(logits_QV, *self._pairs(banned))
        ending = [
            (number, ids) for number, wish in asking for ids in wish.sequences if len(ids) <= rows.host[number].length + 1
        ]
        if ending:
            self._ban_ends(logits_QV, rows, ending, token_ids_SL)

    def _penalties(self, rows: SampledRows, punished: Sequence[tuple[int, _Wishes]], token_ids_SL: Tensor) -> PenaltyInputs:
        numbers = self._index([number for number, _ in punished])
        longest = max(rows.host[number].length for number, _ in punished)
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
