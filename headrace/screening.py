"""What a well-formed prompt may say: one that can't be answered becomes the failed completion of its index, and of nobody else's.

Knows no HTTP, no SQL and no file format: prompts of a request and of a file are judged here alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from headrace.completion import CompletionError
from headrace.config import ROLES, Prompt
from headrace.errors import InvalidRequest, PayloadTooLarge


def screen(prompts: Iterable[Any], *, max_bytes: int) -> Iterator[Prompt | CompletionError]:
    """Yield each prompt, or the reason why it can't be answered in its place."""
    return (refusal(prompt, max_bytes=max_bytes) or prompt for prompt in prompts)


def refusal(prompt: Any, *, max_bytes: int) -> CompletionError | None:
    """Return why this well-formed prompt can't be answered, or None."""
    if isinstance(prompt, str):
        if not prompt:
            return CompletionError(code=InvalidRequest.code, message="The prompt is empty; give it some text")
        return _too_large(_size(prompt), max_bytes)
    if not prompt:
        return CompletionError(code=InvalidRequest.code, message="The conversation has no messages; give it at least one")
    for position, message in enumerate(prompt):
        if reason := _message_fault(message):
            return CompletionError(code=InvalidRequest.code, message=f"messages[{position}]: {reason}")
    return _too_large(sum(_size(message["content"]) for message in prompt), max_bytes)


def _message_fault(message: dict[str, Any]) -> str | None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        return f"role must be one of {', '.join(ROLES)}, not {_shown(role)}"
    if not isinstance(content, str):
        return f"content must be text, not {_shown(content)}"
    unknown = sorted(message.keys() - {"role", "content"})
    return f"there is no field {_shown(unknown[0])} in a message; its fields are role and content" if unknown else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _too_large(size: int, limit: int) -> CompletionError | None:
    if size <= limit:
        return None
    return CompletionError(
        code=PayloadTooLarge.code, message=f"The prompt has {size:,} bytes; this server accepts {limit:,} in one prompt"
    )
