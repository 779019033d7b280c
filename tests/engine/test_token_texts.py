"""What tokens stand for that log-probabilities name: texts, parts of characters, special tokens, and what nobody knows."""

from __future__ import annotations

import codecs
import json
import queue
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.frontend import Frontend
from engine.grammar import Grammars
from engine.model_info import ModelInfo
from engine.preparation import Preparer, TokenIds
from engine.templates import choose_template
from engine.token_texts import TokenTexts
from engine.tokenizer import Tokenizer
from headrace.batch import CHAT, TEXT, OutputRow
from headrace.batch_output import line
from headrace.completion import Completion, TokenLogprobs
from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.schemas import read_completion, to_wire
from headrace.store import Store


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def texts(tiny_model_dir: Path, tokenizer: Tokenizer) -> TokenTexts:
    texts = TokenTexts.read(tokenizer, Grammars(tokenizer, ModelInfo.read(tiny_model_dir)))
    assert texts is not None
    return texts


def named(*tokens: int, top: tuple[int, ...] = ()) -> TokenLogprobs:
    return TokenLogprobs(token_id=tokens[0], logprob=-1.0, top=tuple((token, -2.0) for token in top))


def test_each_token_is_told_once_as_text_or_as_the_bytes_of_a_part(texts: TokenTexts, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_raw("a wheel 🙂ß")
    told = texts.named_by([named(token, top=ids) for token in ids])
    assert set(told) == set(ids)
    joined = b"".join(text.encode() if isinstance(text, str) else bytes(text) for text in map(told.__getitem__, ids))
    assert joined.decode() == "a wheel 🙂ß"
    parts = [told[token] for token in tokenizer.encode_raw("ß")]
    assert parts == [(0xC3,), (0x9F,)], "this tokenizer never saw the letter"
    assert texts.named_by([named(tokenizer.encode_raw("é")[0])]) == {tokenizer.encode_raw("é")[0]: "é"}


def test_special_tokens_have_their_names_and_padding_of_the_vocabulary_none(texts: TokenTexts, tokenizer: Tokenizer) -> None:
    assert texts.named_by([named(2, top=(0, tokenizer.vocab_size))]) == {2: "<|im_end|>", 0: "<|endoftext|>"}


def test_a_tokenizer_that_tells_no_bytes_leaves_the_ids(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    tokenizer.hf = object()
    assert TokenTexts.read(tokenizer, Grammars(tokenizer, ModelInfo.read(tiny_model_dir))) is None


def test_texts_are_read_only_where_somebody_asks(tiny_model_dir: Path, tokenizer: Tokenizer) -> None:
    template = choose_template(tokenizer, config=None, model_name=None, engine_model_name=None)
    preparer = Preparer(tokenizer, template, ModelInfo.read(tiny_model_dir), 100)

    def prepare(prompt: object, **config: int) -> TokenTexts | None:
        return preparer.prepare(
            prompt, GenerationConfig(**config), handle=1, do_preprocess=False, is_streamed=False, seed_key=None
        ).texts  # fmt: skip

    assert prepare("a") is None
    assert prepare(TokenIds((5, 6)), prompt_logprobs=0) is None, "perplexity looks at numbers alone"
    assert prepare("a", logprobs=0) is prepare("a", prompt_logprobs=0) is not None


@pytest.fixture(scope="module")
def answered(tiny_model_dir: Path) -> Completion:
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    config = GenerationConfig(
        max_new_tokens=40, n=2, top_k=0, temperature=2.0, random_seed=3, logprobs=4, prompt_logprobs=1, ignore_eos=True
    )
    frontend = Frontend(str(tiny_model_dir), backend_config=PytorchEngineConfig(device="cpu", num_gpu_blocks=64))
    try:
        frontend.submit("naïve 🙂", config, done.put)
        return done.get(timeout=60)
    finally:
        frontend.close()


def test_a_completion_tells_every_token_that_it_names(answered: Completion, tokenizer: Tokenizer) -> None:
    assert answered.prompt_logprobs is not None
    rows = [*answered.prompt_logprobs, *(row for choice in answered.choices for row in choice.logprobs or ())]
    ids = {token for row in rows for token in (row.token_id, *dict(row.top))}
    assert answered.token_texts is not None
    assert set(answered.token_texts) == {token for token in ids if token < tokenizer.vocab_size}
    assert any(isinstance(text, tuple) for text in answered.token_texts.values())
    assert Completion.from_dict(answered.to_dict()) == answered
    assert read_completion(to_wire(answered)) == answered


@pytest.mark.parametrize("endpoint", [CHAT, TEXT])
def test_the_lines_of_an_output_file_spell_the_answer(
    answered: Completion, tokenizer: Tokenizer, endpoint: str, tmp_path: Path
) -> None:
    with Store(f"sqlite:///{tmp_path}/s.db", create=True) as store:
        batch = store.create_batch(["naïve 🙂"], GenerationConfig(), model="m", endpoint=endpoint)
        (ref,) = store.next_chunks(model="m", limit=1, grace_s=0)
        claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
        assert claim is not None
        store.record(claim, [answered])
        assert store.results(batch.id) == [answered]
        (row,) = store.output_rows(batch.id, "output", after=-1, limit=9)
    body = json.loads(line(row, batch_id=batch.id, model="m", endpoint=endpoint))["response"]["body"]
    for choice, shown in zip(answered.choices, body["choices"], strict=True):
        logprobs = shown["logprobs"]
        if endpoint == TEXT:
            openai.types.Completion.model_validate(body, strict=True)
            spelled = b"".join(map(spell, logprobs["tokens"]))
            assert_offsets(logprobs["text_offset"], logprobs["tokens"], choice.text)
            assert [max(top.values()) for top in logprobs["top_logprobs"]] == [row.top[0][1] for row in choice.logprobs or ()]
        else:
            openai.types.chat.ChatCompletion.model_validate(body, strict=True)
            for entry in logprobs["content"]:
                assert all(other["bytes"] or other["token"].startswith("token_id:") for other in entry["top_logprobs"])
            spelled = b"".join(bytes(entry["bytes"]) for entry in logprobs["content"])
        special = tokenizer.skipped_ids & set(choice.token_ids)
        assert special or spelled.decode(errors="replace") == choice.text
        assert spelled.decode(errors="replace") == tokenizer.decode(choice.token_ids, skip_special_tokens=False)


def assert_offsets(offsets: list[int], tokens: list[str], text: str) -> None:
    """As many characters lie before a token as those before it have begun and ended."""
    before = [b"".join(map(spell, tokens[:number])) for number in range(len(tokens) + 1)]
    if not before[-1].decode(errors="replace").startswith(text):
        assert offsets == []
        return
    decoded = [codecs.getincrementaldecoder("utf-8")("replace").decode(data) for data in before[:-1]]
    assert offsets == [len(done) for done in decoded]
    whole = [number for number, token in enumerate(tokens) if not token.startswith("bytes:") and is_text(before[number])]
    assert whole
    assert all(text[offsets[number] :].startswith(tokens[number]) for number in whole)


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("texts", "text", "offsets"),
    [
        ({"1": "na", "2": [0xC3], "3": [0xAF], "4": "ve"}, "naïve", [0, 2, 2, 3]),
        ({"1": "na", "2": [0xC3], "3": [0xAF], "4": "ve"}, "naï", [0, 2, 2, 3]),  # a stop word cut the rest off
        ({"1": " na", "2": [0xC3], "3": [0xAF], "4": "ve"}, "naïve", []),
        ({"1": "na", "2": [0xC3], "4": "ve"}, "naïve", []),
    ],
)
def test_where_tokens_begin(texts: dict[str, Any], text: str, offsets: list[int]) -> None:
    rows = [{"token_id": token, "logprob": -1.0, "top": []} for token in (1, 2, 3, 4)]
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": rows, "token_ids": [1, 2, 3, 4]}
    row = OutputRow(
        position=0, custom_id="a", recorded_at=1.0, error_code=None, prompt_tokens=1, completion_tokens=4, cached_tokens=0,
        body=json.dumps({"choices": [choice], "error": None, "token_texts": texts}),
    )  # fmt: skip
    body = json.loads(line(row, batch_id="batch_1", model="m", endpoint=TEXT))["response"]["body"]
    assert body["choices"][0]["logprobs"]["text_offset"] == offsets


def spell(token: str) -> bytes:
    return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
