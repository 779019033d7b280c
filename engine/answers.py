"""From token outputs to a `Completion`: one builder for each choice, one item for each prompt.

This module doesn't know processes, windows or retries' reasons; it is only touched on the supervisor's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from engine.detokenizer import Decoder, IncrementalDetokenizer, StopWords
from engine.preparation import Prepared, Preparer, Stops, TokenIds
from engine.request import TokenOutput, TokenRequest
from engine.token_texts import TokenTexts
from headrace.completion import Choice, Completion, CompletionError, FinishReason, TokenLogprobs, TokenText, TokenUsage
from headrace.config import GenerationConfig
from headrace.response import Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one streamed choice. The texts of all deltas of a choice concatenate to its final text."""

    handle: int
    index: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_detail: str | None
    prompt_tokens: int
    completion_tokens: int
    """Of this choice, so far."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """In the first piece of choice 0."""


def piece_of(delta: Delta) -> Response:
    """Return what a stream's reader gets."""
    return Response(
        text=delta.text,
        generate_token_len=delta.completion_tokens,
        finish_reason=delta.finish_reason,
        index=delta.index,
        session_id=delta.index,
        input_token_len=delta.prompt_tokens,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        prompt_logprobs=delta.prompt_logprobs,
        stop_detail=delta.stop_detail,
        choice=delta.choice,
    )


class Piece(NamedTuple):
    """What one token output added to a choice."""

    text: str
    """'' where the text is only decoded at the end of the choice."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None


class ChoiceBuilder:
    """Collects one choice's tokens and text."""

    def __init__(self, index: int, decoder: Decoder, config: GenerationConfig, stops: Stops, *, is_streamed: bool) -> None:
        """Start with no tokens. Text is decoded as it comes only where someone reads it: a stream, or stop words."""
        self.index = index
        self._decoder = decoder
        self._config = config
        self._stops = stops
        self._is_streamed = is_streamed
        self.result: Choice | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._text: list[str] = []
        self._skip = 0
        self._matcher = StopWords(self._stops.words, include=self._config.include_stop_str_in_output)
        watches = self._is_streamed or bool(self._stops.words)
        skip = self._config.skip_special_tokens
        self._detokenizer = IncrementalDetokenizer(self._decoder, skip_special_tokens=skip) if watches else None

    def restart(self) -> None:
        """Another engine computes this choice from its start. Text that was streamed already isn't streamed again."""
        if self._is_streamed:
            self._skip = len(self._ids)
        else:
            self._reset()

    def push(self, output: TokenOutput) -> Piece:
        """Take news; return what of it is new. `result` is set when the choice is finished."""
        scores = None
        if self.prompt_logprobs is None:  # else they came from an engine that died
            scores = self.prompt_logprobs = output.prompt_logprobs
        skipped = min(self._skip, len(output.token_ids))
        self._skip -= skipped
        first, position = len(self._text), skipped
        while position < len(output.token_ids) and self.result is None:
            self._ids.append(output.token_ids[position])
            if output.logprobs is not None:
                self._logprobs.append(output.logprobs[position])
            if self._detokenizer is not None:
                self._show(self._detokenizer.push(self._ids[-1]))
            position += 1
        if output.finish_reason is not None and self.result is None:
            self._finish(output.finish_reason, output.stop_detail)
        logprobs = None if output.logprobs is None else output.logprobs[skipped:position]
        return Piece("".join(self._text[first:]), output.token_ids[skipped:position], logprobs, scores)

    def _show(self, text: str) -> bool:
        """Pass text through the stop words; True when one of them ended the choice."""
        shown, word = self._matcher.push(text, is_early=len(self._ids) < self._config.min_new_tokens)
        self._text.append(shown)
        if word is not None:
            self._settle("stop", f"stop_word:{word}")
        return word is not None

    def _finish(self, reason: FinishReason, detail: str | None) -> None:
        word = self._stop_token_word(detail)
        if self._detokenizer is None:
            self._text.append(self._decoder.decode(self._ids, skip_special_tokens=self._config.skip_special_tokens))
        elif self._show(self._detokenizer.flush()):
            return
        self._text.append(self._matcher.flush())
        if word is not None:
            self._text.append(word if self._config.include_stop_str_in_output else "")
            detail = f"stop_word:{word}"
        self._settle(reason, detail)

    def _stop_token_word(self, detail: str | None) -> str | None:
        """Return the stop word that the caller wrote for the stop token that the engine names."""
        if detail is None or not detail.startswith("stop_token:"):
            return None
        return self._stops.names.get(int(detail.removeprefix("stop_token:")))

    def _settle(self, reason: FinishReason, detail: str | None) -> None:
        self.result = Choice(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self._ids),
            finish_reason=reason,
            stop_detail=detail,
            logprobs=tuple(self._logprobs) if self._config.logprobs is not None else None,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens collected so far."""
        return len(self._ids)


@dataclass(slots=True, eq=False)
class Item:
    """One prompt on its way."""

    handle: int
    index: int
    requests: tuple[TokenRequest, ...]
    builders: tuple[ChoiceBuilder, ...]
    on_done: Callable[[Completion], None]
    on_delta: Callable[[Delta], None] | None
    texts: TokenTexts | None
    submitted_at: float = 0.0
    # Filled by the frontend while the item is in an engine.
    deaths: int = 0
    starts: int = 0
    is_done: bool = False
    sent_at: float = 0.0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    run_ms: float = 0.0

    @property
    def size(self) -> int:
        """Requests that the item still needs."""
        return sum(builder.result is None for builder in self.builders)

    @property
    def has_begun(self) -> bool:
        """Whether every choice has its first token."""
        return all(builder.result is not None or builder.num_tokens > 0 for builder in self.builders)

    def start_over(self, *, is_death: bool) -> None:
        """Go back to the start: the engine died, or took the item out. Under new names, because news of the old ones may be under way."""
        self.deaths += is_death
        self.starts += 1
        self.requests = tuple(
            replace(
                request,
                request_id=f"{self.handle}-{request.choice}.{self.starts}",
                family=request.family and f"{self.handle}.{self.starts}",
            )
            for request in self.requests
        )
        for builder in self.builders:
            if builder.result is None:
                builder.restart()

    def delta(self, builder: ChoiceBuilder, piece: Piece) -> Delta:
        """Return the news of one choice."""
        result = builder.result
        return Delta(
            handle=self.handle,
            index=self.index,
            choice=builder.index,
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            prompt_logprobs=piece.prompt_logprobs,
            finish_reason=result.finish_reason if result else None,
            stop_detail=result.stop_detail if result else None,
            prompt_tokens=len(self.requests[0].prompt_ids),
            completion_tokens=builder.num_tokens,
        )

    def note(self, output: TokenOutput, choice: int) -> None:
        """Keep what a finished request says about time and cache."""
        if choice == 0:  # the other choices found what this one computed
            self.cached_tokens = output.cached_tokens
        self.queue_ms = max(self.queue_ms, output.queue_ms + 1e3 * (self.sent_at - self.submitted_at))
        self.run_ms = max(self.run_ms, output.run_ms)

    def completion(self, error: CompletionError | None = None) -> Completion:
        """Return the answer: all choices, or the error."""
        tokens = sum(builder.num_tokens for builder in self.builders)
        usage = TokenUsage(
            prompt_tokens=len(self.requests[0].prompt_ids), cached_tokens=self.cached_tokens, completion_tokens=tokens
        )
        choices = tuple(builder.result for builder in self.builders if builder.result is not None)
        return Completion(
            index=self.index,
            choices=() if error else choices,
            usage=usage,
            prompt_logprobs=None if error else self.builders[0].prompt_logprobs,
            token_texts=None if error else self._token_texts(choices),
            error=error,
            queue_ms=round(self.queue_ms, 3),
            run_ms=round(self.run_ms, 3),
            attempts=self.deaths + 1,
        )

    def _token_texts(self, choices: Iterable[Choice]) -> dict[int, TokenText] | None:
        """Say what the named tokens stand for, for all choices together: they name mostly the same ones."""
        if self.texts is None:
            return None
        of_choices = (choice.logprobs or () for choice in choices)
        return self.texts.named_by(chain(self.builders[0].prompt_logprobs or (), *of_choices))


def make_item(
    preparer: Preparer,
    prepared: Prepared,
    config: GenerationConfig,
    *,
    handle: int,
    index: int,
    on_done: Callable[[Completion], None],
    on_delta: Callable[[Delta], None] | None,
) -> Item:
    """Return a prompt with a builder for each choice that `config` asks for."""
    builders = tuple(
        ChoiceBuilder(choice, preparer.tokenizer, config, prepared.stops, is_streamed=on_delta is not None)
        for choice in range(config.n)
    )
    return Item(handle, index, prepared.requests, builders, on_done, on_delta, prepared.texts, submitted_at=time.monotonic())


def simplest_item(preparer: Preparer, handle: int) -> Item:
    """Return an item that every engine can do, and that nobody waits for: one token after another one."""
    config = GenerationConfig(max_new_tokens=1, ignore_eos=True)
    prepared = preparer.prepare(TokenIds((0,)), config, handle=handle, do_preprocess=False, is_streamed=False, seed_key=None)
    return make_item(preparer, prepared, config, handle=handle, index=0, on_done=lambda _: None, on_delta=None)
