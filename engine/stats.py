"""What an engine says about itself: one frozen value, JSON-ready with `dataclasses.asdict`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A moment's state, and sums since the engine started."""

    running: int
    """Requests that hold a slot."""
    waiting: int
    blocks_used: int
    blocks_total: int
    blocks_cached: int
    """Free blocks that still hold a findable prefix."""
    steps: int
    prompt_tokens: int
    """Of requests that were admitted; those found in the prefix cache included."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    generated_tokens: int
    computed_tokens: int
    """Positions that steps computed: prompts, generated tokens, and again what a preemption threw away."""
    preemptions: int
    steps_put_back: int
    """Steps that the device had no memory for; what they were to compute was planned again."""
    finished: int
    """Requests that ended by a stop token or at their limit."""
    failed: int
    aborted: int
