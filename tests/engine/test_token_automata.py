"""Rows that follow an automaton on the device: where they stand through admissions, growth, eviction and steps that run twice."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from device import DEVICE
from engine_driver import make_engine, run, token_request

from engine import token_automata
from engine.grammar import Grammars
from engine.plan import Admission
from engine.regular import automaton_of
from engine.request import TokenRequest
from engine.state_table import SampledRows
from engine.token_automata import TokenAutomata, follows_on_device
from engine.token_bytes import token_bytes
from engine.tokenizer import Tokenizer

VOCAB, EOS = 342, 2
WORD = {"type": "regex", "regex": "[a-z]{2,9}!"}
PAIR = {
    "type": "json_schema",
    "json_schema": {
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 120}, "b": {"enum": ["x", "é"]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}


def request(name: int, wanted: Any = WORD, **fields: Any) -> TokenRequest:
    return token_request(str(name), [40, 41], max_new_tokens=64, response_format=wanted, **fields)


def rows_of(*places: tuple[int, int]) -> SampledRows:
    """Sampling rows by slot and output index."""
    slots, indices = torch.tensor(places, device=DEVICE).T
    return SampledRows(slots.cpu().numpy(), indices.cpu().numpy() + 2, indices.cpu().numpy(), slots, indices + 2, indices)


@pytest.fixture
def automata(tiny_model_dir: Path) -> TokenAutomata:
    return TokenAutomata(model_path=str(tiny_model_dir), num_slots=5, vocab_size=VOCAB, device=torch.device(DEVICE))


def admit(automata: TokenAutomata, slot: int, one: TokenRequest, generated: tuple[int, ...] = ()) -> None:
    automata.admit([Admission(slot, one, (*one.prompt_ids, *generated), ())], torch.tensor([slot], device=DEVICE))


def allowed(automata: TokenAutomata, slot: int, index: int) -> set[int]:
    logits = torch.zeros((1, VOCAB), device=DEVICE)
    automata.allow(logits, rows_of((slot, index)))
    return set(torch.isfinite(logits[0]).nonzero().squeeze(1).tolist())


def choose(automata: TokenAutomata, slot: int, index: int, token: int) -> int:
    """Store a token; what is said of it: 1, or 2 where the answer is complete."""
    stored = torch.tensor([[token], [1]], dtype=torch.int32, device=DEVICE)
    automata.advance(stored, rows_of((slot, index)))
    return int(stored[1])


@pytest.mark.parametrize("wanted", [WORD, PAIR], ids=["regex", "schema"])
def test_every_mask_on_the_way_is_the_librarys(automata, tiny_model_dir, wanted) -> None:
    grammars, draw, ended = Grammars.of_model(tiny_model_dir), random.Random(1), 0
    for round_ in range(12):
        one = request(round_, wanted)
        admit(automata, 3, one)
        matcher = grammars.matcher(one.config.response_format)
        for index in range(40):
            words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            theirs = set(np.flatnonzero(np.unpackbits(words, bitorder="little")).tolist())
            ours = allowed(automata, 3, index)
            assert ours == theirs
            token = draw.choice(sorted(ours - {EOS}))
            assert matcher.consume_token(token)
            said = choose(automata, 3, index, token)
            assert (said == 2) == matcher.is_stopped()
            if said == 2:
                ended += 1
                break
    assert ended > 6


def test_a_request_that_comes_back_stands_where_it_stood(automata, tiny_model_dir) -> None:
    text = Tokenizer(tiny_model_dir).encode_raw("mill")
    one = request(0)
    admit(automata, 1, one)
    for index, token in enumerate(text):
        choose(automata, 1, index, token)
    stood = allowed(automata, 1, len(text))
    admit(automata, 1, request(7, None))
    admit(automata, 4, one, text)
    assert allowed(automata, 4, len(text)) == stood
    assert len(allowed(automata, 1, 0)) == VOCAB, "the slot's next request follows nothing"


def test_a_step_that_runs_again_finds_what_it_found(automata) -> None:
    admit(automata, 0, request(0))
    first = allowed(automata, 0, 0)
    token = min(first)
    for _ in range(3):
        assert allowed(automata, 0, 0) == first
        choose(automata, 0, 0, token)
    after = allowed(automata, 0, 1)
    choose(automata, 0, 0, max(first))
    choose(automata, 0, 0, token)
    assert allowed(automata, 0, 1) == after


def test_a_token_that_means_nothing_leads_nowhere(automata) -> None:
    admit(automata, 0, request(0))
    before = allowed(automata, 0, 0)
    stored = torch.tensor([[0], [0]], dtype=torch.int32, device=DEVICE)
    automata.advance(stored, rows_of((0, 0)))
    assert stored.tolist() == [[0], [0]]
    assert allowed(automata, 0, 1) == before


def test_formats_come_and_go_and_the_table_stays_small(automata, monkeypatch) -> None:
    """The ones that slots follow stay where they are; the others make room, the longest unused first."""
    monkeypatch.setattr(token_automata, "_IDLE_BYTES", 1 << 17)
    admit(automata, 0, request(0))
    first, sizes = allowed(automata, 0, 0), []
    for number in range(60):
        wanted = {"type": "regex", "regex": f"[a-f]{{{2 + number % 7}}}x{number}"}
        admit(automata, 1 + number % 3, request(number, wanted))
        assert len(allowed(automata, 1 + number % 3, 0)) >= 6
        assert allowed(automata, 0, 0) == first
        sizes.append(automata.bytes_held)
        spans = sorted((span.first, span.after) for span in automata._spans.values())
        assert all(after <= following for (_, after), (following, _) in pairwise(spans))
        assert set(automata._followed.values()) <= automata._spans.keys()
    assert sizes[-1] == sizes[20], "room was made, not allocated"
    assert len(automata._spans) < 40


def test_more_formats_in_use_than_the_table_should_hold(automata, monkeypatch) -> None:
    monkeypatch.setattr(token_automata, "_IDLE_BYTES", 1)
    wanted = [{"type": "regex", "regex": f"{letter}{{3}}"} for letter in "abcde"]
    admitted = [Admission(slot, request(slot, one), (40, 41), ()) for slot, one in enumerate(wanted)]
    automata.admit(admitted, torch.arange(5, device=DEVICE))
    seen = [allowed(automata, slot, 0) for slot in range(5)]
    assert all(seen)
    assert len({min(one) for one in seen}) == 5


def test_which_requests_need_no_guide() -> None:
    assert follows_on_device(request(0))
    assert not follows_on_device(request(0, None))
    assert not follows_on_device(request(0, {"type": "json_object"}))
    many = TokenRequest(**{**_fields(request(0)), "stop_ids": tuple(range(50, 60))})
    assert not follows_on_device(many), "more ends than a slot has room for"


def test_bytes_of_tokens(tiny_model_dir) -> None:
    spelled, tokenizer = token_bytes(str(tiny_model_dir)).resized(400), Tokenizer(tiny_model_dir)
    assert len(spelled.starts_V1) == 401
    text = 'The mill: "é🙂" 12'
    assert spelled.join(tokenizer.encode_raw(text)).decode() == text
    assert spelled.join([EOS, 399]) == b""
    assert len(spelled.resized(10).data) == int(spelled.starts_V1[10])


IRREGULAR = {"type": "json_schema", "json_schema": {"schema": {"oneOf": [PAIR["json_schema"]["schema"]]}}}
SAMPLED = {"top_k": 0, "temperature": 1.0}


def test_both_ways_in_one_batch_and_alone(tiny_model_dir) -> None:
    """Rows that follow an automaton, rows with masks of the host and free rows, in one batch: each says what it says alone."""
    wanted = [WORD, IRREGULAR, None, PAIR]
    requests = [request(i, wanted[i % 4], **SAMPLED) for i in range(12)]
    engine = make_engine(tiny_model_dir, num_gpu_blocks=64, max_batch_size=12)
    together = run(engine, requests)
    alone = [run(engine, [one])[one.request_id] for one in requests]
    assert [together[one.request_id].token_ids for one in alone] == [one.token_ids for one in alone]
    tokenizer = Tokenizer(tiny_model_dir)
    for i, one in enumerate(alone):
        if i % 2 and one.finish_reason == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(one.token_ids)), PAIR["json_schema"]["schema"])


def test_the_same_language_on_both_ways_gives_the_same_answers(tiny_model_dir) -> None:
    """A schema and its twin that only the host can follow: the masks are equal, so the same seeds say the same."""
    assert automaton_of(request(0, PAIR).config.response_format) is not None
    assert automaton_of(request(0, IRREGULAR).config.response_format) is None
    engine = make_engine(tiny_model_dir, num_gpu_blocks=64, max_batch_size=8)
    ours, theirs = (run(engine, [request(i, one, **SAMPLED) for i in range(8)]) for one in (PAIR, IRREGULAR))
    assert {name: one.token_ids for name, one in ours.items()} == {name: one.token_ids for name, one in theirs.items()}
    assert {one.stop_detail for one in ours.values()} == {one.stop_detail for one in theirs.values()}


def test_a_callers_own_stop_token_ends_it_where_the_form_may_end_or_writes_it(tiny_model_dir) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    (letter,) = tokenizer.encode_raw("b")
    (other,) = tokenizer.encode_raw("Z")
    fields = {**SAMPLED, "logit_bias": {letter: 30.0, other: 30.0}}
    engine = make_engine(tiny_model_dir, num_gpu_blocks=64, max_batch_size=8)
    for wanted in ("b{4}a", "(b{4}a|b{2}[^a]{3}a)"):
        plain = request(0, {"type": "regex", "regex": wanted}, **fields)
        word = TokenRequest(**{**_fields(plain), "stop_ids": (letter, other)})
        (output,) = run(engine, [word]).values()
        # It is a letter of the form: the form writes it, and the answer ends by it, as the caller wants.
        assert (output.stop_detail, output.token_ids) == (f"stop_token:{letter}", ())
    late = request(1, {"type": "regex", "regex": "b*"}, **{**fields, "min_new_tokens": 3})
    (output,) = run(engine, [TokenRequest(**{**_fields(late), "stop_ids": (other,)})]).values()
    assert len(output.token_ids) >= 3


def _fields(one: TokenRequest) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}
