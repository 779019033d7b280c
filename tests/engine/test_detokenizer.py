"""Streaming text is the one-shot text cut into pieces; stop words are found wherever tokens cut them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answers import ChoiceBuilder
from engine.detokenizer import IncrementalDetokenizer, StopWords
from engine.preparation import Stops
from engine.request import TokenOutput
from engine.tokenizer import Tokenizer
from headrace.completion import TokenLogprobs
from headrace.config import GenerationConfig


def save_sentencepiece(path: Path) -> Path:
    """Save a llama-like tokenizer: ▁ for spaces, byte fallback, the leading space stripped when decoding."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "mill", "▁mill", "é", "x", "▁▁"]
    backend = Backend(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def byte_level(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_a_skipped_token_does_not_end_a_run_of_bytes(sentencepiece: Tokenizer) -> None:
    ids = [3, 0, 131]
    assert "".join(stream(sentencepiece, ids, skip=True)) == sentencepiece.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_are_the_one_shot_text(byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, skip: bool) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_real_text_comes_back(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = list(tokenizer.encode_chat(text))
        assert "".join(stream(tokenizer, ids, skip=False)) == tokenizer.decode(ids, skip_special_tokens=False)
    assert byte_level.decode(byte_level.encode_chat(text), skip_special_tokens=False) == text


def test_whole_characters_only(byte_level: Tokenizer) -> None:
    ids = list(byte_level.encode_chat("水車🙂"))
    pieces = stream(byte_level, ids, skip=True)
    assert "".join(pieces) == "水車🙂"
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream(byte_level, ids[:-1], skip=True)[-1].endswith("\ufffd")  # cut in the middle: flushed, not lost


def test_long_babble_of_broken_bytes_is_not_quadratic(byte_level: Tokenizer) -> None:
    calls = 0

    class Counting:
        byte_ids = byte_level.byte_ids
        skipped_ids = byte_level.skipped_ids

        def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
            nonlocal calls
            calls += len(ids)
            return byte_level.decode(ids, skip_special_tokens=skip_special_tokens)

    broken = next(token for token in range(byte_level.vocab_size) if byte_level.decode([token]) == "\ufffd")
    detokenizer = IncrementalDetokenizer(Counting())
    pieces = [detokenizer.push(broken) for _ in range(2000)]
    assert "".join(pieces) + detokenizer.flush() == "\ufffd" * 2000
    assert calls < 2000 * 2000 / 16


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    words=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    include=st.booleans(),
)
def test_stop_words_across_pieces(text: str, words: list[str], cuts: list[int], include: bool) -> None:
    matcher, shown, found, rest = StopWords(words, include=include), "", None, text
    fed = ""
    while rest and found is None:
        size = cuts.pop() if cuts else 1
        fed, piece, rest = fed + rest[:size], rest[:size], rest[size:]
        new, found = matcher.push(piece)
        shown += new
    if found is None:
        assert shown + matcher.flush() == text
        assert not any(word in text for word in words)
        return
    # The first piece that completes a stop word ends it, at that text's earliest stop word.
    start = min(fed.find(word) for word in words if word in fed)
    assert shown == fed[: start + len(found) if include else start]


def test_nothing_of_a_stop_word_is_shown_before_it_is_whole() -> None:
    matcher = StopWords(["</answer>"])
    assert [matcher.push(piece).text for piece in ("42<", "/ans", "wer", ">", "x")][:4] == ["42", "", "", ""]
    matcher = StopWords(["</answer>"])
    assert [matcher.push(piece).text for piece in ("42<", "/ans", "!")] == ["42", "", "</ans!"]


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=10),
    words=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=3),
    early=st.integers(0, 10),
)
def test_a_stop_word_that_is_complete_early_ends_nothing(pieces: list[str], words: list[str], early: int) -> None:
    matcher, shown, found, fed = StopWords(words), "", None, ""
    for number, piece in enumerate(pieces):
        new, found = matcher.push(piece, is_early=number < early)
        shown, fed = shown + new, fed + piece
        if found is not None:
            break
    passed = len("".join(pieces[:early]))
    starts = [
        start for word in words for start in range(len(fed)) if fed.startswith(word, start) and start + len(word) > passed
    ]
    assert (found is not None) == bool(starts)
    assert shown + matcher.flush() == (fed[: min(starts)] if starts else fed)


def output(*tokens: int, finish: str | None = None, detail: str | None = None, logprobs: bool = False) -> TokenOutput:
    rows = tuple(TokenLogprobs(token_id=token, logprob=-1.0) for token in tokens) if logprobs else None
    return TokenOutput(request_id="1-0", token_ids=tokens, finish_reason=finish, stop_detail=detail, logprobs=rows)  # type: ignore[arg-type]


def builder(
    tokenizer: Tokenizer,
    *,
    words: tuple[str, ...] = (),
    names: dict[int, str] | None = None,
    streamed: bool = False,
    **config: object,
) -> ChoiceBuilder:
    stops = Stops(words, (2,), (), names or {})
    return ChoiceBuilder(0, tokenizer, GenerationConfig(**config), stops, is_streamed=streamed)  # type: ignore[arg-type]


def test_choice_ends_at_the_token_that_completes_the_stop_word(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat("the mill wheel turns")
    choice = builder(byte_level, words=("eel",), logprobs=0)
    for token in ids:
        piece = choice.push(output(token, logprobs=True))
        if choice.result:
            break
    assert choice.result is not None
    assert choice.result.text == "the mill wh"
    assert "eel" in byte_level.decode(choice.result.token_ids)
    assert "eel" not in byte_level.decode(choice.result.token_ids[:-1])
    assert choice.result.stop_detail == "stop_word:eel"
    assert choice.result.finish_reason == "stop"
    assert choice.result.logprobs is not None
    assert len(choice.result.logprobs) == len(choice.result.token_ids)
    assert piece.token_ids == choice.result.token_ids[-1:]


def test_stop_word_that_is_a_special_token_is_named_by_its_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat("water")
    for include, text in ((False, "water"), (True, "water<|endoftext|>")):
        choice = builder(byte_level, names={0: "<|endoftext|>"}, include_stop_str_in_output=include)
        choice.push(output(*ids, finish="stop", detail="stop_token:0"))
        assert choice.result is not None
        assert (choice.result.text, choice.result.stop_detail) == (text, "stop_word:<|endoftext|>")


def test_restart_streams_nothing_twice(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat("the mill wheel turns")
    choice = builder(byte_level, streamed=True)
    text = choice.push(output(*ids[:2])).text
    choice.restart()
    text += choice.push(output(*ids[:1])).text
    text += choice.push(output(*ids[1:], finish="length", detail="max_new_tokens")).text
    assert choice.result is not None
    assert text == choice.result.text == "the mill wheel turns"
    assert choice.result.token_ids == ids
