"""The residual stream of a decoder, and how a step's sublayers read from it and add to it: for many rows, for few, for one of many ranks.

All give the same mathematics with the same weights. Many rows: norm, product and activation are kernels of their own, and a
sublayer's end is added in the pass that norms for the next. Few rows: each linear layer is one kernel, with what stands before and
behind it (`kernels.skinny_gemm`). Ranks: each sublayer gives a part of a sum, which is added up, with the residual, in the pass that
norms for the next (`engine.peer_sums`). Knows nothing of attention, nor which is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from engine.layers.linear import ColumnLinear, RowLinear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_gemm import skinny_linear

if TYPE_CHECKING:
    from engine.peer_sums import PeerSums


class Residual(Protocol):
    """What a block does with the stream [T, D]."""

    def read(self, linear: ColumnLinear, norm_D: Tensor, *, gated: bool = False) -> Tensor:
        """Norm the stream and put it through a layer; `gated`: the layer is gate and up, and silu(gate) · up is given."""

    def add(self, linear: RowLinear, x_TI: Tensor) -> None:
        """Put x through a layer and add it to the stream."""

    def keep(self, rows_R: Tensor, x_TI: Tensor) -> Tensor:
        """Go on with these rows of the stream alone, and give them of x."""

    def normed(self, norm_D: Tensor) -> Tensor:
        """Give the normed stream."""


class ManyRows:
    """A stream with whatever the last sublayer gave still beside it, until the next norm adds it."""

    def __init__(self, residual_TD: Tensor, eps: float) -> None:
        """Start with the embedded tokens, which may be written over."""
        self._residual_TD = residual_TD
        self._beside_TD: Tensor | None = None
        self._eps = eps

    def read(self, linear: ColumnLinear, norm_D: Tensor, *, gated: bool = False) -> Tensor:
        """See `Residual.read`."""
        y_TO = linear(self.normed(norm_D))
        return silu_mul(y_TO) if gated else y_TO

    def add(self, linear: RowLinear, x_TI: Tensor) -> None:
        """See `Residual.add`."""
        self._beside_TD = linear(x_TI)

    def keep(self, rows_R: Tensor, x_TI: Tensor) -> Tensor:
        """See `Residual.keep`."""
        assert self._beside_TD is None, "rows are left between a sublayer and its sum"
        self._residual_TD = self._residual_TD.index_select(0, rows_R)
        return x_TI.index_select(0, rows_R)

    def normed(self, norm_D: Tensor) -> Tensor:
        """See `Residual.normed`."""
        if self._beside_TD is None:
            return rms_norm(self._residual_TD, norm_D, self._eps)
        x_TD, self._residual_TD = add_rms_norm(self._beside_TD, self._residual_TD, norm_D, self._eps)
        self._beside_TD = None
        return x_TD


class FewRows:
    """A stream to which every layer adds at once. For plain matrices of one rank, and as many rows as the kernels serve."""

    def __init__(self, residual_TD: Tensor, eps: float) -> None:
        """Start with the embedded tokens, which may be written over."""
        self._residual_TD = residual_TD
        self._eps = eps

    def read(self, linear: ColumnLinear, norm_D: Tensor, *, gated: bool = False) -> Tensor:
        """See `Residual.read`."""
        weight_OI = linear.weight.plain
        return skinny_linear(self._residual_TD, weight_OI, linear.bias_O, norm_I=norm_D, eps=self._eps, gated=gated)

    def add(self, linear: RowLinear, x_TI: Tensor) -> None:
        """See `Residual.add`."""
        self._residual_TD = skinny_linear(x_TI, linear.weight.plain, linear.bias_O, residual_TO=self._residual_TD)

    def keep(self, rows_R: Tensor, x_TI: Tensor) -> Tensor:
        """See `Residual.keep`."""
        self._residual_TD = self._residual_TD.index_select(0, rows_R)
        return x_TI.index_select(0, rows_R)

    def normed(self, norm_D: Tensor) -> Tensor:
        """See `Residual.normed`."""
        return rms_norm(self._residual_TD, norm_D, self._eps)


class RankRows:
    """A stream that is whole on every rank, beside it the parts that the last sublayer gave on each."""

    def __init__(self, residual_TD: Tensor, eps: float, sums: PeerSums, *, few: bool) -> None:
        """Start with the embedded tokens, which may be written over; `few`: the kernels for few rows multiply."""
        self._residual_TD = residual_TD
        self._eps = eps
        self._sums = sums
        self._few = few
        self._has_parts = False

    def read(self, linear: ColumnLinear, norm_D: Tensor, *, gated: bool = False) -> Tensor:
        """See `Residual.read`."""
        x_TD = self.normed(norm_D)
        if self._few:
            return skinny_linear(x_TD, linear.weight.plain, linear.bias_O, gated=gated)
        y_TO = linear(x_TD)
        return silu_mul(y_TO) if gated else y_TO

    def add(self, linear: RowLinear, x_TI: Tensor) -> None:
        """See `Residual.add`."""
        assert not self._has_parts, "a part would be written over"
        linear.part(x_TI, self._sums.part(len(x_TI)), few=self._few)
        self._has_parts = True

    def keep(self, rows_R: Tensor, x_TI: Tensor) -> Tensor:
        """See `Residual.keep`."""
        assert not self._has_parts, "rows are left between a sublayer and its sum"
        self._residual_TD = self._residual_TD.index_select(0, rows_R)
        return x_TI.index_select(0, rows_R)

    def normed(self, norm_D: Tensor) -> Tensor:
        """See `Residual.normed`."""
        if not self._has_parts:
            return rms_norm(self._residual_TD, norm_D, self._eps)
        x_TD, self._residual_TD = self._sums.add_rms_norm(self._residual_TD, norm_D, self._eps)
        self._has_parts = False
        return x_TD


class SharedRows:
    """A stream of very many rows of which each rank keeps its share: GEMMs write the parts of a share into its rank's memory."""

    def __init__(self, residual_TD: Tensor, eps: float, sums: PeerSums) -> None:
        """Start with the embedded tokens, whole on every rank, which may be written over."""
        self._residual_TD = residual_TD
        self._eps = eps
        self._sums = sums
        self._own_SD: Tensor | None = None
        # Set by keep(): few rows, whole on every rank again.
        self._kept: RankRows | None = None

    def read(self, linear: ColumnLinear, norm_D: Tensor, *, gated: bool = False) -> Tensor:
        """See `Residual.read`."""
        y_TO = linear(self.normed(norm_D))
        return silu_mul(y_TO) if gated else y_TO

    def add(self, linear: RowLinear, x_TI: Tensor) -> None:
        """See `Residual.add`."""
        if self._kept is not None:
            self._kept.add(linear, x_TI)
            return
        for rows, out_SD in self._sums.targets(len(x_TI)):
            linear.part(x_TI[rows], out_SD, few=False)
            self._own_SD = out_SD  # the last one

    def keep(self, rows_R: Tensor, x_TI: Tensor) -> Tensor:
        """See `Residual.keep`."""
        assert self._own_SD is None, "rows are left between a sublayer and its sum"
        self._kept = RankRows(self._sums.whole_rows(self._residual_TD, rows_R), self._eps, self._sums, few=False)
        return x_TI.index_select(0, rows_R)

    def normed(self, norm_D: Tensor) -> Tensor:
        """See `Residual.normed`."""
        if self._kept is not None:
            return self._kept.normed(norm_D)
        if self._own_SD is None:
            return rms_norm(self._residual_TD, norm_D, self._eps)
        own_SD, self._own_SD = self._own_SD, None
        return self._sums.share_add_rms_norm(own_SD, self._residual_TD, norm_D, self._eps)
