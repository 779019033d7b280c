"""Token ids to text as they arrive, and the search for stop words in that text.

Invariant: the pieces that `IncrementalDetokenizer` gives, `flush` included, concatenate to the one-shot decoding of all ids.
This module doesn't know requests or choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

REPLACEMENT = "\ufffd"
_PATIENCE = 32


class Decoder(Protocol):
    """What a detokenizer needs of `engine.tokenizer.Tokenizer`."""

    byte_ids: frozenset[int]
    skipped_ids: frozenset[int]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids to text."""
        ...


class IncrementalDetokenizer:
    """Turns one choice's tokens into text piece by piece.

    `_ids[_prefix:_read]` is context that was already given as text, and `_ids[_read:]` is what no text was given for yet. The
    context is decoded along, because a tokenizer's decoder treats the first token of a text differently (a leading space).
    """

    def __init__(self, decoder: Decoder, *, skip_special_tokens: bool = True) -> None:
        """Start with no tokens."""
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is certain now, perhaps ''."""
        # The one-shot decoding leaves these out first: two byte pieces around one of them are one run.
        if self._skip and token_id in self._decoder.skipped_ids:
            return ""
        self._ids.append(token_id)
        # A run of byte pieces is decoded as a whole, and one bad byte turns the whole run into U+FFFD: wait for its end.
        if token_id in self._decoder.byte_ids:
            return ""
        # A model that babbles broken bytes would have its whole tail decoded again for each token: look less often.
        waiting = len(self._ids) - self._read
        if waiting > _PATIENCE and waiting % _PATIENCE:
            return ""
        text = self._unread()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what was withheld; a character cut in the middle comes as U+FFFD."""
        text = self._unread()
        self._prefix = self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        context = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(context) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=self._skip) if ids else ""


class Match(NamedTuple):
    """What `StopWords.push` found."""

    text: str
    """Text that may be shown now."""
    stop_word: str | None
    """The stop word that ended it."""


class StopWords:
    """Finds the earliest stop word in a growing text, and holds back what may be the beginning of one."""

    def __init__(self, words: Sequence[str], *, include: bool = False) -> None:
        """Look for `words`; with `include` the stop word stays in the text."""
        self._words = tuple(words)
        self._include = include
        self._held = ""
        self._early = 0
        """Length of the part of `_held` in which no stop word may have its end."""

    def push(self, text: str, *, is_early: bool = False) -> Match:
        """Add text; return what is certainly before any stop word. `is_early`: one that is complete by this text is none yet."""
        self._held += text
        if is_early:
            self._early = len(self._held)
        starts = ((self._held.find(word, max(0, self._early - len(word) + 1)), word) for word in self._words)
        found = [(start, -len(word), word) for start, word in starts if start >= 0]
        if found:
            start, _, word = min(found)
            shown = self._held[: start + len(word) if self._include else start]
            self._held = ""
            return Match(shown, word)
        keep = self._beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._early = max(0, self._early - len(shown))
        return Match(shown, None)

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        text, self._held = self._held, ""
        return text

    def _beginning(self) -> int:
        """Return the length of the longest end of the held text that begins a stop word."""
        longest = max((len(word) for word in self._words), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-size:]) for word in self._words):
                return size
        return 0
