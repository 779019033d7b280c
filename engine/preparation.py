"""A prompt and its `GenerationConfig` to token requests: everything that can be wrong with a prompt is found here.

What passes here can't hurt the engine: ids are in the vocabulary, lengths fit the session. This module doesn't know processes.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

from engine.grammar import Grammars
from engine.model_info import ModelInfo
from engine.models.spec import RopeSpec
from engine.request import LimitName, TokenRequest
from engine.templates import ChatTemplate, parse_messages
from engine.token_texts import TokenTexts
from engine.tokenizer import Tokenizer
from headrace.config import GenerationConfig
from headrace.errors import ContextLengthExceeded, InvalidRequest

_Words = tuple[str, ...]
_Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that is tokens already, and of which only its own log-probabilities are wanted.

    It may fill the session to the last token: the one that is chosen behind it is thrown away.
    """

    ids: tuple[int, ...]


class Stops(NamedTuple):
    """What ends one prompt's answers."""

    words: tuple[str, ...]
    """To be found in the text."""
    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    names: Mapping[int, str]
    """Ids of `stop_ids` that the caller gave as a stop word."""


class Prepared(NamedTuple):
    """One prompt, ready for the engine."""

    requests: tuple[TokenRequest, ...]
    """One for each choice."""
    stops: Stops
    texts: TokenTexts | None
    """Where log-probabilities will name tokens, and there is somebody to read what these stand for."""


@dataclass(frozen=True, slots=True)
class Preparer:
    """Prepares prompts for one model."""

    tokenizer: Tokenizer
    template: ChatTemplate
    info: ModelInfo
    session_len: int
    rope: RopeSpec = field(default_factory=RopeSpec)
    _grammars: Grammars = field(init=False)
    _bad_sequences: Callable[[_Words, _Ids], tuple[_Ids, ...]] = field(init=False)
    _texts: Callable[[], TokenTexts | None] = field(init=False)

    def __post_init__(self) -> None:
        """Make room for the response formats, bad words and tokens' texts that will be asked for."""
        object.__setattr__(self, "_grammars", Grammars(self.tokenizer, self.info))
        # A cache of its own: one of the module's would keep the tokenizers of engines that are closed.
        object.__setattr__(self, "_bad_sequences", lru_cache(maxsize=256)(partial(_bad_sequences, self.tokenizer)))
        object.__setattr__(self, "_texts", lru_cache(maxsize=1)(partial(TokenTexts.read, self.tokenizer, self._grammars)))

    def prepare(
        self,
        prompt: object,
        config: GenerationConfig,
        *,
        handle: int,
        do_preprocess: bool,
        is_streamed: bool,
        seed_key: str | None,
        index: int = 0,
    ) -> Prepared:
        """Return the requests; raise `InvalidRequest` or `ContextLengthExceeded` saying what is wrong with the prompt.

        With a `seed_key` it is an item of a job, at `index`: see `_seed`.
        """
        ids = self._encode(prompt, do_preprocess=do_preprocess)
        room = self.session_len - len(ids) + isinstance(prompt, TokenIds)
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens and the session length is {self.session_len}; shorten it or raise session_len",
                param="prompt",
            )
        self._check_ids(ids, config)
        if config.response_format is not None:
            self._grammars.check(config.response_format)
        wanted = config.max_new_tokens
        limit: LimitName = "session_len" if wanted is None or wanted > room else "max_new_tokens"
        stops = self._stops(config, do_preprocess=do_preprocess)
        bad_sequences = self._bad_sequences(config.bad_words, config.bad_token_ids)
        _check_something_is_left(bad_sequences, config, stops, self.info.vocab_size)
        seed = _seed(config, seed_key, index)
        max_new_tokens = room if wanted is None else min(wanted, room)
        requests = tuple(
            TokenRequest(
                request_id=f"{handle}-{choice}",
                prompt_ids=ids,
                config=config,
                seed=seed,
                choice=choice,
                max_new_tokens=max_new_tokens,
                limit=limit,
                eos_ids=stops.eos_ids,
                stop_ids=stops.stop_ids,
                bad_sequences=bad_sequences,
                stream=is_streamed or bool(stops.words),
                rope_stretch=self.rope.stretch(len(ids) + max_new_tokens - isinstance(prompt, TokenIds)),
                family=str(handle) if config.n > 1 else None,
            )
            for choice in range(config.n)
        )
        names_tokens = config.logprobs is not None or config.prompt_logprobs is not None
        return Prepared(requests, stops, self._texts() if names_tokens and not isinstance(prompt, TokenIds) else None)

    def _encode(self, prompt: object, *, do_preprocess: bool) -> tuple[int, ...]:
        try:
            if isinstance(prompt, TokenIds):
                return prompt.ids
            if isinstance(prompt, str):
                if not prompt:
                    raise InvalidRequest("the prompt is empty; write something in it", param="prompt")
                ids = self.template.encode(prompt) if do_preprocess else self.tokenizer.encode_raw(prompt)
            elif not isinstance(prompt, list | tuple):
                raise InvalidRequest(f"a prompt is a text or a list of messages, not {type(prompt).__name__}", param="prompt")
            elif not do_preprocess:
                raise InvalidRequest(
                    "messages need the chat template; with do_preprocess=False send a text", param="do_preprocess"
                )
            else:
                ids = self.template.encode(parse_messages(prompt))
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the prompt is not valid Unicode text: {error}", param="prompt") from error
        if not ids:
            raise InvalidRequest("the prompt has no tokens; write something in it", param="prompt")
        return ids

    def _check_ids(self, ids: tuple[int, ...], config: GenerationConfig) -> None:
        """Refuse ids outside the model's vocabulary: on a GPU they would be an assertion that kills the process."""
        size = self.info.vocab_size
        if max(ids) >= size or min(ids) < 0:
            wrong = max(ids) if max(ids) >= size else min(ids)
            raise InvalidRequest(f"the prompt has id {wrong}, but the model's vocabulary has {size} tokens", param="prompt")
        named = {"stop_token_ids": config.stop_token_ids, "bad_token_ids": config.bad_token_ids}
        named["logit_bias"] = tuple(token for token, _ in config.logit_bias)
        for param, values in named.items():
            if values and max(values) >= size:
                raise InvalidRequest(f"{param} has {max(values)}, but the model's vocabulary has {size} tokens", param=param)

    def _stops(self, config: GenerationConfig, *, do_preprocess: bool) -> Stops:
        """Sort stop words into ids, where one is a special token, and words to look for in the text.

        The caller's special tokens are looked for as well, because a model may spell one in ordinary tokens. The template's are
        not: every chat would be decoded as it comes for a case that its models don't know.
        """
        of_template = self.template.stop_words if do_preprocess else ()
        special = {
            word: index for word in of_template + config.stop_words if (index := self.tokenizer.special_id(word)) is not None
        }
        eos = self.info.eos_ids + self.tokenizer.eos_ids + tuple(special[word] for word in of_template if word in special)
        names = {special[word]: word for word in config.stop_words if word in special}
        # ignore_eos asks for exactly max_new_tokens tokens, so what the template stops on is dropped; the caller's own words stay.
        # A response format knows its own end; what a template stops on may stand in the middle of a JSON text.
        only_own = config.ignore_eos or config.response_format is not None
        words = config.stop_words if only_own else config.stop_words + of_template
        return Stops(
            words=tuple(dict.fromkeys(word for word in words if word not in special or word in config.stop_words)),
            eos_ids=tuple(dict.fromkeys(eos)),
            stop_ids=tuple(dict.fromkeys((*config.stop_token_ids, *names))),
            names=names,
        )


def _seed(config: GenerationConfig, seed_key: str | None, index: int) -> int:
    """Choose the seed of a prompt; its choices draw apart by their number, which the sampler counts in.

    A call: the seed as given, the same for each of its prompts; drawn where none is given. An item of a job: made of the job's
    seed and the item's index, so that items differ and two jobs with one seed are equal; without a seed, of `seed_key`, which names
    batch and item, so that an item computed again repeats its text.
    """
    if seed_key is None:
        return secrets.randbits(64) if config.random_seed is None else config.random_seed
    name = seed_key if config.random_seed is None else f"{config.random_seed}:{index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _check_something_is_left(bad: tuple[_Ids, ...], config: GenerationConfig, stops: Stops, vocab_size: int) -> None:
    """Refuse bans that no token escapes: at the first draw they look like a model that computes NaNs."""
    # A response format gives way where nothing but an end can follow, so that it holds no end back.
    holds_ends_back = config.ignore_eos or (config.min_new_tokens > 0 and config.response_format is None)
    ends = (*stops.eos_ids, *stops.stop_ids) if holds_ends_back else ()
    if not bad or len(bad) + len(ends) < vocab_size:
        return
    banned = {ids[0] for ids in bad if len(ids) == 1}.union(ends)
    if banned.issuperset(range(vocab_size)):
        param = "bad_token_ids" if config.bad_token_ids else "bad_words"
        others = ", with the end tokens that ignore_eos or min_new_tokens holds back," if ends else ""
        raise InvalidRequest(
            f"{param}{others} leaves none of the model's {vocab_size} tokens to generate; take some out of it", param=param
        )


def _bad_sequences(tokenizer: Tokenizer, words: _Words, ids: _Ids) -> tuple[_Ids, ...]:
    """Return each word at the start of a text, after a space and inside a line, as the tokenizer writes it."""
    newline = tokenizer.encode_chat("\n")
    found: dict[tuple[int, ...], None] = {(index,): None for index in ids}
    for word in words:
        word_alone, behind_space, inside = (tokenizer.encode_chat(before + word) for before in ("", " ", "\n"))
        forms = [word_alone, behind_space]
        if inside[: len(newline)] == newline:
            forms.append(inside[len(newline) :])
        found |= {form: None for form in forms if form}
    return tuple(found)
