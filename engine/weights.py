"""Reading a checkpoint: safetensors files, one or many, slice by slice straight into tensors of the target device and dtype.

A rank of a tensor-parallel group reads only its own rows or columns. Knows nothing of what a layer does with a weight.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import awq
from engine.model_info import ModelInfo, locate_model
from engine.random_weights import MARK, RandomTensors
from engine.staging import Staging
from headrace.errors import ModelLoadError

__all__ = ["Checkpoint", "ModelInfo", "Part", "locate_model", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_WHOLE = slice(None)


class Part(NamedTuple):
    """A stored tensor, or the rows and columns of it that are wanted."""

    name: str
    shape: tuple[int, ...]
    """What the whole stored tensor must measure."""
    rows: slice = _WHOLE
    columns: slice = _WHOLE


class Checkpoint:
    """The tensors of a model directory. Made by `open_checkpoint`, which closes the files. Any number of threads may read."""

    def __init__(
        self,
        path: Path,
        files: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        drawn: RandomTensors | None = None,
        awq_group: int | None = None,
    ) -> None:
        """Keep the opened file of each tensor name, and what to turn tensors into; `drawn` stands in for all files.

        `awq_group`: see `ModelSpec.awq_group`. A matrix that isn't stored as such is then unpacked from its 4 bits.
        """
        self._awq_group = awq_group
        self._drawn = drawn
        self._path = path
        self._files = files
        self._dtype = dtype
        self._device = device
        self._staging = Staging(device) if device.type == "cuda" and drawn is None else None

    def __contains__(self, name: str) -> bool:
        return self._drawn is not None or name in self._files

    def tensor(self, part: Part) -> Tensor:
        """Read one tensor or a slice of it. Raise `ModelLoadError` where it is missing or measures otherwise."""
        return self.stacked([part])

    def stacked(self, parts: Sequence[Part], *, extra_rows: int = 0) -> Tensor:
        """Read several slices into one tensor, one below the other, and append `extra_rows` of zeros."""
        sources = [self._slice(part) for part in parts]
        count = sum(source.shape[0] for source in sources)
        out = torch.empty((count + extra_rows, *sources[0].shape[1:]), dtype=self._dtype, device=self._device)
        start = 0
        for source in sources:
            place = out[start : start + source.shape[0]]
            if self._staging is None or source.is_cuda:
                place.copy_(source)
            else:
                self._staging.copy(place, source)
            start += source.shape[0]
        out[start:].zero_()
        return out

    def _slice(self, part: Part) -> Tensor:
        if self._drawn is not None:
            whole = self._drawn.draw(part.name, part.shape)
            return whole[part.rows] if len(part.shape) == 1 else whole[part.rows, part.columns]
        if self._awq_group is None or part.name in self._files or len(part.shape) == 1:
            return self._stored(part)
        stem = part.name.removesuffix("weight")
        # Where nothing of it is there, the matrix itself is what is missing.
        is_packed = any(f"{stem}{name}" in self._files for name in awq.Packed._fields)
        return self._unpacked(part, self._awq_group) if is_packed else self._stored(part)

    def _stored(self, part: Part) -> Tensor:
        file = self._files.get(part.name)
        if file is None:
            raise ModelLoadError(
                f"{self._path} has no tensor {part.name!r}; the download is incomplete or the config is another model's"
            )
        stored = file.get_slice(part.name)
        if tuple(stored.get_shape()) != part.shape:
            raise ModelLoadError(
                f"tensor {part.name!r} measures {tuple(stored.get_shape())}, but config.json says {part.shape}"
            )
        source: Tensor = stored[part.rows] if len(part.shape) == 1 else stored[part.rows, part.columns]
        return source

    def _unpacked(self, part: Part, group: int) -> Tensor:
        """Read the groups of inputs and the words of outputs that hold the wanted rows and columns, and unpack them on the device."""
        outputs, inputs = part.shape
        group = inputs if group == -1 else group
        if inputs % group or outputs % awq.PER_WORD:
            raise ModelLoadError(
                f"{part.name!r} of {outputs} x {inputs} can't be AWQ's in groups of {group} inputs; the config is another model's",
                param="model_path",
            )
        (first, last, _), (low, high, _) = part.rows.indices(outputs), part.columns.indices(inputs)
        words = slice(first // awq.PER_WORD, -(-last // awq.PER_WORD))
        groups = slice(low // group, -(-high // group))
        stem = part.name.removesuffix("weight")
        wanted = (
            Part(f"{stem}qweight", (inputs, outputs // awq.PER_WORD), slice(groups.start * group, groups.stop * group), words),
            Part(f"{stem}qzeros", (inputs // group, outputs // awq.PER_WORD), groups, words),
            Part(
                f"{stem}scales",
                (inputs // group, outputs),
                groups,
                slice(words.start * awq.PER_WORD, words.stop * awq.PER_WORD),
            ),
        )
        packed = awq.Packed(*(self._stored(one).to(self._device) for one in wanted))
        weight_OI = awq.unpack(packed, group=group, dtype=self._dtype)
        top, left = words.start * awq.PER_WORD, groups.start * group
        return weight_OI[first - top : last - top, low - left : high - left]


@contextlib.contextmanager
def open_checkpoint(
    path: Path, *, dtype: torch.dtype, device: torch.device, awq_group: int | None = None
) -> Iterator[Checkpoint]:
    """Open all safetensors files of `path`, or what stands in for them (`engine.random_weights`). Raise `ModelLoadError` for a broken or missing one."""
    if (path / MARK).is_file():
        yield Checkpoint(path, {}, dtype=dtype, device=device, drawn=RandomTensors(path / MARK, dtype=dtype, device=device))
        return
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for file in _files(path):
            try:
                handle = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{file} can't be read ({error}); download the model again") from None
            files.update(dict.fromkeys(handle.keys(), handle))
        yield Checkpoint(path, files, dtype=dtype, device=device, awq_group=awq_group)


def _files(path: Path) -> list[Path]:
    """Name the files of the index where there is one; else all that lie there."""
    if (path / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ModelLoadError(f"{path / _INDEX} is broken ({error!r}); download the model again") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelLoadError(
                f"{path} lacks {missing[0]!r} ({len(missing)} of {len(names)} weight files); download the model again"
            )
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        old = " (its *.bin files are pickles: convert them to safetensors)" if any(path.glob("*.bin")) else ""
        raise ModelLoadError(f"{path} has no *.safetensors{old}; give a Hugging Face model directory", param="model_path")
    return found
