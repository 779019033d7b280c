"""Which tokens may come next, one bit each: what the host works out for the rows of a step that follow a grammar.

Knows no grammar and no device. The masks of a step are one message, the same for every rank.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_HEAD = struct.Struct("<II")


class TokenMasks(NamedTuple):
    """Masks of q rows of one step; W words of 32 tokens, W even."""

    entries: tuple[int, ...]
    """Which sampling rows of the plan, as `StepOutput` counts them. The others may choose any token."""
    words_qW: npt.NDArray[np.int32]
    """Bit `token % 32` of word `token // 32`: whether the token may come. Beyond the last word nothing may."""

    def to_bytes(self) -> bytes:
        """Return the frame that rank 0 sends to the other ranks."""
        count, width = self.words_qW.shape
        entries = np.array(self.entries, dtype="<i4")
        return _HEAD.pack(count, width) + entries.tobytes() + self.words_qW.astype("<i4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, frame: bytes) -> TokenMasks:
        """Rebuild from `to_bytes`."""
        count, width = _HEAD.unpack_from(frame)
        # A copy: torch takes no read-only memory.
        values = np.frombuffer(frame, dtype="<i4", offset=_HEAD.size).astype(np.int32)
        return cls(tuple(values[:count].tolist()), values[count:].reshape(count, width))
