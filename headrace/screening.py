"""What a well-formed prompt may say: one that can't be answered becomes the failed completion of its index, and of nobody else's.

Knows no HTTP, no SQL and no file format: prompts of a request and of a file are judged here alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from headrace.completion import CompletionError
from headrace.config import MESSAGE_FIELDS, ROLES, Prompt, extra_fields
from headrace.errors import InvalidRequest, PayloadTooLarge


def screen(prompts: Iterable[Any], *, max_bytes: int) -> Iterator[Prompt | CompletionError]:
    """Yield each prompt, or the reason why it can't be answered in its place."""
    return (refusal(prompt, max_bytes=max_bytes) or prompt for prompt in prompts)


def refusal(prompt: Any, *, max_bytes: int) -> CompletionError | None:
    """Return why this well-formed prompt can't be answered, or None."""
    if isinstance(prompt, str):
        if not prompt:
            return CompletionError(code=InvalidRequest.code, message="The prompt is empty; give it some text")
        return _text_fault([prompt], max_bytes)
    if not prompt:
        return CompletionError(code=InvalidRequest.code, message="The conversation has no messages; give it at least one")
    for position, message in enumerate(prompt):
        if reason := _message_fault(message):
            return CompletionError(code=InvalidRequest.code, message=f"messages[{position}]: {reason}")
    return _text_fault([text for message in prompt for text in (message["content"], message.get("name") or "")], max_bytes)


def _message_fault(message: dict[str, Any]) -> str | None:
    role, content, name = message.get("role"), message.get("content"), message.get("name")
    if not isinstance(role, str) or role not in ROLES:
        return f"role must be one of {', '.join(ROLES)}, not {_shown(role)}"
    if not isinstance(content, str):
        return f"content must be text, not {_shown(content)}"
    if not isinstance(name, str | None):
        return f"name must be text, not {_shown(name)}"
    if extra := extra_fields(message):
        return f"there is no field {_shown(extra[0])} in a message; its fields are {', '.join(MESSAGE_FIELDS)}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _text_fault(texts: Sequence[str], max_bytes: int) -> CompletionError | None:
    """Return what is wrong with the texts of one prompt as a whole: that no encoding carries them, or that they are too large."""
    try:
        size = sum(map(_size, texts))
    except UnicodeEncodeError as error:
        # JSON can say it, as a text does that was cut inside an emoji.
        return CompletionError(
            code=InvalidRequest.code,
            message=f"The prompt has half of a surrogate pair (at character {error.start}), which no encoding carries; cut texts "
            "between whole characters",
        )
    if size <= max_bytes:
        return None
    return CompletionError(
        code=PayloadTooLarge.code, message=f"The prompt has {size:,} bytes; this server accepts {max_bytes:,} in one prompt"
    )


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
