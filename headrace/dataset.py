"""JSONL datasets: one prompt a line, read with bounded memory, and the rows of their answers. A bad line is that row's error alone.

A row is a JSON string, `{"prompt": TEXT}`, or `{"messages": [{"role": ..., "content": ...}, ...]}`; the objects may carry a
`custom_id`. Blank lines are not rows. This module knows neither engines nor stores.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from headrace.completion import Choice, Completion, CompletionError
from headrace.config import ROLES, Prompt, extra_fields
from headrace.errors import HeadraceError, InvalidRequest, NotFound, PayloadTooLarge, UnsupportedOption

MAX_LINE_BYTES = 4 * 1024 * 1024
"""A longer line is an error row; without a bound one file without newlines would fill the memory."""
ROW_FIELDS = ("prompt", "messages", "custom_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: what to answer, or why it can't be."""

    index: int
    """Position among the rows, from 0."""
    line: int
    """Line in the file, from 1."""
    custom_id: str | None
    prompt: Prompt | CompletionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """What tells one input from another."""

    sha256: str
    """Of all rows, blank lines left out."""
    rows: int


def read_rows(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Yield the rows in order. Raise `NotFound` when the file can't be read."""
    for index, (line, text) in enumerate(_lines(path, max_line_bytes)):
        row = read_row(line, text, max_line_bytes=max_line_bytes)
        yield replace(row, index=index) if index else row


def read_row(line: int, text: bytes | None, *, max_line_bytes: int = MAX_LINE_BYTES) -> Row:
    """Return the row of a line, with index 0; None in place of the line: it is longer than `max_line_bytes`."""
    custom_id: str | None = None
    try:
        if text is None:
            raise PayloadTooLarge(f"the row is longer than {max_line_bytes} bytes")
        value = parse_json(text, is_first=line == 1)
        custom_id = _custom_id(value)
        return Row(index=0, line=line, custom_id=custom_id, prompt=parse_row(value))
    except HeadraceError as error:
        return Row(index=0, line=line, custom_id=custom_id, prompt=CompletionError.of(error))


def digest(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Digest:
    """Read the file once, without parsing it, and say what is in it."""
    hasher, rows = hashlib.sha256(), 0
    for _, text in _lines(path, max_line_bytes):
        hasher.update(b"\0" if text is None else text.rstrip(b"\r\n"))
        hasher.update(b"\n")
        rows += 1
    return Digest(sha256=hasher.hexdigest(), rows=rows)


def parse_json(text: bytes, *, is_first: bool) -> Any:
    """Decode one line. Raise `InvalidRequest` saying where in it it is not UTF-8 or not JSON; which line it is its caller says."""
    if is_first:  # editors and spreadsheets mark a file as UTF-8 so; it is no part of its first row
        text = text.removeprefix(codecs.BOM_UTF8)
    try:
        # Without its end: what breaks off there would be said to do so in column 1, of the next line.
        return json.loads(text.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the row is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the row is not JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise InvalidRequest("the row is not JSON (nested too deeply)") from None
    except ValueError:  # JSON, but Python reads no number of thousands of digits
        raise InvalidRequest("the row has a number that is too long") from None


def parse_row(value: Any) -> Prompt:
    """Return a row's prompt. Raise `InvalidRequest` naming what is wrong with it."""
    if isinstance(value, str):
        return _text(value, "the row")
    if not isinstance(value, dict):
        raise InvalidRequest(f"a row must be a string or an object, not {type(value).__name__}")
    if "gen_config" in value:
        raise UnsupportedOption(
            "gen_config can't differ from row to row; give one for the whole job (--gen-config)", param="gen_config"
        )
    unknown = sorted(set(value) - set(ROW_FIELDS))
    if unknown:
        raise InvalidRequest(f"a row has no field {unknown[0]!r}; its fields are {', '.join(ROW_FIELDS)}", param=unknown[0])
    if ("prompt" in value) == ("messages" in value):
        raise InvalidRequest("a row must have either 'prompt' or 'messages'", param="prompt")
    if "prompt" in value:
        return _text(value["prompt"], "prompt")
    return _messages(value["messages"])


def output_row(completion: Completion, custom_id: str | None = None) -> dict[str, Any]:
    """Return a completion as a dataset row: `text` and `finish_reason` of the first choice, all `choices` where there are several."""
    row: dict[str, Any] = {"index": completion.index}
    custom_id = completion.custom_id if custom_id is None else custom_id
    if custom_id is not None:
        row["custom_id"] = custom_id
    if completion.error is not None:
        return {**row, "error": {"code": completion.error.code, "message": completion.error.message}}
    first = completion.choices[0]
    row |= _choice(first)
    if len(completion.choices) > 1:
        row["choices"] = [_choice(choice) for choice in completion.choices]
    if completion.prompt_logprobs is not None:
        row["prompt_logprobs"] = [asdict(one) for one in completion.prompt_logprobs]
    if completion.token_texts is not None:
        row["token_texts"] = completion.token_texts
    usage = completion.usage
    return {
        **row,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    row: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    return row if choice.logprobs is None else {**row, "logprobs": [asdict(one) for one in choice.logprobs]}


def _custom_id(value: Any) -> str | None:
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    if custom_id is not None and not isinstance(custom_id, str):
        raise InvalidRequest(f"custom_id must be a string, not {custom_id!r}", param="custom_id")
    if custom_id is not None and any("\ud800" <= char <= "\udfff" for char in custom_id):
        # The output is UTF-8, which has no half of a surrogate pair: this one row would keep the whole file from being written.
        raise InvalidRequest("custom_id must be valid Unicode text, without halves of surrogate pairs", param="custom_id")
    return custom_id


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be a text that is not empty", param="prompt")
    return value


def _messages(value: Any) -> Prompt:
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list that is not empty", param="messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message) or extra_fields(message):
            raise InvalidRequest(
                f"messages[{position}] must be an object with 'role' and 'content', and perhaps 'name'", param="messages"
            )
        if message["role"] not in ROLES:
            raise InvalidRequest(
                f"messages[{position}].role must be one of {', '.join(ROLES)}, not {message['role']!r}", param="messages"
            )
        if not isinstance(message["content"], str):
            raise InvalidRequest(f"messages[{position}].content must be a text", param="messages")
        if not isinstance(message.get("name"), str | None):
            raise InvalidRequest(f"messages[{position}].name must be a text", param="messages")
    return value


def _lines(path: Path, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes) of the lines that are not blank; None in place of a line longer than `limit`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFound(f"{path} can't be read: {error.strerror}") from error
    with file:
        number = 0
        while text := file.readline(limit + 1):
            number += 1
            if len(text) > limit and not text.endswith(b"\n"):
                _skip_line(file, limit)
                yield number, None
            elif text.strip():
                yield number, text


def _skip_line(file: IO[bytes], limit: int) -> None:
    while (rest := file.readline(limit + 1)) and not rest.endswith(b"\n"):
        pass
