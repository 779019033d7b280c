"""The choices of one prompt: the first one computes it, the others fork from its KV blocks. Numbers only, no device.

A family exists while members wait. Its life:

    no leader ──a member is admitted──▶ led ──the prompt is computed──▶ trunk ──nobody waits any more──▶ released
        ▲                                │                                │
        └──── leader preempted or gone ──┘◀──── the pool needs room ──────┘

The trunk is the family's own reference to the prompt's blocks, so that members can fork after the leader has ended. A member
that forks shares the full blocks and gets its own copy of the one that holds the prompt's last token; that token it computes
again, because its logits choose the first token of the answer. Members that find neither a leader nor a trunk take the way of
any other request: one of them leads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.blocks import BlockPool
from engine.sequence import SequenceState


class Fork(NamedTuple):
    """What a member starts with."""

    sequence: SequenceState
    shared: list[int]
    """The prompt's full blocks, but not the one with its last token."""
    source: int | None
    """The block with the prompt's last token, to be copied; None where nothing else of the prompt stands in it."""


class _Family:
    __slots__ = ("leader", "trunk", "waiting")

    def __init__(self) -> None:
        # By arrival, in order.
        self.waiting: dict[int, SequenceState] = {}
        self.leader: SequenceState | None = None
        self.trunk: list[int] = []


class Families:
    """All families with waiting members, over one pool."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._families: dict[str, _Family] = {}
        # Nobody waits for these any more. They are released by the next settle(), not at once: the plan in the making copies
        # from them, and a block that it gave away again would be source and destination of one step.
        self._withered: list[list[int]] = []

    def join(self, sequence: SequenceState) -> None:
        """Note a new request; one without a family is none of our business."""
        name = sequence.request.family
        if name is not None:
            self._families.setdefault(name, _Family()).waiting[sequence.arrival] = sequence

    def settle(self) -> None:
        """Take the trunks of the prompts that launched steps have computed. Call it before anything of them is released."""
        for blocks in self._withered:
            self._pool.release(blocks)
        self._withered.clear()
        for family in self._families.values():
            leader = family.leader
            if leader is not None and leader.slot is not None and leader.num_computed >= leader.num_prompt:
                family.trunk = leader.blocks[: -(-leader.num_prompt // self._block_size)]
                self._pool.share(family.trunk)
                family.leader = None

    def must_wait(self, sequence: SequenceState) -> bool:
        """Whether the prompt is there, or on its way, in a form that is better than computing it again."""
        family = self._families.get(sequence.request.family or "")
        if family is None or sequence.arrival not in family.waiting:
            return False
        return bool(family.trunk) or (family.leader is not None and family.leader.slot is not None)

    def lead(self, sequence: SequenceState) -> None:
        """Note that a member was admitted and computes the prompt."""
        family = self._families.get(sequence.request.family or "")
        if family is not None and sequence.arrival in family.waiting:
            family.leader = sequence
            self.leave(sequence)

    def leave(self, sequence: SequenceState) -> None:
        """Note that a member doesn't wait any more: it runs, or it has ended."""
        name = sequence.request.family or ""
        family = self._families.get(name)
        if family is not None and family.waiting.pop(sequence.arrival, None) is not None and not family.waiting:
            del self._families[name]
            self._withered.append(family.trunk)

    @property
    def has_forks(self) -> bool:
        """Whether anybody could fork."""
        return any(family.trunk for family in self._families.values())

    def forks(self) -> Iterator[Fork]:
        """Give what the waiting members could start with, in order of arrival. Call `leave` for those that do."""
        for family in list(self._families.values()):
            if not family.trunk:
                continue
            for sequence in list(family.waiting.values()):
                full, rest = divmod(sequence.num_prompt - 1, self._block_size)
                yield Fork(sequence, family.trunk[:full], family.trunk[full] if rest else None)

    def drop_trunks(self) -> bool:
        """Give all trunks up for room, before a plan copies from any; tell whether there was one."""
        found = False
        for family in self._families.values():
            if family.trunk:
                self._pool.release(family.trunk)
                family.trunk = []
                found = True
        return found

    def tables(self) -> Iterator[Sequence[int]]:
        """Give the block tables that families hold themselves, for the pool's check."""
        yield from self._withered
        yield from (family.trunk for family in self._families.values())
