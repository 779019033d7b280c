"""Which leading blocks of a sequence are in the pool already, and which of its own are worth finding. No policy, no device."""

from __future__ import annotations

from engine.blocks import BlockPool
from engine.sequence import SequenceState


class PrefixCache:
    """Full blocks found again by their tokens; `is_enabled` false: nothing is ever found or kept."""

    def __init__(self, pool: BlockPool, block_size: int, *, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self._pool = pool
        self._block_size = block_size
        # Keys that a running sequence is about to compute.
        self._computing: set[bytes] = set()

    @property
    def is_computing(self) -> bool:
        """Whether any prefix is said to be on its way."""
        return bool(self._computing)

    def find(self, sequence: SequenceState) -> list[int] | None:
        """Return the cached blocks that the sequence starts with; None: the next one is just being computed.

        At least one token stays to be computed: its logits choose the next one. A prompt whose own tokens' log-probabilities
        are wanted finds nothing: they come from computing it.
        """
        found: list[int] = []
        if not self.is_enabled or not sequence.is_scored:
            return found
        for index in range((sequence.num_tokens - 1) // self._block_size):
            key = sequence.key(index, self._block_size)
            block = self._pool.find(key)
            if block is None:
                return None if key in self._computing else found
            found.append(block)
        return found

    def announce(self, sequence: SequenceState) -> None:
        """Note what a sequence that starts is going to compute; its first `num_registered` blocks are there already."""
        full = sequence.num_tokens // self._block_size
        if self.is_enabled and full:
            sequence.key(full - 1, self._block_size)
            self._computing.update(sequence.keys[sequence.num_registered :])

    def register(self, sequence: SequenceState) -> None:
        """Make the full blocks findable whose tokens are known and computed by a launched step."""
        if not self.is_enabled:
            return
        first = sequence.num_registered
        full = min(len(sequence.tokens), sequence.num_computed) // self._block_size
        for index in range(first, full):
            self._pool.register(sequence.blocks[index], sequence.key(index, self._block_size))
        if full > first:
            sequence.num_registered = full
            self._computing.difference_update(sequence.keys[first:full])

    def retire(self, sequence: SequenceState) -> None:
        """Register what a sequence computed before it gives its blocks back, and call off the rest."""
        self.register(sequence)
        self._computing.difference_update(sequence.keys[sequence.num_registered :])
