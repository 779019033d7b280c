"""The automata that running requests follow, on one rank's device: states of all of them in one table, and where each slot stands.

A response format that is regular (`engine.regular`) is uploaded once, when the first request with it is admitted, and stays while any
slot follows it; one that nobody follows any more is kept until its room is wanted. A row is masked and moved on by two launches a
step, and the host reads nothing for it. On a CPU a state's mask is worked out when a row first comes to it; on a GPU all are at once.

Knows the format and the tokens of a request, nothing of logits beyond their mask, and no scheduling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.plan import Admission
from engine.regular import Automaton, automaton_of
from engine.regular.automaton import DEAD as NOWHERE
from engine.request import TokenRequest
from engine.state_table import SampledRows, upload
from engine.token_bytes import TokenBytes, token_bytes
from headrace.response_format import ResponseFormat
from kernels.automata import DEAD, FREE, Places, States, Vocabulary, advance, allow_by_state, fill_masks

MOST_ENDS = 8
"""Ends that a slot has room for."""
_RESERVED = 2
"""States that belong to no automaton: `FREE` and `DEAD`."""
_IDLE_BYTES = 256 << 20
"""The table is not made larger than this while formats that nobody follows could make room in it."""


def follows_on_device(request: TokenRequest) -> bool:
    """Whether a request's format is followed by an automaton on the device: a matter of the request alone, on every device."""
    wanted = request.config.response_format
    if wanted is None or len(_ends(request)) > MOST_ENDS:
        return False
    return automaton_of(wanted) is not None


def _ends(request: TokenRequest) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*request.eos_ids, *request.stop_ids)))


class _Span(NamedTuple):
    """States of one format in the table."""

    first: int
    automaton: Automaton

    @property
    def after(self) -> int:
        return self.first + self.automaton.size

    def place(self, state: int) -> int:
        """Where a state of the automaton stands in the table."""
        return DEAD if state == NOWHERE else self.first + state


class TokenAutomata:
    """Follows the regular formats of one rank's slots. Used by the runner's thread only."""

    def __init__(self, *, model_path: str, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Allocate nothing yet: the first request with such a format does."""
        self._model_path = model_path
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._width = -(-vocab_size // 32)
        self._device = device
        # Filled by the first request.
        self._tokens: TokenBytes | None = None
        self._vocabulary: Vocabulary | None = None
        self._states: States | None = None
        self._places: Places | None = None
        # Least recently admitted first.
        self._spans: OrderedDict[ResponseFormat, _Span] = OrderedDict()
        self._followed: dict[int, ResponseFormat] = {}
        """What each slot that was ever taken by such a request follows, until the slot is taken by another."""
        self._has_mask = np.zeros(0, dtype=np.bool_)
        """On a CPU: the states whose mask is worked out."""

    @property
    def bytes_held(self) -> int:
        """Device memory of table and places."""
        held = (*(self._states or ()), *(self._places or ()), *(self._vocabulary or ()))
        return sum(tensor.nbytes for tensor in held)

    def admit(self, admitted: Sequence[Admission], slots_A: Tensor) -> None:
        """Put newly taken slots where their requests stand: at the start, or behind what was generated before a preemption.

        `slots_A`: their slots on the device, int64.
        """
        guided = [one for one in admitted if follows_on_device(one.request)]
        for one in admitted:
            self._followed.pop(one.slot, None)
        if not guided and self._places is None:
            return
        if self._places is None:
            self._open()
        # All are noted before any is placed: what makes room for one must not be another's.
        self._followed |= {one.slot: _format(one) for one in guided}
        starts = {one.slot: self._start(one) for one in guided}
        assert self._places is not None, "places for slots that are taken"
        rows = np.zeros((len(admitted), self._places.table_SX.shape[1]), dtype=np.int32)
        for number, one in enumerate(admitted):
            rows[number, :2] = starts.get(one.slot, FREE)
            if one.slot in starts:
                ends = [token for token in _ends(one.request) if token < self._vocab_size]
                num_first = sum(token in one.request.eos_ids for token in ends)
                rows[number, 2:5] = (len(ends), num_first, one.request.config.min_new_tokens)
                rows[number, 5 : 5 + len(ends)] = ends
        self._places.table_SX.index_copy_(0, slots_A, upload(rows, self._device))

    def allow(self, logits_QV: Tensor, rows: SampledRows) -> None:
        """Ban, in place, what the rows that follow an automaton may not choose."""
        assert self._states is not None and self._places is not None, "nobody follows anything"  # noqa: PT018  # for the type checker
        if self._device.type == "cpu":
            self._fill_reached(self._states, self._places, rows)
        allow_by_state(logits_QV, rows.slots_Q, rows.output_indices_Q, self._places, self._states)

    def advance(self, stored_2Q: Tensor, rows: SampledRows) -> None:
        """Move the rows on by what they chose; mark in `stored_2Q`, as `StateTable.store` gave it, whose answers are complete by it."""
        assert self._states is not None and self._places is not None and self._vocabulary is not None, "nobody follows anything"  # noqa: PT018
        advance(stored_2Q, rows.slots_Q, rows.output_indices_Q, self._places, self._states, self._vocabulary)

    def _open(self) -> None:
        """Allocate what the first request needs."""
        tokens = self._tokens = token_bytes(self._model_path).resized(self._vocab_size)
        spelled_B = np.frombuffer(tokens.data or b"\0", dtype=np.uint8).astype(np.int32)
        self._vocabulary = Vocabulary(upload(tokens.starts_V1, self._device), upload(spelled_B, self._device))
        self._places = Places.allocate(self._num_slots, MOST_ENDS, self._device)

    def _start(self, one: Admission) -> int:
        """Return the state that a request's known tokens lead to."""
        assert self._tokens is not None, "asked before it is open"
        wanted = _format(one)
        span = self._spans.get(wanted) or self._load(wanted)
        self._spans.move_to_end(wanted)
        return span.place(span.automaton.walk(self._tokens.join(one.token_ids[len(one.request.prompt_ids) :])))

    def _load(self, wanted: ResponseFormat) -> _Span:
        """Bring an automaton into the table."""
        automaton = automaton_of(wanted)
        assert automaton is not None, "a format that no automaton follows"
        states, first = self._make_room(automaton.size)
        span = _Span(first, automaton)
        next_n256 = np.where(automaton.next_n256 == NOWHERE, DEAD, automaton.next_n256.astype(np.int32) + first)
        goes_on_n = (automaton.next_n256 != NOWHERE).any(axis=1)
        states.next_N256[first : span.after] = upload(next_n256.astype(np.int32, copy=False), self._device)
        facts_2n = upload(np.stack([automaton.final_n, goes_on_n]).astype(np.int32), self._device)
        states.final_N[first : span.after], states.goes_on_N[first : span.after] = facts_2n
        if self._device.type == "cpu":
            self._has_mask[first : span.after] = False
        else:
            assert self._vocabulary is not None, "loaded before it is open"
            fill_masks(states, self._vocabulary, torch.arange(first, span.after, device=self._device))
        # Last: where the device had no memory for it, it isn't there.
        self._spans[wanted] = span
        return span

    def _make_room(self, size: int) -> tuple[States, int]:
        """Find a gap for `size` states: as the table is, else where nobody is any more, else in a larger one."""
        while True:
            capacity = 0 if self._states is None else len(self._states.final_N)
            first = _RESERVED
            for span in sorted(self._spans.values(), key=lambda one: one.first):
                if span.first - first >= size:
                    break
                first = span.after
            if self._states is not None and first + size <= capacity:
                return self._states, first
            needed = max(first + size, capacity + capacity // 2)
            followed = set(self._followed.values())
            idle = next((wanted for wanted in self._spans if wanted not in followed), None)
            if idle is None or needed * self._state_bytes <= _IDLE_BYTES:
                self._grow(needed)
            else:
                del self._spans[idle]

    @property
    def _state_bytes(self) -> int:
        return 4 * (256 + 3 + self._width)

    def _grow(self, capacity: int) -> None:
        """Move the table to a larger one. Launched steps go on reading the old one: its memory is free for what is launched later."""
        shapes = ((capacity, 256), (capacity,), (capacity,), (capacity, self._width), (capacity,))
        grown = States(*(torch.zeros(shape, dtype=torch.int32, device=self._device) for shape in shapes))
        grown.next_N256[DEAD] = DEAD
        if self._states is not None:
            for old, new in zip(self._states, grown, strict=True):
                new[: len(old)] = old
        self._states = grown
        more = capacity - len(self._has_mask)
        self._has_mask = np.concatenate([self._has_mask, np.zeros(more, dtype=np.bool_)])
        self._has_mask[:_RESERVED] = True

    def _fill_reached(self, states: States, places: Places, rows: SampledRows) -> None:
        """Work out the masks that are missing of the states that a step's rows are in."""
        assert self._vocabulary is not None, "states without tokens"
        reached = np.unique(places.states_S2[rows.slots_Q, rows.output_indices_Q % 2].numpy())
        missing = reached[~self._has_mask[reached]]
        if len(missing):
            fill_masks(states, self._vocabulary, torch.from_numpy(missing.astype(np.int64)))
            self._has_mask[missing] = True


def _format(one: Admission) -> ResponseFormat:
    wanted = one.request.config.response_format
    assert wanted is not None, "a request without a format follows nothing"
    return wanted
