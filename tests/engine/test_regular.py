"""Response formats as automata: every text of theirs validates, and byte by byte they are the grammar library's languages."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from byte_grammar import ByteGrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas_at_random import schema_at_random

from engine.regular import automaton_of
from engine.regular.automaton import MOST_STATES, Automaton, compile_expression, utf8_sequences
from engine.regular.expression import TooLargeError, alt, char_set, chars, complement, repeat, seq, text
from engine.regular.json_schema import integers
from headrace.response_format import ResponseFormat

END = 256
STRING = {"type": "string"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"', "é"]}, "maxItems": 3},
        "nick": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/nick"}]},
    },
    "required": ["age", "nick"],
    "additionalProperties": False,
    "$defs": {"nick": {"type": "string", "pattern": "^[a-z]{2,4}$", "description": "short"}},
}
REGULAR: dict[str, Any] = {
    "person": PERSON,
    "string": STRING,
    "bounded": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": r"^(red|green)-\d{3}[.\w]?$"},
    "dot": {"type": "string", "pattern": "^.[^a]$"},
    "unanchored": {"type": "string", "pattern": "ab"},
    "half": {"type": "string", "pattern": "^a|b$"},
    "integer": {"type": "integer"},
    "from": {"type": "integer", "minimum": 17},
    "to": {"type": "integer", "maximum": -1204},
    "between": {"type": "integer", "exclusiveMinimum": -12, "exclusiveMaximum": 1301},
    "number": {"type": "number"},
    "types": {"type": ["boolean", "null", "integer"]},
    "const": {"const": {"k": [1, "x"], "": None}},
    "enum": {"enum": ["é🙂", 'q"\\', 12, True, None, [], {}]},
    "typed enum": {"type": "string", "enum": ["a", "b", None]},
    "array": {"type": "array", "items": {"type": "boolean"}},
    "some": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    "at least": {"type": "array", "items": {"type": "null"}, "minItems": 1},
    "empty": {"type": "array", "items": {"type": "null"}, "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False},
    "tuple of two": {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 2},
    "tuple and more": {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "maxItems": 4},
    "tuple and many": {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 3}, "minItems": 3},
    "tuple cut": {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}, {"const": 3}], "maxItems": 2, "minItems": 1},
    "no properties": {"type": "object", "additionalProperties": False},
    "all optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}},
        "additionalProperties": False,
    },
    "late required": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "ü\n": {"type": "null"}},
        "required": ["ü\n"],
        "additionalProperties": False,
    },
    "all of one": {"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": {"type": "boolean"}}},
}
IRREGULAR: dict[str, Any] = {
    "anything": {},
    "any object": {"type": "object"},
    "no type": {"properties": {"a": STRING}},
    "more properties": {"type": "object", "properties": {"a": STRING}, "additionalProperties": True},
    "properties of a kind": {"type": "object", "properties": {"a": STRING}, "additionalProperties": STRING},
    "required but not listed": {
        "type": "object",
        "properties": {"a": STRING},
        "required": ["b"],
        "additionalProperties": False,
    },
    "patternProperties": {"type": "object", "properties": {"a": STRING}, "patternProperties": {"b": STRING}},
    "minProperties": {"type": "object", "properties": {"a": STRING}, "minProperties": 1},
    "any items": {"type": "array"},
    "uniqueItems": {"type": "array", "items": STRING, "uniqueItems": True},
    "contains": {"type": "array", "items": STRING, "contains": STRING},
    "old tuple": {"type": "array", "items": [STRING]},
    "tuple in an old draft": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "prefixItems": [STRING]},
    "oneOf": {"oneOf": [STRING]},
    "not": {"not": STRING},
    "allOf": {"allOf": [STRING, {"minLength": 3}]},
    "anyOf and more": {"anyOf": [STRING], "minLength": 3},
    "format": {"type": "string", "format": "date"},
    "pattern and length": {"type": "string", "pattern": "^a*$", "maxLength": 3},
    "minimum of a number": {"type": "number", "minimum": 0},
    "minimum of a string": {"type": "string", "minimum": 0},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "old exclusiveMinimum": {"type": "integer", "minimum": 0, "exclusiveMinimum": True},
    "bad minLength": {"type": "string", "minLength": -1},
    "bad type": {"type": "nope"},
    "recursion": {
        "type": "array",
        "items": {"$ref": "#/$defs/x"},
        "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
    },
    "reference to the root": {"type": "array", "items": {"$ref": "#"}},
    "reference to nothing": {"$ref": "#/$defs/x"},
    "reference and more": {"$ref": "#/$defs/x", "minLength": 2, "$defs": {"x": STRING}},
    "unknown": {"type": "string", "x-mine": 3},
    "lone surrogate": {"const": "\ud800"},
    "too large": {"type": "string", "maxLength": MOST_STATES},
    "one true schema": {"type": "array", "items": True},
}


def of_schema(schema: Any) -> Automaton | None:
    return automaton_of(ResponseFormat("json_schema", json.dumps(schema)))


def of_regex(regex: str) -> Automaton | None:
    return automaton_of(ResponseFormat("regex", regex))


def following(automaton: Automaton, state: int) -> set[int]:
    return set(np.flatnonzero(automaton.next_n256[state] >= 0).tolist()) | ({END} if automaton.final_n[state] else set())


def draw_text(automaton: Automaton, draw: random.Random, *, eager: float = 0.1) -> bytes | None:
    """Walk at random; None: the text went on and on."""
    state, out = 0, bytearray()
    for _ in range(3000):
        can = following(automaton, state)
        if can == {END} or (END in can and draw.random() < eager):
            return bytes(out)
        # The few bytes that lead on as often as the many that are just another letter.
        ways: dict[int, list[int]] = {}
        for byte in can - {END}:
            ways.setdefault(int(automaton.next_n256[state, byte]), []).append(byte)
        byte = draw.choice(ways[draw.choice(sorted(ways))])
        out.append(byte)
        state = int(automaton.next_n256[state, byte])
    return None


@pytest.mark.parametrize("name", REGULAR)
def test_every_text_of_an_automaton_validates(name):
    automaton, draw = of_schema(REGULAR[name]), random.Random(name)
    assert automaton is not None
    found = 0
    for _ in range(60):
        data = draw_text(automaton, draw)
        if data is not None:
            jsonschema.validate(json.loads(data), REGULAR[name])
            found += 1
    assert found > 10


@pytest.mark.parametrize("name", REGULAR)
def test_byte_by_byte_it_is_the_librarys_language(name):
    automaton, draw = of_schema(REGULAR[name]), random.Random(name)
    for _ in range(12):
        state, grammar = 0, ByteGrammar.of_schema(REGULAR[name])
        for _ in range(60):
            can = following(automaton, state)
            assert grammar.following() == can
            if can <= {END}:
                break
            byte = draw.choice(sorted(can - {END}))
            grammar.go(byte)
            state = int(automaton.next_n256[state, byte])


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_not_known_to_be_regular_is_left_to_the_library(name):
    assert of_schema(IRREGULAR[name]) is None


def test_schemas_at_random():
    """Whatever is taken is the library's language: walked byte by byte, and validated where a walk comes to an end."""
    taken = ended = 0
    for seed in range(120):
        schema, draw = schema_at_random(seed), random.Random(seed)
        automaton = of_schema(schema)
        if automaton is None:
            assert "multipleOf" in json.dumps(schema), "only that keyword is beyond the automata, of those that are drawn"
            continue
        taken += 1
        data = draw_text(automaton, draw)
        if data is not None:
            jsonschema.validate(json.loads(data), schema)
            ended += 1
        state, grammar = 0, ByteGrammar.of_schema(schema)
        for byte in data or b"":
            # A fraction among constants may have more zeros, says the library.
            assert following(automaton, state) <= grammar.following()
            grammar.go(byte)
            state = int(automaton.next_n256[state, byte])
    assert taken > 70
    assert ended > 50


def test_an_object_that_says_nothing_of_other_properties_has_none():
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    automaton = of_schema(schema)
    assert automaton.accepts(b'{"a": null}')
    assert not automaton.accepts(b'{"a": null, "b": null}')
    closed = of_schema({**schema, "additionalProperties": False})
    assert np.array_equal(automaton.next_n256, closed.next_n256)


REGEXES = [
    "(red|green|blue) [0-9]{2,4}",
    "[ab]+",
    "a.c",
    "[^a-c\n]{1,2}x?",
    "é|🙂a|[à-ü]{2}",
    "^foo(bar|baz)*$",
    "(a|ab)(c|bcd)(d*)",
    "(?:x{0,3}y){2}",
    r"\.\*\[\]\\\-\/",
    "[+-]?(0|[1-9][0-9]*)(\\.[0-9]+)?",
    "a|b|",
    "a+?b*?",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_the_librarys_and_pythons(regex):
    automaton, draw = of_regex(regex), random.Random(regex)
    assert automaton is not None
    for _ in range(15):
        state, grammar, out = 0, ByteGrammar.of_regex(regex), bytearray()
        for _ in range(20):
            can = following(automaton, state)
            assert grammar.following() == can
            if END in can:
                assert re.fullmatch(regex, out.decode())
            if can <= {END}:
                break
            out.append(draw.choice(sorted(can - {END})))
            grammar.go(out[-1])
            state = int(automaton.next_n256[state, out[-1]])


def test_classes_are_their_ascii_sets():
    for regex, letters in ((r"\d", "0123456789"), (r"\w", "aZ_9"), (r"\s", " \t\n\r\f\v")):
        automaton = of_regex(regex)
        assert {letter for letter in letters if automaton.accepts(letter.encode())} == set(letters)
        assert not any(automaton.accepts(letter.encode()) for letter in "é١\u2003-")


@pytest.mark.parametrize(
    "regex",
    [r"\bx", "(?i)a", "(?=a)a", "a(?!b)", r"(a)\1", "a++", "(?>a)b", "a{,2}", "[a&&b]", "[[a]]", r"\W", r"[^\d]", r"\p{L}", "a^b", "x|a$b",
     "(", "", "a{20000}", "((((a{50}){50}){50}){50})"],
)  # fmt: skip
def test_a_regex_that_is_read_differently_elsewhere_is_left_to_the_library(regex):
    assert of_regex(regex) is None or regex == ""


@given(st.integers(-2000, 2000), st.integers(-2000, 2000), st.integers(-2500, 2500))
@settings(max_examples=200, deadline=None)
def test_integers_between_bounds(low, high, value):
    for lowest, highest in ((low, high), (low, None), (None, high)):
        automaton = compile_expression(integers(lowest, highest))
        inside = (lowest is None or lowest <= value) and (highest is None or value <= highest)
        assert (automaton is not None and automaton.accepts(str(value).encode())) == inside
        assert automaton is None or automaton.accepts(b"-0") == (
            (lowest is None or lowest < 0) and (highest is None or highest >= 0)
        )


@pytest.mark.parametrize(
    ("low", "high"), [(-(2**63), 2**63 - 1), (0, 2**64 - 1), (10**30, None), (None, -(10**16)), (-5, 10**40)]
)
def test_bounds_of_many_digits_cost_states_not_time(low, high):
    # Each further digit once doubled the time: the bounds of an int64 held an engine up for minutes.
    begin = time.perf_counter()
    automaton = compile_expression(integers(low, high))
    assert time.perf_counter() - begin < 5, "some 20 ms on a quiet machine"
    assert automaton.size < 500
    for bound in (low, high):
        for value in () if bound is None else (bound - 1, bound, bound + 1):
            inside = (low is None or low <= value) and (high is None or value <= high)
            assert automaton.accepts(str(value).encode()) == inside, value


@given(st.integers(0, 0x10FFFF), st.integers(0, 3000), st.integers(0, 0x10FFFF))
@settings(max_examples=300, deadline=None)
def test_a_range_of_characters_is_its_utf8(low, length, probe):
    ranges = char_set([(low, min(low + length, 0x10FFFF))])
    for points, negated in ((ranges, False), (complement(ranges), True)):
        automaton = compile_expression(chars(points))
        for point in (probe, low, low + length, low + length + 1, max(0, low - 1)):
            if 0xD800 <= point <= 0xDFFF or point > 0x10FFFF:
                continue
            inside = low <= point <= low + length
            assert (automaton is not None and automaton.accepts(chr(point).encode())) == (inside != negated)


def test_sequences_of_bytes_hold_each_character_once():
    counted = 0
    for low, high in ((0, 0xD7FF), (0xE000, 0x10FFFF)):
        for sequence in utf8_sequences(low, high):
            size = 1
            for first, last in sequence:
                size *= last - first + 1
            counted += size
    assert counted == 0x110000 - 0x800


def test_long_repetitions_cost_states_not_time():
    # Each further letter costs a state; a library that was tried needed twice the time for each.
    item = alt(chars(complement(((0x22, 0x22), (0x5C, 0x5C)))), seq(text("\\"), alt(text('"'), text("\\"))))
    automaton = compile_expression(seq(text('"'), repeat(item, 0, 300), text('"')))
    assert automaton.accepts('"é\\"🙂"'.encode())
    assert not automaton.accepts(b'"' + b"a" * 301 + b'"')
    with pytest.raises(TooLargeError):
        compile_expression(repeat(item, 0, 300), most_states=300)


@pytest.mark.parametrize(
    "regex",
    [
        "a.{500}b.*a.{500}c",
        "(a|b)*a(a|b){400}",
        "(a?){8000}",
        "((a?){90}){90}",
        "(.*x){300}",
        "(){4000000000}",
        "([a-z]+,?){2000}",
    ],
)
def test_what_would_blow_up_is_given_up_soon(regex):
    begin = time.perf_counter()
    automaton = of_regex(regex)
    assert automaton is None or automaton.size < MOST_STATES
    assert time.perf_counter() - begin < 20, "some two seconds on a quiet machine"


def _nested(wrap, times):
    schema = {"type": "null"}
    for _ in range(times):
        schema = wrap(schema)
    return schema


def _array(schema):
    return {"type": "array", "items": schema}


def _optional_fields(schema):
    return {"type": "object", "properties": dict.fromkeys("abcdef", schema)}


@pytest.mark.parametrize(
    "schema",
    [
        _nested(_array, 60),
        _nested(_optional_fields, 5),
        {"type": "object", "properties": {f"k{number}": {"type": "integer"} for number in range(1000)}},
        {"anyOf": [{"$ref": "#/$defs/x"}] * 900, "$defs": {"x": _nested(_optional_fields, 2)}},
    ],
    ids=["arrays in arrays", "optional fields in optional fields", "a thousand optional fields", "much referred to"],
)
def test_a_schema_that_would_blow_up_is_given_up_soon(schema):
    """An item stands in its array twice and a field in its object many times, so nesting multiplies what has to be written out."""
    begin = time.perf_counter()
    assert of_schema(schema) is None
    assert time.perf_counter() - begin < 20, "well under a second on a quiet machine"


def test_nothing_to_say_is_no_automaton():
    assert compile_expression(alt()) is None
    assert of_schema({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}) is None
    assert automaton_of(ResponseFormat("json_object")) is None
    assert automaton_of(ResponseFormat("grammar", 'start: "a"')) is None
