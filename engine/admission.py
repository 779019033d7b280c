"""When waiting prompts join the requests that run. Numbers only: no requests, no blocks."""

from __future__ import annotations

_REMEMBERED = 32
"""Admissions over which the share of prompts that is computed is averaged, about."""


class Admissions:
    """Decides step by step whether prompts are let in, and keeps what that depends on.

    A step with prompts is longer, and on a GPU it is launched kernel by kernel instead of as one graph. While many run, prompts are
    therefore let in in bunches, but `prefill_interval` steps after the last ones at the latest.
    """

    def __init__(self, *, max_batch_size: int, prefill_interval: int, worthwhile_tokens: int) -> None:
        """`worthwhile_tokens`: see `engine.plan.Executor`."""
        self._max_batch_size = max_batch_size
        self._prefill_interval = prefill_interval
        self._worthwhile_tokens = worthwhile_tokens
        self._steps = 0
        # Of a prompt's tokens, on the average: the others were found in the cache or are a sibling's.
        self._computed_share = 1.0

    def count_step(self) -> None:
        """Note that a step is planned."""
        self._steps += 1

    def count_prompt(self) -> None:
        """Note that this step lets a prompt in."""
        self._steps = 0

    def learn(self, computed: int, known: int) -> None:
        """Note that of a request's `known` tokens `computed` are to be computed."""
        self._computed_share += (computed / known - self._computed_share) / _REMEMBERED

    def are_due(
        self, *, running: int, free_slots: int, waiting: int, waiting_tokens: int, budget: int, has_chunks: bool
    ) -> bool:
        """Say whether prompts may join this step. Some wait, there are free slots, and somebody runs.

        `budget`: tokens of a full step. `has_chunks`: whether the step has a part of a prompt in any case.
        """
        if 2 * running < self._max_batch_size or self._steps >= self._prefill_interval:
            return True
        if waiting_tokens < budget:
            return False
        # Were one let in whenever a slot is free, a small model with a million prompts would launch every step kernel by kernel: ten
        # times the device's work. So many must find a slot that the device is at work as long as its host.
        admissible = self._computed_share * waiting_tokens * min(free_slots, waiting) / waiting
        return has_chunks or admissible >= min(self._worthwhile_tokens, budget)
