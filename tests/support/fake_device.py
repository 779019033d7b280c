"""An executor without a model that behaves as a device does, and is far stricter.

It keeps a state table and the content of every KV position. What it stores at a position is a hash of all tokens up to it,
so a row that attends to a block which was given away, never filled, or filled for another prefix is found at once. The next
token is a hash of the whole visible sequence: any wrong content or order changes the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from engine.plan import StepOutput, StepPlan
from engine.request import TokenRequest
from headrace.completion import TokenLogprobs
from headrace.config import GenerationConfig
from headrace.errors import OutOfDeviceMemory

EOS = 2
STOP = 7
NAN_TOKEN = 999_999
"""A prompt with this token gives NaN logits from its first sampled token on."""


@dataclass(frozen=True, kw_only=True)
class FakeOptions:
    """Plain scheduling options."""

    block_size: int = 16
    max_batch_size: int = 8
    max_prefill_token_num: int = 64
    prefill_interval: int = 16
    enable_prefix_caching: bool = True
    session_len: int = 256


def request(
    name: str,
    prompt,
    *,
    max_new_tokens: int = 8,
    stream: bool = False,
    stop_ids=(),
    eos_ids=(EOS,),
    family: str | None = None,
    choice: int = 0,
    **config,
) -> TokenRequest:
    # Less than `min_new_tokens` may be left by the session, never asked for.
    wanted = max(max_new_tokens, config.get("min_new_tokens", 0))
    return TokenRequest(
        request_id=name,
        prompt_ids=tuple(prompt),
        config=GenerationConfig(max_new_tokens=wanted, **config),
        seed=0,
        choice=choice,
        max_new_tokens=max_new_tokens,
        limit="max_new_tokens",
        eos_ids=tuple(eos_ids),
        stop_ids=tuple(stop_ids),
        stream=stream,
        family=family,
    )


def extend(state: int, token: int) -> int:
    """Hash of a sequence, from the hash of the sequence without its last token."""
    return int.from_bytes(hashlib.blake2b(f"{state}/{token}".encode(), digest_size=8).digest(), "big")


def next_token(state: int, vocab: int, choice: int = 0) -> int:
    return (state + 7 * choice) % vocab


def score(state: int) -> float:
    return -(state % 1000) / 100


def score_alone(prompt_ids) -> list[tuple[int, float]]:
    """What the fake model says of a prompt's tokens but the first."""
    state, out = 0, []
    for token, following in pairwise(prompt_ids):
        state = extend(state, token)
        out.append((following, score(state)))
    return out


def continue_alone(
    req: TokenRequest, vocab: int, most: int | None = None, *, cut: str = "session_len"
) -> tuple[tuple[int, ...], str, str | None]:
    """What the fake model answers to one request: tokens, finish reason, stop detail. The specification, in one loop."""
    state = 0
    for token in req.prompt_ids:
        state = extend(state, token)
    out: list[int] = []
    limit = req.max_new_tokens if most is None else min(most, req.max_new_tokens)
    while len(out) < limit:
        token = next_token(state, vocab, req.choice)
        if not req.config.ignore_eos and len(out) >= req.config.min_new_tokens:
            if token in req.stop_ids:
                return tuple(out), "stop", f"stop_token:{token}"
            if token in req.eos_ids:
                return tuple(out), "stop", "eos"
        out.append(token)
        state = extend(state, token)
    return tuple(out), "length", req.limit if limit == req.max_new_tokens else cut


@dataclass
class _Slot:
    request: TokenRequest
    tokens: list[int]
    blocks: list[int]
    states: list[int] = field(default_factory=list)
    """Hash of the tokens up to each position."""

    def state_at(self, position: int) -> int:
        while len(self.states) <= position:
            before = self.states[-1] if self.states else 0
            self.states.append(extend(before, self.tokens[len(self.states)]))
        return self.states[position]


class _Done:
    def __init__(self, device: FakeDevice, output: StepOutput) -> None:
        self._device, self._output = device, output

    def result(self) -> StepOutput:
        self._device.read += 1
        return self._output


class FakeDevice:
    """Implements `engine.plan.Executor` and checks each plan as it is launched."""

    def __init__(
        self, num_blocks: int, options: FakeOptions, *, vocab: int = 40, memory: Callable[[StepPlan], bool] | None = None
    ) -> None:
        """`memory`: whether a plan fits; one that doesn't stops in the middle and leaves garbage wherever it was to write."""
        self._num_blocks, self._options, self._vocab = num_blocks, options, vocab
        self._memory = memory
        self.worthwhile_tokens = 1
        self.plans: list[StepPlan] = []
        self.read = 0
        self.kv: dict[tuple[int, int], int] = {}
        self.slots: dict[int, _Slot] = {}
        self.most_in_flight = 0

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def close(self) -> None:
        pass

    def launch(self, plan: StepPlan) -> _Done:
        self._check_shape(plan)
        if self._memory is not None and not self._memory(plan):
            self._break_off(plan)
            raise OutOfDeviceMemory
        self.plans.append(plan)
        self.most_in_flight = max(self.most_in_flight, len(self.plans) - self.read)
        for one in plan.admitted:
            assert len(one.token_ids) <= self._options.session_len
            self.slots[one.slot] = _Slot(one.request, list(one.token_ids), list(one.blocks))
        self._copy(plan)
        # All rows read before any row writes: no row may rely on another row of its own step.
        for row in plan.rows:
            self._read(row)
        written: set[tuple[int, int]] = set()
        for row in plan.rows:
            slot = self.slots[row.slot]
            for position in range(row.start, row.start + row.count):
                place = self._place(slot, position)
                assert place not in written, "two rows of a step write the same KV position"
                written.add(place)
                self.kv[place] = slot.state_at(position)
        return _Done(self, self._sample(plan))

    def _break_off(self, plan: StepPlan) -> None:
        """Admit, append and write as the step would, but nothing right."""
        for one in plan.admitted:
            self.slots[one.slot] = _Slot(one.request, list(one.token_ids), list(one.blocks))
        self._copy(plan)
        for row in plan.rows:
            slot = self.slots[row.slot]
            self._append(slot, row)
            for position in range(row.start, row.start + row.count):
                self.kv[self._place(slot, position)] = -1

    def _append(self, slot: _Slot, row) -> None:
        if row.new_blocks:
            slot.blocks[-(-row.start // self._options.block_size) :] = row.new_blocks

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.step == len(self.plans) + 1
        assert plan.rows, "an empty plan"
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "a slot has two rows"
        assert all(0 <= slot < self._options.max_batch_size for slot in slots)
        counts = [row.count for row in plan.rows]
        assert sum(counts) <= self._options.max_prefill_token_num, "the token budget is exceeded"
        assert min(counts) >= 1
        assert sorted(counts, key=lambda count: count != 1) == counts, "rows of one token don't stand first"
        admitted = [one.slot for one in plan.admitted]
        assert len(set(admitted)) == len(admitted)
        assert set(admitted) <= set(slots), "admitted without a row"

    def _copy(self, plan: StepPlan) -> None:
        sources, destinations = [one for one, _ in plan.copies], [other for _, other in plan.copies]
        assert len(set(destinations)) == len(destinations), "a block is copied to twice"
        assert not set(sources) & set(destinations), "a block is copied to and from"
        for source, destination in plan.copies:
            for offset in range(self._options.block_size):
                self.kv.pop((destination, offset), None)
                if (source, offset) in self.kv:
                    self.kv[destination, offset] = self.kv[source, offset]

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        return slot.blocks[position // self._options.block_size], position % self._options.block_size

    def _read(self, row) -> None:
        slot = self.slots[row.slot]
        self._append(slot, row)
        assert len(set(slot.blocks)) == len(slot.blocks), "a block is twice in a table"
        assert all(0 <= block < self._num_blocks for block in slot.blocks)
        end = row.start + row.count
        assert end <= len(slot.tokens), "a token is computed before it is chosen"
        assert end <= len(slot.blocks) * self._options.block_size, "no block for a position"
        assert row.samples == (end == len(slot.tokens)), "a row samples where it shouldn't, or doesn't where it should"
        assert row.output_index == len(slot.tokens) - len(slot.request.prompt_ids)
        for position in range(row.start):
            assert self.kv.get(self._place(slot, position)) == slot.state_at(position), "a row reads KV that isn't its own"

    def _score(self, row) -> tuple[TokenLogprobs, ...]:
        slot = self.slots[row.slot]
        assert slot.request.config.prompt_logprobs is not None
        assert row.scores <= row.count
        assert row.start + row.scores < len(slot.request.prompt_ids)
        for position in range(row.start):
            assert self.kv.get(self._place(slot, position)) == slot.state_at(position), "scores from KV that isn't its own"
        return tuple(
            TokenLogprobs(token_id=slot.tokens[position + 1], logprob=score(slot.state_at(position)))
            for position in range(row.start, row.start + row.scores)
        )

    def _sample(self, plan: StepPlan) -> StepOutput:
        tokens: list[int] = []
        invalid: set[int] = set()
        logprobs: list[TokenLogprobs | None] = []
        for row in plan.rows:
            if not row.samples:
                continue
            slot = self.slots[row.slot]
            if NAN_TOKEN in slot.request.prompt_ids:
                invalid.add(len(tokens))
            token = next_token(slot.state_at(row.start + row.count - 1), self._vocab, slot.request.choice)
            slot.tokens.append(token)
            assert len(slot.tokens) <= self._options.session_len, "the state table overflows"
            tokens.append(token)
            wants = slot.request.config.logprobs is not None
            logprobs.append(TokenLogprobs(token_id=token, logprob=-float(row.output_index)) if wants else None)
        return StepOutput(
            step=plan.step,
            tokens=tuple(tokens),
            invalid=frozenset(invalid),
            logprobs=tuple(logprobs) if any(one is not None for one in logprobs) else (),
            prompt_logprobs=tuple(self._score(row) for row in plan.rows if row.scores),
        )
