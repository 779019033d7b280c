"""What `pipeline()` gives back for one prompt: the fields of the document, flat, with the choices beside them.

This module knows no torch and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from headrace.completion import Choice, Completion, FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to one prompt, or why there is none; in a stream: what is new of one choice."""

    text: str
    """The decoded continuation, without the prompt. In a stream: the new part of it."""
    generate_token_len: int
    """Generated tokens, without the stop token. In a stream: of this choice, so far."""
    finish_reason: FinishReason | None = None
    """None in a stream while the choice goes on."""
    index: int = 0
    """Position of the prompt in the call."""
    session_id: int = 0
    """The same as `index`."""
    input_token_len: int = 0
    """Tokens of the prompt after the chat template, BOS included."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With `prompt_logprobs`: one for each prompt token but the first. In a stream: in choice 0's first piece."""
    cached_tokens: int = 0
    """How many of `input_token_len` came from the prefix cache."""
    error_code: str | None = None
    error_message: str | None = None
    stop_detail: str | None = None
    """What ended it: 'eos', 'stop_token:<id>', 'stop_word:<text>', 'response_format', 'max_new_tokens', 'session_len', 'kv_pool' (which holds no more of one sequence).
    An end token that the caller names, by its id or as a stop word, is the caller's."""
    choice: int = 0
    """Which choice the fields above belong to."""
    choices: tuple[Choice, ...] = ()
    """All choices where n is above 1, the one above included; empty in a stream."""

    @classmethod
    def of(cls, completion: Completion) -> Self:
        """Flatten a completion: its first choice, or its error."""
        usage, error = completion.usage, completion.error
        if error is not None or not completion.choices:
            return cls(
                text="",
                generate_token_len=0,
                finish_reason="abort" if error is not None and error.code == "aborted" else "error",
                index=completion.index,
                session_id=completion.index,
                input_token_len=usage.prompt_tokens,
                error_code=error.code if error else "internal_error",
                error_message=error.message if error else "the engine gave no choice",
            )
        first = completion.choices[0]
        return cls(
            text=first.text,
            generate_token_len=len(first.token_ids),
            finish_reason=first.finish_reason,
            index=completion.index,
            session_id=completion.index,
            input_token_len=usage.prompt_tokens,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            prompt_logprobs=completion.prompt_logprobs,
            cached_tokens=usage.cached_tokens,
            stop_detail=first.stop_detail,
            choices=completion.choices if len(completion.choices) > 1 else (),
        )
