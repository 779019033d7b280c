"""The bytes that each token of a model stands for, as the grammar library reads them off its tokenizer.

A format that the library follows and one that an automaton follows so mean the same by a token. Knows no formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class TokenBytes(NamedTuple):
    """All tokens' bytes, one behind the other. Special tokens have none: they belong to no text."""

    starts_V1: npt.NDArray[np.int32]
    """Where each token's bytes start, and behind the last one where its own end."""
    data: bytes

    @classmethod
    def of(cls, spelled: Sequence[bytes]) -> TokenBytes:
        """Put the tokens' bytes, by id, into one piece."""
        starts = np.zeros(len(spelled) + 1, dtype=np.int32)
        np.cumsum([len(one) for one in spelled], out=starts[1:])
        return cls(starts, b"".join(spelled))

    def join(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of some tokens."""
        starts = self.starts_V1
        return b"".join(self.data[starts[token] : starts[token + 1]] for token in tokens)

    def resized(self, vocab_size: int) -> TokenBytes:
        """Return the first `vocab_size` tokens; further ones than there are have no bytes."""
        starts = self.starts_V1[: vocab_size + 1]
        starts = np.pad(starts, (0, vocab_size + 1 - len(starts)), mode="edge")
        return TokenBytes(starts, self.data[: starts[-1]])


@lru_cache(maxsize=4)
def token_bytes(model_path: str) -> TokenBytes:
    """Read the bytes of a model directory's tokens; kept, because a tokenizer takes a second to load.

    Raise `UnsupportedOption` where the library or a tokenizer that it understands is missing.
    """
    from engine.grammar import Grammars

    return TokenBytes.of(Grammars.of_model(model_path).spell())
