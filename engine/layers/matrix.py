"""A weight matrix in the layout in which its device multiplies by it fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPICAL_ROWS = 64  # the layout is chosen for about so many rows; it serves any number
_EXACT_ROWS = 8


def padded_rows(rows: int) -> int:
    """Return the row count that oneDNN is given for so many: itself up to 8, then four to a power of two; at most a quarter more.

    oneDNN compiles a product for each row count, an object of 250 KiB and up to a millisecond of work, and packed steps hardly ever
    repeat theirs: a small model spent most of its time compiling, and what the cache dropped left the heap in pieces that grew for hours.
    """
    if rows <= _EXACT_ROWS:
        return rows
    step = 1 << ((rows - 1).bit_length() - 3)
    return -(-rows // step) * step


class Matrix:
    """x · Wᵀ (+ b) for a weight W [out, in].

    On a CPU in float32 the weight is repacked once for oneDNN: PyTorch's own float32 product goes to MKL, which on other
    makers' processors reaches a third of that speed (measured on a Zen 5: 170 against 500 GFLOP/s at 64 rows). Same float32
    mathematics, another order of the sums.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        """Take the weight; a repacked one is a copy, and the original may be freed."""
        self._packed = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and _has_onednn()
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _TYPICAL_ROWS)  # noqa: SLF001
        else:
            self._weight = weight_OI
        self.nbytes: int = weight_OI.nbytes

    def shares(self, tensor: Tensor) -> bool:
        """Whether the weight is a part of `tensor` and not a copy."""
        return not self._packed and self._weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    @property
    def plain(self) -> Tensor:
        """The weight [out, in] as it was given. Only where `is_plain`."""
        assert self.is_plain, "a repacked weight has no rows"
        return self._weight

    @property
    def is_plain(self) -> bool:
        """Whether the weight lies in memory as it was given."""
        return not self._packed

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Give [T, O]."""
        if self._packed:
            rows = len(x_TI)
            if more := padded_rows(rows) - rows:
                x_TI = F.pad(x_TI, (0, 0, 0, more))
            out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, bias_O, "none", [], "")  # noqa: SLF001
            return out_TO[:rows]
        return F.linear(x_TI, self._weight, bias_O)

    def into(self, out_TO: Tensor, x_TI: Tensor, bias_O: Tensor | None = None) -> None:
        """Write [T, O] into `out_TO`. Only where `is_plain`."""
        if bias_O is None:
            torch.mm(x_TI, self.plain.t(), out=out_TO)
        else:
            torch.addmm(bias_O, x_TI, self.plain.t(), out=out_TO)


def _has_onednn() -> bool:
    """Whether this build of torch has the two operators (the ones that torch.compile emits on a CPU)."""
    available = torch.backends.mkldnn.is_available()
    return available and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
