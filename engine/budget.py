"""How many tokens a step may compute: what the options say, and less for a while after the device had no memory for a step.

Why tokens and not KV blocks: the pool is allocated for good, so a request that is preempted gives the device nothing back. What
a step takes beside it (activations, logits) grows with the tokens that it computes. Fewer tokens than running requests let the
newest ones rest with their blocks, which is cheaper than computing them again.
"""

from __future__ import annotations

RECOVER_AFTER = 64
"""Steps that must go well before the budget doubles."""


class TokenBudget:
    """The budget of the next step."""

    def __init__(self, most: int) -> None:
        """Start with `most` tokens."""
        self.now = most
        self._most = most
        self._good = 0

    def shrink(self, tokens: int) -> bool:
        """Note that a step of `tokens` didn't fit; false: it can't become any smaller."""
        self._good = 0
        self.now = max(1, tokens // 2)
        return tokens > 1

    def grow(self) -> bool:
        """Note that a step was launched; true: the budget is what it was at first, after it wasn't."""
        if self.now == self._most:
            return False
        self._good += 1
        if self._good >= RECOVER_AFTER:
            self._good = 0
            self.now = min(2 * self.now, self._most)
        return self.now == self._most
