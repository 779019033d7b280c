"""What comes back for one prompt: frozen values that cross every border (engine process, worker, SQL, HTTP) as JSON.

This module knows no torch, no SQL and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from headrace.errors import HeadraceError

FinishReason = Literal["stop", "length", "abort", "error"]
TokenText = str | tuple[int, ...]
"""What a token stands for: its text; its bytes where they are only a part of a character, and so no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens of one completion, all its choices together."""

    prompt_tokens: int = 0
    """Tokens of the prompt after the chat template, BOS included; counted once for all choices."""
    cached_tokens: int = 0
    """How many of `prompt_tokens` were read from the prefix cache."""
    completion_tokens: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        """Add field by field."""
        return TokenUsage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Raw log-probabilities (natural log, before any penalty or temperature) at one generated position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The k most probable (token id, logprob), most probable first."""


def read_logprobs(rows: Sequence[Mapping[str, Any]] | None) -> tuple[TokenLogprobs, ...] | None:
    """Rebuild log-probabilities from `asdict` form after JSON."""
    if rows is None:
        return None
    return tuple(
        TokenLogprobs(token_id=row["token_id"], logprob=row["logprob"], top=tuple((i, p) for i, p in row["top"]))
        for row in rows
    )


def read_texts(texts: Mapping[str, Any] | None) -> dict[int, TokenText] | None:
    """Rebuild `Completion.token_texts` after JSON, which has strings for keys and lists for tuples."""
    if texts is None:
        return None
    return {int(token): text if isinstance(text, str) else tuple(text) for token, text in texts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One continuation."""

    index: int
    text: str
    """The decoded continuation, without the prompt, cut before a stop word."""
    token_ids: tuple[int, ...]
    """The generated tokens, without the stop token that ended them; all tokens up to a stop word's last one."""
    finish_reason: FinishReason
    stop_detail: str | None = None
    """What ended it: 'eos', 'stop_token:<id>', 'stop_word:<text>', 'response_format', 'max_new_tokens', 'session_len', 'kv_pool' (which holds no more of one sequence).
    An end token that the caller names, by its id or as a stop word, is the caller's."""
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `asdict` form after JSON."""
        rows = read_logprobs(data.get("logprobs"))
        return cls(**{**data, "token_ids": tuple(data["token_ids"]), "logprobs": rows})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionError:
    """Why a prompt has no answer: `code` from the exception tree, and a message that says what to do."""

    code: str
    message: str

    @classmethod
    def of(cls, error: HeadraceError) -> Self:
        """Keep an exception's code and message."""
        return cls(code=error.code, message=error.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to the prompt at `index` of its batch: `choices`, or an `error` and no choices."""

    index: int
    custom_id: str | None = None
    """What the sender of a file calls the prompt; filled where results are read."""
    choices: tuple[Choice, ...] = ()
    usage: TokenUsage = TokenUsage()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With `prompt_logprobs`: one for each prompt token but the first."""
    token_texts: Mapping[int, TokenText] | None = field(default=None, hash=False)
    """By token id, what the tokens stand for that the log-probabilities name: each once, however often it is named. A token that
    the model has and its tokenizer doesn't know is not in it."""
    error: CompletionError | None = None
    queue_ms: float = 0.0
    """From submission to the first step that computed it, in the engine."""
    run_ms: float = 0.0
    """From that step to the last token."""
    attempts: int = 1
    """How many engine processes worked on it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict` form."""
        error = data.get("error")
        return cls(
            **{
                **data,
                "choices": tuple(Choice.from_dict(choice) for choice in data["choices"]),
                "usage": TokenUsage(**data["usage"]),
                "prompt_logprobs": read_logprobs(data.get("prompt_logprobs")),
                "token_texts": read_texts(data.get("token_texts")),
                "error": None if error is None else CompletionError(**error),
            }
        )
