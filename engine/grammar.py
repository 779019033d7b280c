"""Response formats compiled for one model's tokenizer, by llguidance, which is imported only when a request has one.

Lark grammars, GBNF (turned into Lark), regexes and JSON schemas become matchers; a matcher that has consumed nothing is kept
for each format and copied for each request. This module doesn't know requests, steps or masks.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.model_info import ModelInfo
from headrace.errors import HeadraceError, InvalidRequest, UnsupportedOption
from headrace.response_format import ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine.tokenizer import Tokenizer

_PARAM = "response_format"
_KEPT = 64
# One space or none, as in the automata of `engine.regular`: with any amount of white space allowed, a model that has lost its way
# writes line feeds until max_new_tokens.
_JSON_DEFAULTS: Any = {"whitespace_pattern": " "}
_SILENT = 0
_STACK = 16 << 20
_STACK_FOR_A_BYTE = 1 << 10
"""The library goes down into each definition that a format names and each bracket that it opens; up to 600 bytes of stack for a byte of
source were seen (of a nest of brackets). Where it has no more, that is no exception but the end of the process and all its prompts."""
_STARTING = threading.Lock()
_PATIENCE_S = 60.0
"""What nobody's prompt is worth more than: the library's time grows with the fourth power of a schema's patternProperties, 2 s for 300 and
minutes for 1000, and none of its limits ends it."""
_AT_ONCE = 4
"""Formats that are compiled at the same time: a slow one takes a core and some memory for seconds."""


class _Asked(NamedTuple):
    """A format that somebody asked for."""

    until: float
    """When nobody waits for it any more; it may come later."""
    matcher: Future[LLMatcher]


class Grammars:
    """Compiles and keeps the formats of one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo) -> None:
        """Read nothing yet: the vocabulary is built for the first format that is asked for."""
        self._tokenizer = tokenizer
        self._info = info
        self._vocabulary: LLTokenizer | None = None
        self._reading = threading.Lock()
        # Errors as well: a job with a bad schema asks for it a million times.
        self._kept: OrderedDict[ResponseFormat, _Asked] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.BoundedSemaphore(_AT_ONCE)

    @classmethod
    def of_model(cls, path: Path | str) -> Grammars:
        """Load the tokenizer of a model directory."""
        from engine.tokenizer import Tokenizer

        return cls(Tokenizer(path), ModelInfo.read(Path(path)))

    @property
    def width(self) -> int:
        """Words of 32 tokens in a mask; even, because masks are uploaded as 64-bit numbers."""
        return 2 * -(-self._num_tokens // 64)

    @property
    def end_id(self) -> int:
        """The token that a matcher allows where the grammar allows the end; some token or other where the model has no such."""
        assert self._vocabulary is not None, "asked before anything was compiled"
        return self._vocabulary.eos_token

    def check(self, wanted: ResponseFormat) -> None:
        """Compile; raise `InvalidRequest` for a format that doesn't, `UnsupportedOption` where formats can't be used at all."""
        self._find(wanted)

    def matcher(self, wanted: ResponseFormat) -> LLMatcher:
        """Return a matcher of its own for a request. Raises as `check` does."""
        return self._find(wanted).deep_copy()

    def _find(self, wanted: ResponseFormat) -> LLMatcher:
        """Return the matcher that is kept of a format; the first who asks for it has it compiled, and the others go on meanwhile."""
        with self._lock:
            found = self._kept.get(wanted)
            if found is None:
                found = self._kept[wanted] = _Asked(time.monotonic() + _PATIENCE_S, self._start(wanted))
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(wanted)
        try:
            error = found.matcher.exception(timeout=max(0.0, found.until - time.monotonic()))
        except TimeoutError:
            raise _refused(wanted, f"it isn't ready after {_PATIENCE_S:.0f} s; make it simpler") from None
        if isinstance(error, HeadraceError):
            raise type(error)(error.message, param=_PARAM)
        return found.matcher.result()

    def spell(self) -> list[bytes]:
        """Return the bytes of each token; a special one has none. Raises as `check` does for a format that can't be used at all."""
        vocabulary = self._vocabulary_read()
        count = vocabulary.vocab_size
        return [b"" if vocabulary.is_special_token(one) else vocabulary.decode_bytes([one]) for one in range(count)]

    @property
    def _num_tokens(self) -> int:
        # A model's logits may be wider than its tokenizer, or (seldom) the other way round.
        return max(self._info.vocab_size, self._tokenizer.vocab_size)

    def compile(self, wanted: ResponseFormat) -> LLMatcher:
        """Compile anew: what this matcher and its copies build as they go they share with no other. Raises as `check` does."""
        return self._start(wanted).result()

    def _start(self, wanted: ResponseFormat) -> Future[LLMatcher]:
        return _on_a_stack(_STACK + _STACK_FOR_A_BYTE * len(wanted.source), partial(self._compile, wanted))

    def _compile(self, wanted: ResponseFormat) -> LLMatcher:
        vocabulary = self._vocabulary_read()
        try:
            with self._compiling:
                matcher = _compile(vocabulary, wanted)
        except Exception as error:
            raise _refused(wanted, str(error)) from error
        if matcher.is_error():
            raise _refused(wanted, matcher.get_error())
        return matcher

    def _vocabulary_read(self) -> LLTokenizer:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def _read_vocabulary(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise UnsupportedOption(
                "response_format needs the package llguidance on the engine's host, which is not installed there: "
                f"pip install llguidance ({error})",
                param=_PARAM,
            ) from error
        backend = getattr(self._tokenizer.hf, "backend_tokenizer", None)
        ends = self._info.eos_ids + self._tokenizer.eos_ids
        try:
            backend = copy.copy(backend)
            backend.no_padding()  # type: ignore[union-attr]  # AttributeError: a tokenizer that isn't made of Rust
            backend.no_truncation()  # type: ignore[union-attr]
            return LLTokenizer(
                backend.to_str(),  # type: ignore[union-attr]
                n_vocab=32 * self.width,
                eos_token=ends[0] if ends else None,
            )
        except Exception as error:
            raise UnsupportedOption(
                f"response_format can't be used with this model's tokenizer: {_one_line(str(error))}", param=_PARAM
            ) from error


def _on_a_stack(size: int, work: Callable[[], LLMatcher]) -> Future[LLMatcher]:
    """Begin it on a thread of its own with so many bytes of stack: address space, of which only what is used costs memory."""
    done: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    # One size for the whole process: who else starts a thread in this moment gets a large stack too, which harms nobody.
    with _STARTING:
        usual = threading.stack_size(size)
        try:
            threading.Thread(target=run, name="compile-format", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return done


def _compile(vocabulary: LLTokenizer, wanted: ResponseFormat) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(vocabulary, _grammar(wanted), log_level=_SILENT)


def _grammar(wanted: ResponseFormat) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if wanted.type == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_DEFAULTS)
    if wanted.type == "json_schema":
        return LLMatcher.grammar_from_json_schema(wanted.source, defaults=_JSON_DEFAULTS)
    if wanted.type == "regex":
        return LLMatcher.grammar_from_regex(wanted.source)
    is_gbnf = "::=" in wanted.source and not is_lark_syntax(wanted.source)
    return LLMatcher.grammar_from_lark(gbnf_to_lark(wanted.source) if is_gbnf else wanted.source)


_ADVICE = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"
"""The library's, about an option that no caller of ours has."""


def _refused(wanted: ResponseFormat, why: str) -> InvalidRequest:
    why = why.replace(_ADVICE, "Where no answer can match two of the options, write anyOf, which is the same")
    return InvalidRequest(f"response_format: this {wanted.type} can't be compiled: {_one_line(why)}", param=_PARAM)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:500]}…"
