"""From the bytes of a POST body to what the store takes. Decides what is wrong with the request and what with one prompt only.

Structure (not JSON, an unknown field, a prompt that is neither text nor messages) refuses the whole request and names each wrong
index: nothing was stored, so nothing is half done. What a prompt *says* (empty, an unknown role, too long) is accepted and recorded as
the failure of that index alone. Knows no HTTP and no SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from api.problems import MAX_ERRORS, InvalidBody, invalid_body
from headrace.completion import CompletionError
from headrace.config import ROLES, Prompt
from headrace.errors import InvalidRequest, ModelNotFound, PayloadTooLarge
from headrace.schemas import BatchCreate, FieldError
from headrace.settings import Settings


def parse_create(body: bytes | bytearray, settings: Settings) -> BatchCreate:
    """Parse a POST body. Raises `InvalidBody` naming every wrong field or index, `InvalidRequest` and `ModelNotFound`."""
    try:
        create = BatchCreate.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from None
    _check_structure(create.prompts)
    if len(create.prompts) > settings.max_prompts:
        raise InvalidRequest(
            f"prompts has {len(create.prompts):,} elements; this server accepts {settings.max_prompts:,} in one batch",
            param="prompts",
        )
    return create


def choose_model(name: str | None, settings: Settings) -> str:
    """Return the model to use: the named one, or the first that is served. Raises `ModelNotFound` naming what is served."""
    served = settings.served_models
    if name is None:
        return served[0]
    if name not in served:
        raise ModelNotFound(f"No worker serves {name!r}; this server serves {', '.join(served)}", param="model")
    return name


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


def _check_structure(prompts: list[Any]) -> None:
    if not prompts:
        raise InvalidBody([FieldError(field="prompts", message="the list is empty; a batch needs at least one prompt")])
    errors: list[FieldError] = []
    total = 0
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)):
            continue
        total += 1
        if len(errors) < MAX_ERRORS:
            found = "a list with something else in it" if isinstance(prompt, list) else _JSON_NAMES[type(prompt)]
            message = f"a prompt is a text or a list of message objects, not {found}"
            errors.append(FieldError(index=index, field="prompts", message=message))
    if errors:
        raise InvalidBody(errors, total=total)


_JSON_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
}
