"""From the bytes of a POST body to what the store takes. Decides what is wrong with the request and what with one prompt only.

Structure (not JSON, an unknown field, a prompt that is neither text nor messages) refuses the whole request and names each wrong
index: nothing was stored, so nothing is half done. What a prompt *says* (empty, an unknown role, too long) is accepted and recorded as
the failure of that index alone: `headrace.screening` judges it. Knows no HTTP and no SQL.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from api.problems import MAX_ERRORS, FieldError, InvalidBody, invalid_body
from headrace.batch import ROWS
from headrace.errors import InvalidRequest, ModelNotFound
from headrace.schemas import BatchCreate
from headrace.settings import Settings


def parse_create(body: bytes | bytearray, settings: Settings) -> BatchCreate:
    """Parse a POST body. Raises `InvalidBody` naming every wrong field or index, `InvalidRequest` and `ModelNotFound`."""
    try:
        create = BatchCreate.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from None
    if create.input_file_id is not None:
        if create.prompts is not None:
            raise InvalidBody([FieldError(field="input_file_id", message="give prompts or an input_file_id, not both")])
        return create
    if create.endpoint not in (None, ROWS):
        raise InvalidBody([FieldError(field="endpoint", message="belongs to an input_file_id; leave it out beside prompts")])
    if create.prompts is None:
        raise InvalidBody([FieldError(field="prompts", message="Field required (or the input_file_id of an uploaded file)")])
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
