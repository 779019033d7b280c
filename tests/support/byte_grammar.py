"""The grammar library over single bytes: which bytes it lets follow a text, to compare an automaton with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_END = 256


class _Bytes:
    """A tokenizer whose tokens are the bytes, as the library wants it."""

    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


class ByteGrammar:
    """A place in a grammar."""

    def __init__(self, grammar: str) -> None:
        self._matcher = LLMatcher(_TOKENIZER, grammar, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    @classmethod
    def of_schema(cls, schema: Any) -> ByteGrammar:
        return cls(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": " "}))

    @classmethod
    def of_regex(cls, regex: str) -> ByteGrammar:
        return cls(LLMatcher.grammar_from_regex(regex))

    def following(self) -> set[int]:
        """Bytes that may follow; 256 stands for the end."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return set(np.flatnonzero(np.unpackbits(words, bitorder="little")[: _END + 1]).tolist())

    def go(self, byte: int) -> None:
        assert self._matcher.consume_token(byte)
