"""Matrices that a checkpoint stores in 4 bits by AWQ: what they are in numbers.

The layout is AutoAWQ's "gemm" (https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py), I inputs and O outputs:

    qweight  int32 [I, O / 8]   eight outputs a word, those of an input one behind the other
    qzeros   int32 [I / g, O / 8]   the whole number that stands for zero, for each group of g inputs
    scales   float16 [I / g, O]

and weight[o, i] = (q[i, o] - zero[i // g, o]) * scale[i // g, o]. Within a word the outputs stand in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PER_WORD = 8
# Of each output of a word: how many bits stand below it.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_AT_ONCE = 1024
"""Inputs that are computed at once: a whole matrix would need eight times its own memory for a while."""


class Packed(NamedTuple):
    """A stored matrix, or some of its groups of inputs and words of outputs."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def unpack(packed: Packed, *, group: int, dtype: torch.dtype) -> Tensor:
    """Give the weights [O, I] in `dtype`, on the device of the stored parts. Products are rounded once."""
    inputs, outputs = len(packed.qweight), packed.scales.shape[1]
    weight_OI = torch.empty((outputs, inputs), dtype=dtype, device=packed.qweight.device)
    group_I = torch.arange(inputs, device=weight_OI.device) // group
    for first in range(0, inputs, _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        of_I = group_I[some]
        q_IO = _numbers(packed.qweight[some]).sub_(_numbers(packed.qzeros[of_I]))
        weight_OI[:, some] = (q_IO * packed.scales[of_I].float()).T
    return weight_OI


def _numbers(words: Tensor) -> Tensor:
    """Give the 4-bit numbers of int32 words [R, O / 8] as int32 [R, O]."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 15).flatten(1)
