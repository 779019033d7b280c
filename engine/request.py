"""One request as the engine knows it: token ids in, token ids out. Text, templates and batches are not known here.

`TokenRequest` and `TokenOutput` cross the pipe between a frontend and its engine process, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from headrace.completion import CompletionError, FinishReason, TokenLogprobs
from headrace.config import GenerationConfig

LimitName = Literal["max_new_tokens", "session_len", "kv_pool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What a frontend asks of the engine: continue `prompt_ids` once (one choice)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    config: GenerationConfig
    seed: int
    """64-bit; drawn by the frontend where the caller gave none, so that a retry repeats the same text."""
    choice: int
    max_new_tokens: int
    """Resolved: what the caller allows and the session length leaves; at least 1."""
    limit: LimitName
    """Which of the two `max_new_tokens` came from."""
    eos_ids: tuple[int, ...] = ()
    """The model's end-of-sequence ids (and the template's stop ids)."""
    stop_ids: tuple[int, ...] = ()
    """The caller's `stop_token_ids`."""
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    """Token sequences never to be completed: `bad_words` tokenised, `bad_token_ids` as sequences of one."""
    stream: bool = False
    """Report every step's tokens (the frontend streams, or looks for stop words), not only the finished whole."""
    rope_stretch: float = 1.0
    """What the base of its rope is stretched by, for the length that it may reach (`RopeSpec.stretch`)."""
    family: str | None = None
    """Requests with the same family have the same prompt and differ in `choice` alone: the prompt is computed once for all."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `dataclasses.asdict` form (with `config` as `to_dict`) after JSON."""
        return cls(
            **{
                **data,
                "config": GenerationConfig.from_dict(data["config"]),
                "prompt_ids": tuple(data["prompt_ids"]),
                "eos_ids": tuple(data["eos_ids"]),
                "stop_ids": tuple(data["stop_ids"]),
                "bad_sequences": tuple(tuple(ids) for ids in data["bad_sequences"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What the engine reports of one request: tokens since the last report, and at the end why it ended."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, without the end-of-sequence or stop token that ended the request."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of `token_ids`, where the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each prompt token but the first, in the first report of a request that asked for them and is choice 0."""
    finish_reason: FinishReason | None = None
    """None while it runs."""
    stop_detail: str | None = None
    error: CompletionError | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0
    run_ms: float = 0.0
