"""The one thing that the ranks share: what one step computes. Frozen, written by the scheduler of rank 0.

A runner keeps a state table with one row ("slot") for each running request: its token ids, its block table and its
sampling parameters. A plan says which slots are filled anew and which token positions are computed; sampled tokens stay in
the table, on the device, so that step N+1 can be planned and launched before the host has read step N's tokens.

No "prefill" or "decode" is written anywhere: a row computes `count` tokens from position `start`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple, Protocol

from engine.request import TokenRequest
from engine.token_masks import TokenMasks
from headrace.completion import TokenLogprobs

_HEAD = struct.Struct("<QIII")
_ROW = 7  # numbers of a row in a frame


class Admission(NamedTuple):
    """A request that takes (or, after preemption, takes again) a slot of the state table in this step."""

    slot: int
    request: TokenRequest
    token_ids: tuple[int, ...]
    """Everything known so far: the prompt and the tokens generated before a preemption."""
    blocks: tuple[int, ...]
    """Block table to start with: cached prefix blocks first. `PlanRow.new_blocks` are appended to it."""


class PlanRow(NamedTuple):
    """One slot's share of a step: compute positions start .. start+count-1."""

    slot: int
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody calls on a row
    samples: bool
    """Whether the last computed position's logits choose the next token, which is stored at position start+count."""
    output_index: int
    """How many tokens the request had generated before this one (the position that keys its random numbers)."""
    new_blocks: tuple[int, ...]
    """KV blocks appended to the slot's table before this step: the first one holds the first position from `start` on that
    begins a block."""
    scores: int = 0
    """Of so many of its first positions the log-probability of the token that follows is wanted (a prompt's own tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One engine step. `rows` has the rows with count == 1 first; no slot twice; sum(count) <= the token budget."""

    step: int
    admitted: tuple[Admission, ...]
    rows: tuple[PlanRow, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) KV blocks, copied before any row is computed. No block is a source and a destination, and none
    is a destination twice."""

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(row.count for row in self.rows)

    def to_bytes(self) -> bytes:
        """Return what rank 0 sends to the other ranks: numbers as little-endian int32, requests as JSON."""
        admitted = [(one.slot, _request_dict(one.request), one.token_ids, one.blocks) for one in self.admitted]
        requests = json.dumps(admitted, separators=(",", ":")).encode() if admitted else b""
        rows = array("i", chain.from_iterable((*row[:5], len(row.new_blocks), row.scores) for row in self.rows))
        blocks = array("i", chain.from_iterable(row.new_blocks for row in self.rows))
        copies = array("i", chain.from_iterable(self.copies))
        head = _HEAD.pack(self.step, len(self.rows), len(blocks), len(self.copies))
        return b"".join((head, rows.tobytes(), blocks.tobytes(), copies.tobytes(), requests))

    @classmethod
    def from_bytes(cls, data: bytes) -> StepPlan:
        """Rebuild from `to_bytes`."""
        step, num_rows, num_blocks, num_copies = _HEAD.unpack_from(data)
        ends = list(accumulate((_HEAD.size, 4 * _ROW * num_rows, 4 * num_blocks, 8 * num_copies)))
        cells, blocks, copies = (array("i", data[start:end]).tolist() for start, end in pairwise(ends))
        taken = iter(blocks)
        rows = tuple(
            PlanRow(slot, start, count, bool(samples), index, tuple(islice(taken, num_new)), scores)
            for slot, start, count, samples, index, num_new, scores in zip(*[iter(cells)] * _ROW, strict=True)
        )
        requests = json.loads(data[ends[-1] :] or b"[]")
        admitted = (
            Admission(slot, TokenRequest.from_dict(request), tuple(token_ids), tuple(table))
            for slot, request, token_ids, table in requests
        )
        return cls(step=step, admitted=tuple(admitted), rows=rows, copies=tuple(zip(copies[::2], copies[1::2], strict=True)))


def _request_dict(request: TokenRequest) -> dict[str, Any]:
    """Fields of a request, shallow: `asdict` would copy a prompt of thousands of ids one by one."""
    fields = {spec.name: getattr(request, spec.name) for spec in dataclasses.fields(request)}
    return {**fields, "config": request.config.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What the host reads of a step, one step late. Entry i belongs to the i-th row of the plan that samples."""

    step: int
    tokens: tuple[int, ...]
    invalid: frozenset[int] = frozenset()
    """Entries whose logits held a NaN: their token means nothing."""
    complete: frozenset[int] = frozenset()
    """Entries whose answer follows an automaton and is complete by this token: nothing can follow."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Empty when no row of the step asked for them."""
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    """Entry i belongs to the i-th row of the plan that scores: of the tokens at positions start+1 .. start+scores."""


class RunningStep(Protocol):
    """A launched step; the device may still be at work on it."""

    def result(self) -> StepOutput:
        """Wait for the step and give its tokens."""
        ...


class Executor(Protocol):
    """Runs plans on every rank. The engine knows no more of devices than this."""

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool (every rank holds the same number)."""
        ...

    @property
    def worthwhile_tokens(self) -> int:
        """How many tokens of prompts a step must bring for the device to be at work as long as the host launches it.

        A step without prompts is one launch. 1: none is worth waiting for.
        """
        ...

    def launch(self, plan: StepPlan) -> RunningStep:
        """Start a step on every rank and return at once (on a CPU: when it is done). Plans run in the order launched.

        A step in which a row samples whose request has a response format stops before it samples, until `choose`.
        `OutOfDeviceMemory` means that the step didn't run, whatever it wrote on its way: the same positions may be planned again.
        """
        ...

    def choose(self, masks: TokenMasks) -> None:
        """Sample the step launched last. Called before the next launch, and only for a step that waits for it.

        `OutOfDeviceMemory` as in `launch`: the whole step didn't run.
        """
        ...

    def close(self) -> None:
        """Free the device memory and stop the other ranks. May be called twice."""
        ...
