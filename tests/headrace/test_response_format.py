"""The field `response_format`: what is accepted, what is refused by name, and that it survives every wire."""

from __future__ import annotations

import json

import pytest

from headrace.config import GenerationConfig
from headrace.errors import InvalidRequest
from headrace.response_format import ResponseFormat

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["é", 1, None]}}, "required": ["b"]}
FORMATS = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": {}}},
    {"type": "regex", "regex": "[0-9]+"},
    {"type": "grammar", "grammar": 'start: "a"'},
]


@pytest.mark.parametrize("value", FORMATS)
def test_it_survives_the_wire_and_is_hashable(value):
    config = GenerationConfig(response_format=value)
    again = GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.to_dict() == {"response_format": value}
    assert GenerationConfig(response_format=config.response_format) == config


def test_the_order_of_a_schemas_properties_is_kept():
    kept = GenerationConfig(response_format=FORMATS[1]).to_dict()["response_format"]["json_schema"]["schema"]
    assert list(kept["properties"]) == ["b", "a"]


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_text_is_no_constraint(value):
    assert GenerationConfig(response_format=value) == GenerationConfig()


def test_a_format_doesnt_change_when_its_source_does():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = GenerationConfig(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    schema["properties"]["a"]["type"] = "string"
    assert json.loads(config.response_format.source)["properties"]["a"]["type"] == "integer"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("json_object", "object with a type"),
        ({}, "no type None"),
        ({"type": ["regex"]}, "no type"),
        ({"type": "xml"}, "its types are text, json_object, json_schema, regex, grammar"),
        ({"type": "json_object", "schema": {}}, "no field 'schema'"),
        ({"type": "json_schema"}, "needs the field 'json_schema'"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "field 'schema'"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "field 'schema'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}, "no field 'strct'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "strict"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}, "name"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}, "schema that is JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": {1, 2}}}}, "schema that is JSON"),
        ({"type": "regex", "regex": ""}, "non-empty"),
        ({"type": "regex", "regex": 3}, "non-empty"),
        ({"type": "regex", "regex": "\ud800"}, "Unicode"),
        ({"type": "grammar", "grammar": "a" * (1 << 20) + "b"}, "bytes"),
    ],
)
def test_what_is_wrong_is_said_by_name(value, said):
    with pytest.raises(InvalidRequest, match=said) as caught:
        GenerationConfig(response_format=value)
    assert caught.value.param == "response_format"


def test_ignore_eos_contradicts_it():
    with pytest.raises(InvalidRequest, match="ignore_eos") as caught:
        GenerationConfig(response_format={"type": "json_object"}, ignore_eos=True)
    assert caught.value.param == "response_format"
    assert GenerationConfig(response_format={"type": "text"}, ignore_eos=True).ignore_eos


def test_openapi_shows_what_users_write():
    from headrace.schemas import BatchCreate

    defs = BatchCreate.model_json_schema()["$defs"]
    assert {"type", "json_schema", "regex", "grammar"} == set(ResponseFormat.WIRE_SCHEMA["properties"])
    assert "source" not in json.dumps(defs)
    body = BatchCreate.model_validate({"prompts": ["a"], "gen_config": {"response_format": FORMATS[3]}})
    assert body.gen_config == GenerationConfig(response_format=FORMATS[3])
