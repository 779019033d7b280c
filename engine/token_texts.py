"""What the tokens stand for that log-probabilities name by their ids, for readers who have no tokenizer.

Knows no requests and no wire form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from engine.token_bytes import TokenBytes
from headrace.completion import TokenLogprobs, TokenText
from headrace.errors import UnsupportedOption

if TYPE_CHECKING:
    from engine.grammar import Grammars
    from engine.tokenizer import Tokenizer


class TokenTexts:
    """One model's tokens as texts. Looked up on one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, spelled: TokenBytes) -> None:
        """Keep both; a token becomes a text when it is first named, because most never are."""
        self._special = tokenizer.special_texts
        self._spelled = spelled
        self._known: dict[int, TokenText | None] = {}

    @classmethod
    def read(cls, tokenizer: Tokenizer, grammars: Grammars) -> Self | None:
        """Read all tokens' bytes, in about a second; None where nobody here knows them."""
        try:
            return cls(tokenizer, TokenBytes.of(grammars.spell()))
        except UnsupportedOption:  # a tokenizer that isn't made of Rust: its tokens go by their ids alone
            return None

    def named_by(self, rows: Iterable[TokenLogprobs]) -> dict[int, TokenText]:
        """Return what each token stands for that the rows name."""
        texts: dict[int, TokenText] = {}
        for row in rows:
            for token in (row.token_id, *(other for other, _ in row.top)):
                if token not in texts and (text := self._text(token)) is not None:
                    texts[token] = text
        return texts

    def _text(self, token: int) -> TokenText | None:
        if token not in self._known:
            data = self._spelled.join([token])
            try:
                self._known[token] = data.decode() or self._special.get(token)
            except UnicodeDecodeError:
                self._known[token] = tuple(data)
        return self._known[token]
