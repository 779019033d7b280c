"""What is wrong with a prompt is found before it reaches the engine; what is right is resolved."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from engine.model_info import ModelInfo
from engine.preparation import Prepared, Preparer, TokenIds
from engine.templates import choose_template
from engine.tokenizer import Tokenizer
from headrace.config import ChatTemplateConfig, GenerationConfig
from headrace.errors import ContextLengthExceeded, InvalidRequest


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def preparer(tiny_model_dir: Path, tokenizer: Tokenizer) -> Preparer:
    template = choose_template(
        tokenizer, config=ChatTemplateConfig("hf", stop_words=("<|endoftext|>", "END")), model_name=None, engine_model_name=None
    )
    return Preparer(tokenizer, template, ModelInfo.read(tiny_model_dir), 100)


def prepare(
    preparer: Preparer,
    prompt: Any = "water",
    *,
    do_preprocess: bool = True,
    key: str | None = None,
    index: int = 0,
    **config: Any,
) -> Prepared:
    return preparer.prepare(
        prompt, GenerationConfig(**config), handle=1, do_preprocess=do_preprocess, is_streamed=False, seed_key=key, index=index
    )


def test_lengths_are_resolved(preparer: Preparer) -> None:
    (request,) = prepare(preparer, max_new_tokens=5).requests
    length = len(request.prompt_ids)
    assert (request.max_new_tokens, request.limit) == (5, "max_new_tokens")
    (request,) = prepare(preparer, max_new_tokens=None).requests
    assert (request.max_new_tokens, request.limit) == (100 - length, "session_len")
    (request,) = prepare(preparer, max_new_tokens=100 - length).requests
    assert (request.max_new_tokens, request.limit) == (100 - length, "max_new_tokens")
    (request,) = prepare(preparer, max_new_tokens=101 - length).requests
    assert (request.max_new_tokens, request.limit) == (100 - length, "session_len")


def test_bans_that_no_token_escapes_are_refused_by_name(preparer: Preparer) -> None:
    size = preparer.info.vocab_size
    end = preparer.info.eos_ids[0]
    others = [token for token in range(size) if token != end]
    letters = [token for token in range(size) if preparer.tokenizer.decode([token]) != "e"]
    for config in (
        {"bad_token_ids": list(range(size))},
        {"bad_token_ids": letters, "bad_words": ["e"]},
        {"bad_token_ids": others, "ignore_eos": True},
        {"bad_token_ids": others, "min_new_tokens": 1},
    ):
        with pytest.raises(InvalidRequest, match=f"^bad_token_ids.* leaves none of the model's {size} tokens") as refused:
            prepare(preparer, do_preprocess=False, **config)
        assert refused.value.param == "bad_token_ids"
    format_ = {"type": "regex", "regex": "e"}
    for config in ({}, {"min_new_tokens": 1, "response_format": format_}):
        prepare(preparer, do_preprocess=False, bad_token_ids=others, **config)


def test_prompts_at_the_session_length(preparer: Preparer) -> None:
    assert prepare(preparer, "x" * 99, do_preprocess=False).requests[0].max_new_tokens == 1
    with pytest.raises(ContextLengthExceeded, match="100 tokens and the session length is 100"):
        prepare(preparer, "x" * 100, do_preprocess=False)


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"bad_token_ids": [10**6]}, "bad_token_ids"),
        ({"logit_bias": {10**6: 1}}, "logit_bias"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "min_new_tokens"),
    ],
)
def test_ids_out_of_the_vocabulary(preparer: Preparer, config: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(preparer, **config)
    assert caught.value.param == param


def test_tokenizer_with_more_tokens_than_the_model(preparer: Preparer) -> None:
    small = Preparer(preparer.tokenizer, preparer.template, ModelInfo(**{**_fields(preparer.info), "vocab_size": 50}), 100)
    with pytest.raises(InvalidRequest, match="vocabulary has 50 tokens"):
        prepare(small)


def _fields(info: ModelInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__}


def test_stops_are_sorted_into_ids_and_words(preparer: Preparer) -> None:
    stops = prepare(preparer, stop_words=["the end", "<|im_start|>"], stop_token_ids=[7]).stops
    # A special token of the caller's is looked for as well: a model may spell it in ordinary tokens.
    assert stops.words == ("the end", "<|im_start|>", "END")
    assert set(stops.eos_ids) == {0, 2}  # the template's <|endoftext|>, the model's <|im_end|>
    assert (stops.stop_ids, stops.names) == ((7, 1), {1: "<|im_start|>"})
    raw = prepare(preparer, do_preprocess=False, stop_words=["<|im_end|>"]).stops
    assert (raw.words, raw.eos_ids, raw.stop_ids, raw.names) == (("<|im_end|>",), (2,), (2,), {2: "<|im_end|>"})
    forever = prepare(preparer, ignore_eos=True, stop_words=["mine"]).stops
    assert forever.words == ("mine",)
    (request,) = prepare(preparer, do_preprocess=False).requests
    assert not request.stream


def test_bad_words_become_sequences(preparer: Preparer, tokenizer: Tokenizer) -> None:
    (request,) = prepare(preparer, bad_words=["mill"], bad_token_ids=[7]).requests
    assert {(7,), tokenizer.encode_chat("mill"), tokenizer.encode_chat(" mill")} == set(request.bad_sequences)


def test_half_a_surrogate_pair_is_said_to_be_no_text(preparer: Preparer) -> None:
    with pytest.raises(InvalidRequest, match="bad_words has a text that is not valid Unicode") as caught:
        prepare(preparer, bad_words=["mill", "\ud800"])
    assert caught.value.param == "bad_words"
    for prompt, do_preprocess in (("\ud800", True), ("\ud800", False), ([{"role": "user", "content": "\ud800"}], True)):
        with pytest.raises(InvalidRequest, match="the prompt is not valid Unicode text"):
            prepare(preparer, prompt, do_preprocess=do_preprocess)


def test_seeds(preparer: Preparer) -> None:
    def seed(**config: Any) -> int:
        (request,) = prepare(preparer, **config).requests
        return request.seed

    assert seed(random_seed=2**64 - 1) == 2**64 - 1
    assert seed(key="batch_1/7") == seed(key="batch_1/7") != seed(key="batch_1/8")
    # A call's seed is each prompt's; a job's is the job's and the item's, whatever id the batch got.
    assert seed(random_seed=3, index=7) == seed(random_seed=3, index=8) == 3
    assert seed(random_seed=3, key="batch_1/7", index=7) == seed(random_seed=3, key="batch_2/7", index=7)
    job = [seed(random_seed=value, key="batch_1/7", index=index) for value in (3, 4) for index in (7, 8)]
    assert len(set(job)) == 4
    assert seed() != seed()
    assert {(request.seed, request.choice) for request in prepare(preparer, n=3, random_seed=3).requests} == {
        (3, 0),
        (3, 1),
        (3, 2),
    }


def test_token_ids_are_taken_as_they_are_and_refused_outside_the_vocabulary(preparer: Preparer) -> None:
    assert prepare(preparer, TokenIds((5, 6, 7))).requests[0].prompt_ids == (5, 6, 7)
    for wrong in (-1, 10**6):
        with pytest.raises(InvalidRequest, match=f"id {wrong}, but the model's vocabulary"):
            prepare(preparer, TokenIds((5, wrong)))


def test_choices_are_one_family_with_one_seed(preparer: Preparer) -> None:
    requests = prepare(preparer, n=3).requests
    assert {(one.family, one.seed) for one in requests} == {("1", requests[0].seed)}
    assert [one.choice for one in requests] == [0, 1, 2]
    assert prepare(preparer, n=1).requests[0].family is None


def test_a_tokenizer_goes_with_its_preparer(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    kept = weakref.ref(tokenizer)
    template = choose_template(tokenizer, config=None, model_name=None, engine_model_name=None)
    preparer = Preparer(tokenizer, template, ModelInfo.read(tiny_model_dir), 100)
    prepare(preparer, bad_words=["water"])
    del tokenizer, template, preparer
    gc.collect()
    assert kept() is None
