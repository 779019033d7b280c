"""The lines of a batch's output and error files, in OpenAI's format, made of the stored rows while they are read.

Built from the stored JSON, not through `Completion`: a million lines are read at one time. A token whose text isn't known (the row is of a
release that kept none, or the engine's tokenizer tells none) goes by its id, as `token_id:504`. Knows no HTTP and no SQL.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, Final

from pydantic_core import from_json

from headrace.batch import CHAT, OutputKind, OutputRow
from headrace.errors import HeadraceError, InvalidRequest
from headrace.schemas import to_wire

_Texts = Mapping[str, str | list[int]]
"""`Completion.token_texts` as JSON has it."""
_NO_RESPONSE: Final = frozenset({"batch_cancelled", "batch_expired"})


def split_file_id(file_id: str) -> tuple[str, OutputKind] | None:
    """Return batch and kind of an output file's id; None: it is the id of an uploaded file."""
    stem, _, kind = file_id.removeprefix("file-").partition("-")
    if kind == "output":
        return f"batch_{stem}", "output"
    return (f"batch_{stem}", "errors") if kind == "errors" else None


def line(row: OutputRow, *, batch_id: str, model: str, endpoint: str) -> bytes:
    """Return one line, with its end."""
    name = f"{batch_id.removeprefix('batch_')}-{row.position}"
    answer = from_json(row.body)
    value = {"id": f"batch_req_{name}", "custom_id": str(row.position) if row.custom_id is None else row.custom_id}
    if row.error_code is None:
        response = _response(name, HTTPStatus.OK, _body(row, answer, name=name, model=model, endpoint=endpoint))
        return to_wire({**value, "response": response, "error": None}) + b"\n"
    message = answer["error"]["message"]
    if row.error_code in _NO_RESPONSE:
        error = {"code": row.error_code, "message": message}
        return to_wire({**value, "response": None, "error": error}) + b"\n"
    status = _status(row.error_code)
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": row.error_code}}
    return to_wire({**value, "response": _response(name, status, body), "error": None}) + b"\n"


def _response(name: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": int(status), "request_id": f"req_{name}", "body": body}


def _body(row: OutputRow, answer: Mapping[str, Any], *, name: str, model: str, endpoint: str) -> dict[str, Any]:
    is_chat = endpoint == CHAT
    texts = answer.get("token_texts") or {}
    choices = [_chat_choice(choice, texts) if is_chat else _text_choice(choice, texts) for choice in answer["choices"]]
    usage = {
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "total_tokens": row.prompt_tokens + row.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": row.cached_tokens},
    }
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(row.recorded_at),
        "model": model,
        "choices": choices,
        "usage": usage,
        "system_fingerprint": None,
    }


def _chat_choice(choice: Mapping[str, Any], texts: _Texts) -> dict[str, Any]:
    rows = choice.get("logprobs")
    logprobs = None
    if rows is not None:
        content = [
            {
                **_token(row["token_id"], row["logprob"], texts),
                "top_logprobs": [_token(token, value, texts) for token, value in row["top"]],
            }
            for row in rows
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": choice["index"],
        "message": {"role": "assistant", "content": choice["text"], "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice["finish_reason"],
    }


def _text_choice(choice: Mapping[str, Any], texts: _Texts) -> dict[str, Any]:
    rows = choice.get("logprobs")
    logprobs = None
    if rows is not None:
        logprobs = {
            "tokens": [_name(row["token_id"], texts) for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [_top(row["top"], texts) for row in rows],
            "text_offset": _offsets(rows, texts, choice["text"]),
        }
    shown = {"index": choice["index"], "text": choice["text"]}
    return {**shown, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}


def _offsets(rows: Sequence[Mapping[str, Any]], texts: _Texts, text: str) -> list[int]:
    """Return where each token begins in the text, in characters; none where the tokens spell another text (one without its special tokens, say)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, spelled, length = [], [], 0
    for row in rows:
        offsets.append(length)
        known = texts.get(str(row["token_id"]))
        if known is None:
            return []
        # A character of several tokens counts with the last of them.
        spelled.append(decoder.decode(known.encode() if isinstance(known, str) else bytes(known)))
        length += len(spelled[-1])
    spelled.append(decoder.decode(b"", final=True))
    return offsets if "".join(spelled).startswith(text) else []


def _token(token_id: int, logprob: float, texts: _Texts) -> dict[str, Any]:
    text = texts.get(str(token_id))
    if text is None:
        return {"token": _unknown(token_id), "logprob": logprob, "bytes": None}
    if isinstance(text, str):
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
    return {"token": _escaped(text), "logprob": logprob, "bytes": text}


def _top(pairs: Sequence[tuple[int, float]], texts: _Texts) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, value in pairs:
        # Of two tokens with one text (a letter, and its byte) the more probable one, which comes first.
        top.setdefault(_name(token, texts), value)
    return top


def _name(token_id: int, texts: _Texts) -> str:
    """Return what stands for a token where nothing stands beside it: OpenAI marks what is no text."""
    text = texts.get(str(token_id), _unknown(token_id))
    return text if isinstance(text, str) else f"bytes:{_escaped(text)}"


def _unknown(token_id: int) -> str:
    return f"token_id:{token_id}"


def _escaped(data: Sequence[int]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


@cache
def _status(code: str) -> int:
    """Return the HTTP status of an error code: 400 for what its sender can correct."""
    todo: list[type[HeadraceError]] = [HeadraceError]
    found: type[HeadraceError] = HeadraceError
    while todo:
        kind = todo.pop()
        found = kind if kind.code == code else found
        todo.extend(kind.__subclasses__())
    return HTTPStatus.BAD_REQUEST if found.status == InvalidRequest.status else found.status
