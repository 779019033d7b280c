"""Point 12: stop words over token boundaries and inside characters; the text is the ids' text, trimmed; deltas add up to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.answers import ChoiceBuilder
from engine.async_engine import AsyncEngine
from engine.preparation import Stops
from engine.request import TokenOutput
from engine.tokenizer import Tokenizer
from headrace import GenerationConfig

TEXT = "naïve: the 水車🙂 turns while 水 runs"


def one_token_a_byte(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The longest way to write a text: every character that isn't ASCII is cut into tokens of one byte."""
    pieces = tokenizer.hf.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ids = tuple(tokenizer.hf.convert_tokens_to_ids(letter) for piece, _ in pieces for letter in piece)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    return ids


def build(tokenizer: Tokenizer, ids: Sequence[int], words: tuple[str, ...], *, include: bool) -> tuple[Any, str]:
    """Push one token at a time; give the choice and what was streamed of it."""
    config = GenerationConfig(stop_words=words, include_stop_str_in_output=include)
    builder = ChoiceBuilder(0, tokenizer, config, Stops(words, (), (), {}), is_streamed=True)
    streamed = ""
    for number, token in enumerate(ids):
        last = number == len(ids) - 1
        reason, detail = ("length", "max_new_tokens") if last else (None, None)
        output = TokenOutput(request_id="r", token_ids=(token,), finish_reason=reason, stop_detail=detail)  # type: ignore[arg-type]
        streamed += builder.push(output).text
        if builder.result is not None:
            break
    return builder.result, streamed


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("word", ["车", "車🙂 t", "the 水", "ïve:", "runs", "🙂", "n"])
def test_a_word_that_ends_anywhere(tokenizer: Tokenizer, word: str, include: bool) -> None:
    ids = one_token_a_byte(tokenizer, TEXT)
    choice, streamed = build(tokenizer, ids, (word,), include=include)
    at = TEXT.find(word)
    expected = TEXT if at < 0 else TEXT[: at + (len(word) if include else 0)]
    assert choice.text == streamed == expected
    assert choice.stop_detail == ("max_new_tokens" if at < 0 else f"stop_word:{word}")
    assert tokenizer.decode(choice.token_ids).startswith(expected)
    assert choice.token_ids == ids[: len(choice.token_ids)]


def test_a_character_that_is_cut_comes_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = one_token_a_byte(tokenizer, "water 🙂")
    cut = len(ids) - 2
    choice, streamed = build(tokenizer, ids[:cut], (), include=False)
    assert choice.text == streamed == tokenizer.decode(ids[:cut])
    assert choice.text.endswith("\ufffd")


def forced(text: str, **config: Any) -> GenerationConfig:
    """Make the model write a text, in tokens of its own choice."""
    free = {"max_new_tokens": 60, "top_k": 0, "temperature": 1.0, "random_seed": 1}
    return GenerationConfig(**free, response_format={"type": "regex", "regex": text}, **config)  # type: ignore[arg-type]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("word", ["<|endoftext|>", "<|im_end|>"])
def test_a_special_token_that_is_spelled_in_others(pipe: AsyncEngine, word: str, include: bool) -> None:
    spelled = "the mill" + word.replace("|", r"\|") + "wheel"
    config = forced(spelled, stop_words=[word], include_stop_str_in_output=include)
    answer: Any = pipe("water", config)
    assert (answer.text, answer.stop_detail) == ("the mill" + (word if include else ""), f"stop_word:{word}")
    assert "".join(piece.text for piece in pipe.stream_infer("water", config)) == answer.text


def test_min_new_tokens_counts_for_stop_words_too(pipe: AsyncEngine) -> None:
    first: Any = pipe("water", forced("abcabcabc", stop_words=["bc"]))
    assert (first.text, first.stop_detail) == ("a", "stop_word:bc")
    for least in range(1, 10):
        answer: Any = pipe("water", forced("abcabcabc", stop_words=["bc"], min_new_tokens=least))
        assert answer.stop_detail == "stop_word:bc"
        assert least <= len(answer.token_ids) <= least + 3
        assert answer.text + "bc" == pipe.frontend.tokenizer.decode(answer.token_ids)
    none: Any = pipe("water", forced("abcabcabc", stop_words=["bc"], min_new_tokens=10))
    assert (none.text, none.stop_detail) == ("abcabcabc", "response_format")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("word", "token"), [("<|endoftext|>", 0), ("<|im_end|>", 2)])
def test_a_stop_word_that_is_an_end_token_is_the_callers_word(pipe: AsyncEngine, word: str, token: int, include: bool) -> None:
    """The model's own end token is no exception where the caller names it."""
    wish: dict[str, Any] = {"logit_bias": {token: 100}, "include_stop_str_in_output": include}
    config = GenerationConfig(stop_words=[word], **wish)
    answer: Any = pipe("water", config)
    assert (answer.finish_reason, answer.text, answer.token_ids) == ("stop", word if include else "", ())
    assert answer.stop_detail == f"stop_word:{word}"
    assert "".join(piece.text for piece in pipe.stream_infer("water", config)) == answer.text
    by_id: Any = pipe("water", GenerationConfig(stop_token_ids=[token], **wish))
    assert (by_id.finish_reason, by_id.text, by_id.stop_detail) == ("stop", "", f"stop_token:{token}")


def test_in_the_engine(pipe: AsyncEngine) -> None:
    free: Any = pipe("water", GenerationConfig(max_new_tokens=60, ignore_eos=True))
    assert free.text == pipe.frontend.tokenizer.decode(free.token_ids)
    word = next(free.text[i : i + 5] for i in range(8, 60) if "\ufffd" not in free.text[i : i + 5])
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True, stop_words=[word])
    cut: Any = pipe("water", config)
    assert (cut.text, cut.stop_detail) == (free.text[: free.text.find(word)], f"stop_word:{word}")
    assert "".join(piece.text for piece in pipe.stream_infer("water", config)) == cut.text
