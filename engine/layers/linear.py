"""Linear layers of a tensor-parallel decoder. A weight is [out, in], as checkpoints store it; a rank holds its share.

Column-parallel: a rank has some output rows and needs no talk. Row-parallel: a rank has some input columns, and the partial
products are summed over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.layers.matrix import Matrix
from engine.parallel import ParallelGroup
from kernels.skinny_gemm import skinny_linear


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """x · Wᵀ + b with this rank's rows of W; several projections stacked are one."""

    weight: Matrix
    bias_O: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Give this rank's output columns."""
        return self.weight(x_TI, self.bias_O)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """x · Wᵀ + b with this rank's columns of W, summed over the ranks."""

    weight: Matrix
    bias_O: Tensor | None
    group: ParallelGroup

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Give the whole output, the same on every rank."""
        if self.group.size == 1:
            return self.weight(x_TI, self.bias_O)
        out_TO = self.group.all_reduce(self.weight(x_TI))
        # The bias is added once, after the sum: added on every rank it would count `size` times.
        return out_TO if self.bias_O is None else out_TO + self.bias_O

    def part(self, x_TI: Tensor, out_TO: Tensor, *, few: bool) -> None:
        """Write this rank's part of the sum into `out_TO`; rank 0's has the bias. `few`: by the kernels for few rows."""
        bias_O = self.bias_O if self.group.rank == 0 else None
        if few:
            skinny_linear(x_TI, self.weight.plain, bias_O, out_TO=out_TO)
        else:
            self.weight.into(out_TO, x_TI, bias_O)
