"""Answers that must have a form: whatever a model of random weights wants to say, what it finishes matches."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from engine_driver import make_engine, run, token_request
from schemas_at_random import schema_at_random

from engine.engine import Engine
from engine.request import TokenOutput, TokenRequest
from engine.runner import Runner
from engine.tokenizer import Tokenizer
from headrace.config import PytorchEngineConfig


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def of_regex(regex: str) -> dict[str, Any]:
    return {"type": "regex", "regex": regex}


def of_lark(regex: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": f"start: /{regex}/"}


COLOUR = {"type": "regex", "regex": "(red|green|blue) [0-9]{2,4}"}
LARK = {"type": "grammar", "grammar": 'start: item (", " item)~1..2\nitem: "mill" | /[0-9]+ wheels/\n'}
GBNF = {"type": "grammar", "grammar": 'root ::= "yes" | "no" rest\nrest ::= "," [a-c]{1,3}\n'}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAMPLED = {"top_k": 0, "temperature": 1.0}
# The same form followed on the device, and as a grammar by the host.
BOTH_WAYS = pytest.mark.parametrize("form", [of_regex, of_lark], ids=["device", "host"])


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Engine:
    return make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=400, max_batch_size=16)


def guided(name: int, response_format: Any, *, most: int = 500, prompt: Any = (40, 41, 42), **config: Any) -> TokenRequest:
    config = {**SAMPLED, **config}
    return token_request(str(name), prompt, max_new_tokens=most, response_format=response_format, **config)


def text(tokenizer: Tokenizer, output: TokenOutput) -> str:
    assert output.error is None
    return tokenizer.decode(output.token_ids)


def test_what_finishes_validates_against_forty_schemas(engine, tokenizer):
    schemas = [schema_at_random(seed) for seed in range(40)]
    outputs = run(engine, [guided(i, of_schema(schema), most=900) for i, schema in enumerate(schemas)])
    finished = 0
    for i, schema in enumerate(schemas):
        if outputs[str(i)].finish_reason == "stop":
            jsonschema.validate(json.loads(text(tokenizer, outputs[str(i)])), schema)
            finished += 1
    assert finished >= 36, "most of them must finish, or nothing was tested"


def test_many_answers_to_one_schema_all_validate_and_differ(engine, tokenizer):
    outputs = run(engine, [guided(i, of_schema(PERSON)) for i in range(24)])
    answers = [text(tokenizer, output) for output in outputs.values()]
    for answer in answers:
        jsonschema.validate(json.loads(answer), PERSON)
    assert len(set(answers)) > 20
    assert {output.stop_detail for output in outputs.values()} == {"response_format"}


def test_json_object_is_an_object(engine, tokenizer):
    outputs = run(engine, [guided(i, {"type": "json_object"}) for i in range(8)])
    done = [output for output in outputs.values() if output.finish_reason == "stop"]
    assert done
    assert all(isinstance(json.loads(text(tokenizer, output)), dict) for output in done)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [(COLOUR, COLOUR["regex"]), (LARK, r"(mill|\d+ wheels)(, (mill|\d+ wheels)){1,2}"), (GBNF, "yes|no,[a-c]{1,3}")],
    ids=["regex", "lark", "gbnf"],
)
@pytest.mark.parametrize("greedy", [True, False])
def test_regex_and_grammars(engine, tokenizer, wanted, pattern, greedy):
    config = {"top_k": 1} if greedy else SAMPLED
    outputs = run(engine, [guided(i, wanted, **config) for i in range(6)])
    done = [text(tokenizer, output) for output in outputs.values() if output.finish_reason == "stop"]
    assert done or greedy  # a greedy model may write digits for ever
    assert all(re.fullmatch(pattern, answer) for answer in done), done


@BOTH_WAYS
def test_where_the_form_may_end_or_go_on_the_model_ends_it_with_its_end_token(engine, tokenizer, form):
    outputs = run(engine, [guided(i, form("[ab]+"), logit_bias={2: 6.0}) for i in range(6)])
    assert {output.stop_detail for output in outputs.values()} == {"eos"}
    assert all(re.fullmatch("[ab]+", text(tokenizer, output)) for output in outputs.values())


def test_a_cut_answer_says_length(engine, tokenizer):
    (output,) = run(engine, [guided(0, of_schema(PERSON), most=3)]).values()
    assert (output.finish_reason, output.stop_detail) == ("length", "max_new_tokens")


@BOTH_WAYS
def test_an_answer_complete_at_its_last_allowed_token_is_a_stop(engine, tokenizer, form):
    (output,) = run(engine, [guided(0, form("[a-z]{3}"), most=3)]).values()
    assert len(output.token_ids) <= 3
    assert re.fullmatch("[a-z]{3}", text(tokenizer, output))
    assert output.finish_reason == "stop"


@BOTH_WAYS
def test_min_new_tokens_holds_the_end_back_only_where_the_form_can_go_on(engine, tokenizer, form):
    outputs = run(
        engine,
        [
            guided(0, form("[ab]*"), min_new_tokens=9, logit_bias={2: 20.0}),
            guided(1, form("yes"), min_new_tokens=50),
        ],
    )
    assert len(outputs["0"].token_ids) == 9
    assert text(tokenizer, outputs["1"]) == "yes"


def test_neighbours_without_a_form_say_the_same_as_alone(engine):
    free = [token_request(str(i), [50 + i, 60], max_new_tokens=40, **SAMPLED) for i in range(6)]
    alone = run(engine, free)
    mixed = run(engine, free[:3] + [guided(20 + i, of_schema(PERSON)) for i in range(6)] + free[3:])
    assert all(mixed[str(i)].token_ids == alone[str(i)].token_ids for i in range(6))


@BOTH_WAYS
def test_a_form_gives_the_same_answer_preempted_chunked_or_alone(tiny_model_dir, engine, tokenizer, form):
    # As long as allowed: the engine expects half of it, and lets more in than fit.
    long = form("[a-z ]+")
    requests = [guided(i, long, most=60, min_new_tokens=60, prompt=range(40 + i, 60 + i)) for i in range(8)]
    alone = [run(engine, [one])[one.request_id].token_ids for one in requests]
    # 12 blocks of 16 tokens: room for two such answers.
    small = make_engine(
        tiny_model_dir, block_size=16, num_gpu_blocks=12, max_batch_size=8, prefill_interval=1, max_prefill_token_num=9
    )
    outputs = run(small, requests)
    assert small.stats().preemptions > 0, "the pool was large enough: nothing was tested"
    assert [outputs[str(i)].token_ids for i in range(8)] == alone
    small.check_integrity()


def test_a_form_that_does_not_compile_hurts_nobody_else(engine, tokenizer):
    bad = [of_schema({"type": "nope"}), {"type": "regex", "regex": "("}, {"type": "grammar", "grammar": "start: what"}]
    outputs = run(engine, [guided(i, wanted) for i, wanted in enumerate([*bad, COLOUR])])
    for i in range(3):
        assert outputs[str(i)].error.code == "invalid_request"
        assert outputs[str(i)].error.message.startswith("response_format")
    assert re.fullmatch(COLOUR["regex"], text(tokenizer, outputs["3"]))


@pytest.mark.parametrize(
    "wanted", [of_regex(r"[^\s\S]"), of_schema({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}})]
)
def test_a_form_that_nothing_matches_is_refused_in_words(engine, wanted):
    (output,) = run(engine, [guided(0, wanted)]).values()
    assert output.error.code == "invalid_request"
    assert output.error.message == "response_format can't be followed any further: no text matches it from here on"


def test_a_form_that_the_parser_gives_up_is_refused_without_its_insides(engine):
    (output,) = run(engine, [guided(0, {"type": "grammar", "grammar": 'start: "a" start'})]).values()
    assert "Too many items" in output.error.message
    assert "<state>" not in output.error.message


def test_what_the_library_says_of_its_own_options_is_not_repeated(engine):
    (output,) = run(engine, [guided(0, of_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}))]).values()
    assert "write anyOf" in output.error.message
    assert "coerce" not in output.error.message


def test_a_request_is_aborted_while_its_form_is_compiled(engine):
    engine.add(guided(0, of_schema({**PERSON, "title": "never seen before"})))
    engine.abort("0")
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("0", "abort")]
    assert not engine.has_work


@BOTH_WAYS
def test_bans_that_leave_nothing_are_said_by_name(engine, form):
    request = guided(0, form("[0-9]{3}"))
    digits = tuple((token,) for token in range(3, 400))
    (output,) = run(engine, [type(request)(**{**_fields(request), "bad_sequences": digits})]).values()
    assert output.error.code == "invalid_request"
    assert "bad_words" in output.error.message
    assert "response_format" in output.error.message


@BOTH_WAYS
def test_logprobs_are_of_the_raw_logits(engine, form):
    (output,) = run(engine, [guided(0, form("[0-9]"), logprobs=20)]).values()
    (one,) = output.logprobs
    assert len(one.top) == 20  # all but ten tokens are banned; the model's own favourites are still told
    assert all(value > -100 for _, value in one.top)


def _fields(request: TokenRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


@pytest.mark.parametrize("tp", [1, 2])
def test_through_the_frontend(tiny_model_dir, tp):
    """Choices, refusals and forms together, over processes; with two ranks both must draw the same token under the same mask."""
    import threading

    from engine.frontend import Frontend
    from headrace.config import GenerationConfig

    config = PytorchEngineConfig(device="cpu", tp=tp, max_batch_size=8, num_gpu_blocks=64)
    got: dict[int, Any] = {}
    enough = threading.Event()
    wanted = [of_schema(PERSON), of_schema({"type": "nope"}), None, COLOUR]

    def done(completion: Any) -> None:
        got[completion.index] = completion
        if len(got) == len(wanted):
            enough.set()

    frontend = Frontend(str(tiny_model_dir), backend_config=config)
    try:
        for index, one in enumerate(wanted):
            sampling = GenerationConfig(max_new_tokens=200, response_format=one, n=3, random_seed=index, **SAMPLED)
            frontend.submit("the mill wheel", sampling, done, index=index)
        assert enough.wait(120)
    finally:
        frontend.close()
    people = [json.loads(choice.text) for choice in got[0].choices]
    for person in people:
        jsonschema.validate(person, PERSON)
    assert len(people) == 3
    assert got[1].error.message.startswith("response_format")
    assert got[2].error is None
    assert all(re.fullmatch(COLOUR["regex"], choice.text) for choice in got[3].choices)


@pytest.mark.slow
def test_a_trained_model_fills_in_real_forms():
    """SmolLM2 is asked in words and held by the schema: every answer validates, also where the model would rather chat."""
    import threading

    from engine.frontend import Frontend
    from headrace.config import GenerationConfig

    schemas = [
        PERSON,
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "sunny": {"type": "boolean"}},
            "required": ["city", "sunny"],
            "additionalProperties": False,
        },
        {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 3},
    ]
    asked = ["Invent a person.", "Name a city.", "List some fruit.", "Write a poem about a water wheel."]
    pairs = [(prompt, schema) for prompt in asked for schema in schemas]
    got: dict[int, Any] = {}
    enough = threading.Event()

    def done(completion: Any) -> None:
        got[completion.index] = completion
        if len(got) == len(pairs):
            enough.set()

    frontend = Frontend("smollm2", backend_config=PytorchEngineConfig(device="cpu", max_batch_size=16, session_len=512))
    try:
        for index, (prompt, schema) in enumerate(pairs):
            config = GenerationConfig(max_new_tokens=160, response_format=of_schema(schema), random_seed=index, **SAMPLED)
            frontend.submit([{"role": "user", "content": prompt}], config, done, index=index)
        assert enough.wait(250)
    finally:
        frontend.close()
    answers = [got[index].choices[0] for index in range(len(pairs))]
    finished = [(one.text, schema) for one, (_, schema) in zip(answers, pairs, strict=True) if one.finish_reason == "stop"]
    for answer, schema in finished:
        jsonschema.validate(json.loads(answer), schema)
    assert len(finished) >= 10


def test_a_step_put_back_at_its_sampling_is_counted_once(tiny_model_dir, monkeypatch):
    asked = guided(1, of_lark("[a-z]{40}"), most=8)
    undisturbed = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=20)
    expected = run(undisturbed, [asked])["1"].token_ids
    sample, calls = Runner._sample, itertools.count(1)

    def in_little_memory(runner: Runner, *step: Any, **how: Any) -> None:
        if next(calls) % 3 == 0:
            raise torch.OutOfMemoryError("out of memory")
        sample(runner, *step, **how)

    monkeypatch.setattr(Runner, "_sample", in_little_memory)
    engine = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=20)
    assert run(engine, [asked])["1"].token_ids == expected
    assert engine.stats().steps_put_back == 3
    wanted = undisturbed.stats()
    assert (engine.stats().computed_tokens, engine.stats().steps) == (wanted.computed_tokens, wanted.steps) == (3 + 7, 8)
