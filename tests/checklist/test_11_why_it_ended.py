"""Point 11: an end token at the last allowed position is 'stop'; the session's length is 'length'."""

from __future__ import annotations

from typing import Any

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig

END = 2


def test_end_token_at_the_last_allowed_position(pipe: AsyncEngine) -> None:
    # Banned for five tokens, certain after them.
    def ended(most: int) -> Any:
        return pipe("water", GenerationConfig(max_new_tokens=most, min_new_tokens=5, logit_bias={END: 100}))

    last = ended(6)
    assert (last.generate_token_len, last.finish_reason, last.stop_detail) == (5, "stop", "eos")
    short = ended(5)
    assert (short.generate_token_len, short.finish_reason, short.stop_detail) == (5, "length", "max_new_tokens")
    assert short.token_ids == last.token_ids


def test_the_sessions_length(pipe: AsyncEngine) -> None:
    for most in (None, 100_000):
        answer: Any = pipe("water", GenerationConfig(max_new_tokens=most, ignore_eos=True))
        assert (answer.finish_reason, answer.stop_detail) == ("length", "session_len")
        assert answer.input_token_len + answer.generate_token_len == 1024
    full: Any = pipe("long " * 3000, GenerationConfig(max_new_tokens=4))
    assert (full.finish_reason, full.error_code) == ("error", "context_length_exceeded")
