"""One line of a batch's input file: a prompt with its config and its name, the error of that line alone, or a fault of the file.

Two forms, told apart by the batch's endpoint:

    /v1/chat/completions, /v1/completions   OpenAI's: {"custom_id", "method", "url", "body"}; the body is the line's own config
    /v1/batches                             rows of `headrace.dataset`: a text, {"prompt"} or {"messages"}, with the batch's config

In OpenAI's form a line that can't be told from others (no JSON, no custom_id, another url or model) fails the whole file, as it does
there; what its body says wrongly fails that line alone, by name. Knows no HTTP, no SQL and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from headrace.batch import CHAT, ROWS, Item
from headrace.completion import CompletionError
from headrace.config import MESSAGE_FIELDS, GenerationConfig, Prompt, extra_fields
from headrace.dataset import MAX_LINE_BYTES, parse_json, read_row
from headrace.errors import HeadraceError, InvalidRequest, PayloadTooLarge, UnsupportedOption
from headrace.screening import refusal

MAX_CUSTOM_ID: Final = 512
_CACHED_CHARS: Final = 2048

# OpenAI's name (or the one that is customary beside its API) to the field of GenerationConfig.
_SAME: Final = {
    "n": "n", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "random_seed",
    "stop": "stop_words", "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias", "response_format": "response_format", "ignore_eos": "ignore_eos", "stop_token_ids": "stop_token_ids",
    "bad_words": "bad_words", "skip_special_tokens": "skip_special_tokens", "include_stop_str_in_output": "include_stop_str_in_output",
}  # fmt: skip
# These change nothing in an answer.
_WITHOUT_EFFECT: Final = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
# What is refused unless it asks for what happens anyway.
_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "stream": (False,), "echo": (False,), "suffix": ("",), "tools": ([],), "tool_choice": ("none",), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "stream_options": ({},),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the whole file, in the form of OpenAI's batch errors."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a line is read against."""

    endpoint: str
    model: str
    served: tuple[str, ...]
    max_prompt_bytes: int


Read = Callable[[int, bytes | None], Item | Fault]
"""Reads a line by its number (from 1) and bytes; None in place of the bytes: longer than `MAX_LINE_BYTES`."""


def reader(rules: Rules) -> Read:
    """Return the function that reads the lines of a file."""
    if rules.endpoint == ROWS:
        return lambda number, text: _read_plain(rules, number, text)
    return lambda number, text: _read_request(rules, number, text)


def first_config(rules: Rules, text: bytes) -> tuple[str | None, GenerationConfig | None]:
    """Return model and config that a file's first line names; None where it names none, or none that can be read."""
    try:
        body = parse_json(text, is_first=True)["body"]
        model = body.get("model")
        config = _config_of(body, is_chat=rules.endpoint == CHAT)
    except (HeadraceError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return None, None
    return model if isinstance(model, str) else None, config


def _read_plain(rules: Rules, number: int, text: bytes | None) -> Item:
    row = read_row(number, text)
    prompt = row.prompt
    if not isinstance(prompt, CompletionError):
        prompt = refusal(prompt, max_bytes=rules.max_prompt_bytes) or prompt
    if row.custom_id is not None and "\0" in row.custom_id:  # PostgreSQL's text has none
        return Item(CompletionError(code=InvalidRequest.code, message="custom_id must not have a NUL character in it"))
    return Item(prompt, custom_id=row.custom_id)


def _read_request(rules: Rules, number: int, text: bytes | None) -> Item | Fault:
    if text is None:
        return Fault("invalid_json_line", f"The line is longer than {MAX_LINE_BYTES:,} bytes.", number)
    try:
        value = parse_json(text, is_first=number == 1)
    except InvalidRequest as error:
        return Fault("invalid_json_line", f"This line is not parseable as valid JSON: {error.message}.", number)
    return _envelope_fault(rules, number, value) or _answerable(rules, value)


def _envelope_fault(rules: Rules, number: int, value: Any) -> Fault | None:
    """Return what makes this line another batch's, or nobody's."""
    if not isinstance(value, dict):
        return Fault("invalid_json_line", f"A line must be a JSON object, not {type(value).__name__}.", number)
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if name not in value:
            return Fault("missing_required_parameter", f"Missing required parameter: '{name}'.", number, name)
        if not isinstance(value[name], kind):
            shown = "an object" if kind is dict else "a string"
            return Fault("invalid_type", f"'{name}' must be {shown}, not {type(value[name]).__name__}.", number, name)
    custom_id = value["custom_id"]
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID or "\0" in custom_id or any("\ud800" <= char <= "\udfff" for char in custom_id):
        rule = f"1 to {MAX_CUSTOM_ID} characters of valid Unicode without NUL"
        return Fault("invalid_custom_id", f"'custom_id' must be {rule}.", number, "custom_id")
    return _target_fault(rules, number, value)


def _target_fault(rules: Rules, number: int, value: Mapping[str, Any]) -> Fault | None:
    if value["method"] != "POST":
        return Fault("invalid_method", f"'method' must be 'POST', not {_shown(value['method'])}.", number, "method")
    if value["url"] != rules.endpoint:
        message = f"The url {_shown(value['url'])} of this request does not match the batch's endpoint {rules.endpoint!r}."
        return Fault("invalid_url", message, number, "url")
    model = value["body"].get("model")
    if model in (None, rules.model):
        return None
    if model not in rules.served:
        message = f"The model {_shown(model)} is not served here; the models are {', '.join(rules.served)}."
        return Fault("model_not_found", message, number, "body.model")
    message = (
        f"The model {_shown(model)} for this request does not match the rest of the batch, whose model is {rules.model!r}. "
        "Each batch must contain requests for a single model."
    )
    return Fault("mismatched_model", message, number, "body.model")


def _answerable(rules: Rules, value: Mapping[str, Any]) -> Item:
    body, is_chat = value["body"], rules.endpoint == CHAT
    config: GenerationConfig | None = None
    prompt: Prompt | CompletionError
    try:
        # Before the prompt: the cache below makes it the cheaper of the two.
        config = _config_of(body, is_chat=is_chat)
        prompt = _messages(body) if is_chat else _text(body)
        prompt = refusal(prompt, max_bytes=rules.max_prompt_bytes) or prompt
    except (InvalidRequest, PayloadTooLarge) as error:
        prompt = CompletionError.of(error)
    return Item(prompt, config, value["custom_id"])


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("model", "messages", "prompt") and value is not None}


def _config_of(body: Mapping[str, Any], *, is_chat: bool) -> GenerationConfig:
    """Return the config that a body asks for. Most lines of a file ask for the same, and checking it costs as much as the line."""
    text = json.dumps(_settings(body))
    # A thousand large schemas, each line with its own, would fill the memory.
    return _cached_config(text, is_chat=is_chat) if len(text) <= _CACHED_CHARS else _config(text, is_chat=is_chat)


def _config(text: str, *, is_chat: bool) -> GenerationConfig:
    values: dict[str, Any] = json.loads(text)
    fields: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "max_new_tokens": None if is_chat else 16}
    if "max_tokens" in values and "max_completion_tokens" in values:
        raise InvalidRequest("max_tokens and max_completion_tokens mean the same; give one of them", param="max_tokens")
    _check_without_effect(values, is_chat=is_chat)
    logprobs = _logprobs(values, is_chat=is_chat)
    own_names: dict[str, str] = {}
    for name, value in values.items():
        if name not in _SAME:
            continue
        own_names[_SAME[name]] = name
        fields[_SAME[name]] = _translated(name, value)
    try:
        return GenerationConfig.from_dict({**fields, "logprobs": logprobs})
    except InvalidRequest as error:
        name = own_names.get(str(error.param), str(error.param))
        raise InvalidRequest(error.message.replace(str(error.param), name, 1), param=name) from None


_cached_config = lru_cache(maxsize=2048)(_config)


def _translated(name: str, value: Any) -> Any:
    if name == "seed" and isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 0:
        return value + 2**64
    return 0 if name == "top_k" and value == -1 else value


def _check_without_effect(values: Mapping[str, Any], *, is_chat: bool) -> None:
    """Refuse what would be ignored. Fields without an effect on the answer, and values that ask for what happens anyway, pass."""
    for name, value in values.items():
        if name in _SAME or name in _WITHOUT_EFFECT or name in ("logprobs", "top_logprobs"):
            continue
        if name == "best_of" and not is_chat and value == values.get("n", 1):
            continue
        if not any(type(value) is type(allowed) and value == allowed for allowed in _ONLY.get(name, ())):
            raise UnsupportedOption(f"{_shown(name)} is not supported in a batch's line; leave it out", param=name)


def _logprobs(values: Mapping[str, Any], *, is_chat: bool) -> int | None:
    wanted, most = values.get("logprobs"), values.get("top_logprobs")
    if not is_chat:
        if most is not None:
            raise UnsupportedOption(
                "top_logprobs belongs to /v1/chat/completions; give logprobs a number", param="top_logprobs"
            )
        return wanted
    if wanted not in (None, True, False) or (isinstance(wanted, int) and not isinstance(wanted, bool)):
        raise InvalidRequest("logprobs must be true or false; top_logprobs says how many", param="logprobs")
    if most is not None and not wanted:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (0 if most is None else most) if wanted else None


def _messages(body: Mapping[str, Any]) -> Prompt:
    if "prompt" in body:
        raise InvalidRequest("a chat completion has messages, not a prompt", param="prompt")
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidRequest("messages must be a list of objects with role and content", param="messages")
    return [_message(position, message) for position, message in enumerate(messages)]  # type: ignore[misc]  # `refusal` checks them


def _message(position: int, message: Mapping[str, Any]) -> dict[str, Any]:
    extra = extra_fields(message)
    known = {name: value for name, value in message.items() if value is not None and (name in MESSAGE_FIELDS or name in extra)}
    if known.get("role") == "developer":  # OpenAI's newer word
        known["role"] = "system"
    parts = known.get("content")
    if isinstance(parts, list):
        known["content"] = "".join(_part(position, part) for part in parts)
    return known


def _part(position: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UnsupportedOption(
        f"messages[{position}].content has a part of type {_shown(kind)}; only text is supported", param="messages"
    )


def _text(body: Mapping[str, Any]) -> Prompt:
    if "messages" in body:
        raise InvalidRequest("a completion has a prompt, not messages", param="messages")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        return str(prompt[0])
    if not isinstance(prompt, str):
        raise UnsupportedOption("prompt must be one text; give each text a line of its own", param="prompt")
    return prompt


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
