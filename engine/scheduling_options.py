"""What the engine reads of `EngineOptions`, which knows files and devices as well."""

from __future__ import annotations

from typing import Protocol


class SchedulingOptions(Protocol):
    """What the engine reads of `EngineOptions`."""

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def max_batch_size(self) -> int:
        """Most requests that run at once."""
        ...

    @property
    def max_prefill_token_num(self) -> int:
        """Most tokens that one step computes."""
        ...

    @property
    def prefill_interval(self) -> int:
        """Most steps between two admissions while prompts wait and could be admitted."""
        ...

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether equal prefixes share KV blocks."""
        ...

    @property
    def session_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        ...
