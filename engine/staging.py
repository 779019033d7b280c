"""Copying a checkpoint's tensors to a GPU as fast as several threads can read them.

A copy from memory that isn't pinned goes through the driver's own small buffer, one copy at a time: 16 GB take five seconds. Here each
thread has two pinned buffers of its own and fills one while the device fetches the other. Knows nothing of files or of models.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

_BYTES = 8 << 20
"""Of a buffer: enough that starting a copy costs nothing beside it, little enough that all threads' buffers may stay."""


class _Buffers(threading.local):
    """A thread's two pinned buffers, and when the device is done with each."""

    def __init__(self) -> None:
        self._bytes = [torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._fetched = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """Give the buffer that may be written now; the event is to be recorded behind the copy out of it."""
        self._turn ^= 1
        fetched = self._fetched[self._turn]
        fetched.synchronize()
        return self._bytes[self._turn], fetched


class Staging:
    """Copies tensors of the host to one CUDA device. Any number of threads may use one; all copies go to the default stream."""

    def __init__(self, device: torch.device) -> None:
        """Allocate nothing: a thread's buffers are made at its first copy."""
        self._device = device
        self._buffers = _Buffers()

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Copy `source` into `out`, contiguous and of the same shape; types may differ. On return `source` may go, the copy may not be done."""
        rows = len(source)
        per_row = out[0].numel() * out.element_size() if rows else 0
        if not per_row or per_row > _BYTES:
            out.copy_(source)
            return
        step = _BYTES // per_row
        with torch.cuda.device(self._device):
            for start in range(0, rows, step):
                part = source[start : start + step]
                buffer, fetched = self._buffers.next()
                staged = buffer[: len(part) * per_row].view(out.dtype).view(part.shape)
                _fill(staged, part)
                out[start : start + step].copy_(staged, non_blocking=True)
                fetched.record()


def _fill(staged: Tensor, part: Tensor) -> None:
    if part.dtype == staged.dtype and part.is_contiguous():
        # numpy copies on the thread that asks; torch would wake a team of threads for each of our threads.
        np.copyto(_bytes(staged), _bytes(part))
    else:
        staged.copy_(part)


def _bytes(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
