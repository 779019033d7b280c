"""JSONL rows: what is a prompt, what is an error row, and that memory stays bounded."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from headrace.batch import CHAT, Item
from headrace.batch_input import Rules, reader
from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs
from headrace.dataset import Row, digest, output_row, read_rows
from headrace.errors import NotFound

TALK = [{"role": "user", "content": "hi"}]


def rows_of(tmp_path: Path, *lines: str | bytes, **options: int) -> list[Row]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return list(read_rows(path, **options))


def test_the_three_forms(tmp_path: Path) -> None:
    lines = ['"text"', json.dumps({"prompt": "a", "custom_id": "x"}), json.dumps({"messages": TALK})]
    rows = rows_of(tmp_path, *lines)
    assert [(row.index, row.line, row.custom_id, row.prompt) for row in rows] == [
        (0, 1, None, "text"),
        (1, 2, "x", "a"),
        (2, 3, None, TALK),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_row_and_an_error_elsewhere(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, codecs.BOM_UTF8 + b'"a"', codecs.BOM_UTF8 + b'"b"')
    assert rows[0].prompt == "a"
    assert isinstance(rows[1].prompt, CompletionError)
    request = {"custom_id": "x", "method": "POST", "url": CHAT, "body": {"messages": TALK}}
    read = reader(Rules(endpoint=CHAT, model="m", served=("m",), max_prompt_bytes=1000))
    item = read(1, codecs.BOM_UTF8 + json.dumps(request).encode())
    assert isinstance(item, Item)
    assert item.custom_id == "x"


def test_a_stop_that_no_answer_can_have_is_its_lines_error_by_openais_name() -> None:
    request = {"custom_id": "x", "method": "POST", "url": CHAT, "body": {"messages": TALK, "stop": ["END", "\ud83d"]}}
    item = reader(Rules(endpoint=CHAT, model="m", served=("m",), max_prompt_bytes=1000))(1, json.dumps(request).encode())
    assert isinstance(item, Item)
    assert isinstance(item.prompt, CompletionError)
    assert item.prompt.message.startswith("stop has a text that is not valid Unicode")


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, '"a"', "", "   ", '"b"')
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 4)]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("{not json", "invalid_request", "the row is not JSON (column 2: "),
        (b'"\xff"', "invalid_request", "not UTF-8"),
        ("[" * 100_000, "invalid_request", "JSON"),
        ("3", "invalid_request", "not int"),
        ("1" * 5000, "invalid_request", "number that is too long"),
        ('{"prompt": "a", "custom_id": "\\ud800"}', "invalid_request", "custom_id"),
        ("null", "invalid_request", "not NoneType"),
        ('""', "invalid_request", "not empty"),
        ('{"prompt": ["a"]}', "invalid_request", "prompt must be a text"),
        ('{"prompt": "a", "messages": []}', "invalid_request", "either"),
        ("{}", "invalid_request", "either"),
        ('{"prompt": "a", "temperature": 1}', "invalid_request", "no field 'temperature'"),
        ('{"prompt": "a", "gen_config": {}}', "unsupported_option", "gen_config"),
        ('{"prompt": "a", "custom_id": 3}', "invalid_request", "custom_id"),
        ('{"messages": []}', "invalid_request", "not empty"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "invalid_request", "'robot'"),
        ('{"messages": [{"role": "user"}]}', "invalid_request", "messages[0]"),
        ('{"messages": [{"role": "user", "content": 3}]}', "invalid_request", "messages[0].content"),
        ('{"messages": [{"role": "user", "content": "x", "name": 3}]}', "invalid_request", "messages[0].name"),
        ('{"messages": [{"role": "user", "content": "x", "nmae": "ann"}]}', "invalid_request", "messages[0]"),
    ],
)
def test_a_bad_row_is_an_error_of_its_own(tmp_path: Path, line: str | bytes, code: str, words: str) -> None:
    bad, good = rows_of(tmp_path, line, '"fine"')
    assert isinstance(bad.prompt, CompletionError)
    assert bad.prompt.code == code
    assert words in bad.prompt.message
    assert good.prompt == "fine"


def test_a_message_may_have_a_name(tmp_path: Path) -> None:
    named = [{**TALK[0], "name": "ann"}]
    (row,) = rows_of(tmp_path, json.dumps({"messages": named}))
    assert row.prompt == named


def test_a_bad_row_keeps_its_custom_id(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, '{"prompt": "", "custom_id": "seven"}')
    assert row.custom_id == "seven"


@pytest.mark.parametrize("extra", [0, 1, 63, 64, 65, 200])
def test_a_line_that_is_too_long_is_skipped_whole(tmp_path: Path, extra: int) -> None:
    long, good = rows_of(tmp_path, b'"' + b"x" * (64 + extra) + b'"', '"fine"', max_line_bytes=64)
    assert isinstance(long.prompt, CompletionError)
    assert long.prompt.code == "payload_too_large"
    assert (good.index, good.line, good.prompt) == (1, 2, "fine")


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, b'"' + b"x" * 62 + b'"', '"fine"', max_line_bytes=64)
    assert [row.prompt for row in rows] == ["x" * 62, "fine"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        list(read_rows(tmp_path / "nowhere.jsonl"))


def test_the_digest_sees_what_matters(tmp_path: Path) -> None:
    def of(text: str) -> tuple[str, int]:
        path = tmp_path / "in.jsonl"
        path.write_bytes(text.encode())
        found = digest(path)
        return found.sha256, found.rows

    assert of('"a"\n"b"\n') == of('"a"\r\n\n"b"')
    assert of('"a"\n"b"\n')[1] == 2
    assert of('"a"\n"b"\n') != of('"b"\n"a"\n')
    assert of('"a"\n') != of('"a"\n"a"\n')


def test_a_row_of_the_output_tells_what_the_named_tokens_stand_for() -> None:
    logprobs = (TokenLogprobs(token_id=5, logprob=-0.5, top=((5, -0.5), (7, -1.5))),)
    choice = Choice(index=0, text="é", token_ids=(5,), finish_reason="stop", logprobs=logprobs)
    row = output_row(Completion(index=0, choices=(choice,), token_texts={5: "é", 7: (195,)}))
    assert json.loads(json.dumps(row))["token_texts"] == {"5": "é", "7": [195]}
    assert "token_texts" not in output_row(Completion(index=0, choices=(choice,))), "a journal of before has none"


def test_the_examples_are_good_rows() -> None:
    rows = list(read_rows(Path(__file__).resolve().parents[2] / "examples/prompts.jsonl"))
    assert 24 <= len(rows) <= 40
    assert not [row for row in rows if isinstance(row.prompt, CompletionError)]
    assert len({row.custom_id for row in rows}) == len(rows)
