"""A checkpoint without files: each tensor is drawn on the device when it is asked for. For trying out the speed of a size.

A model directory with `random-weights.json` (`{"seed": 0, "std": 0.02}`) beside its config.json is one. A tensor is a function of
seed, name and shape, whoever asks for which part of it: one rank and several compute the same model. Knows no architecture.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ModelLoadError

MARK = "random-weights.json"


class RandomTensors:
    """Draws normal weights; vectors are ones, biases zeros."""

    def __init__(self, path: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Read `path`, the mark. Raise `ModelLoadError` where it is broken."""
        try:
            mark = json.loads(path.read_text(encoding="utf-8"))
            self._seed, self._std = int(mark["seed"]), float(mark["std"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(f"{path} is broken ({error!r}); it holds a seed and a std", param="model_path") from None
        self._dtype = dtype
        self._device = device

    def draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Give the whole tensor."""
        if len(shape) == 1:
            fill = torch.zeros if name.endswith(".bias") else torch.ones
            return fill(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        return whole.normal_(0.0, self._std, generator=generator)
