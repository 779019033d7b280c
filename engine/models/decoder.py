"""One decoder block for all architectures: norm, attention with rotary positions over a paged cache, norm, gated MLP.

T tokens of the step, D hidden, N query heads and K KV heads of this rank, H head dim, R rows that sample, V vocabulary.
Knows nothing of requests: which token stands where comes in as `StepInputs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.layers.embedding import Embedding, Head
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.rope import StretchedAngles
from engine.models.residual import FewRows, ManyRows, RankRows, Residual, SharedRows
from engine.models.spec import ModelSpec
from engine.parallel import ParallelGroup
from kernels.attention import AttentionMetadata, KVScales, paged_attention, plan_attention
from kernels.rotary import rotary_kv_write

ROW_BUCKETS = (1, 2, 16, 32, 64)
"""Row counts up to which the kernels for few rows are cut alike."""


def row_bucket(rows: int) -> int:
    """Return the bucket that a step of so many rows belongs to; 0: too many for any."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), 0)


class LayerCache(NamedTuple):
    """One layer's paged keys and values, each [B, K, S, H]; in int8 with scales."""

    k_BKSH: Tensor
    v_BKSH: Tensor
    scales: KVScales | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a block's number points into."""
        return (self.k_BKSH, self.v_BKSH, *(self.scales or ()))


class Stretches(NamedTuple):
    """Where a step finds how its tokens' sequences are stretched: looked up inside the step, so that a captured one reads it anew."""

    stretch_S: Tensor
    """float32, by slot of the state table."""
    slots_T: Tensor
    """int64: each token's slot; any of them for a padding row."""


class StepInputs(NamedTuple):
    """What the model computes in one step. The shapes of a plan of single tokens depend on its row count alone."""

    tokens_T: Tensor
    positions_T: Tensor
    """int64."""
    slots_T: Tensor
    """int64: where each token's key and value go, block · block_size + offset."""
    attention: AttentionMetadata
    sampled_R: Tensor | None
    """int64: the tokens whose hidden state reaches the head; None: all of them, in order."""
    stretches: Stretches | None = None
    """Given where the model's rope is stretched from sequence to sequence."""


class _Turn(NamedTuple):
    """How a step's queries and keys are turned, and its queries scaled."""

    cos_sin_MH: Tensor
    rows_T: Tensor
    """int64: each token's row of the table."""
    logn_T11: Tensor | None
    """float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block's weights (this rank's share)."""

    input_norm_D: Tensor
    qkv: ColumnLinear
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    output: RowLinear
    mlp_norm_D: Tensor
    gate_up: ColumnLinear
    down: RowLinear
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder model on one rank. `spec` is this rank's share, `engine.models.loading` makes it."""

    spec: ModelSpec
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm_D: Tensor
    head: Head
    cos_sin_MH: Tensor
    stretched: StretchedAngles | None = None
    """For ropes that are stretched from sequence to sequence."""
    few_rows: frozenset[int] = frozenset()
    """Row buckets whose steps run on the kernels for few rows: `engine.gemm_table` fills it in."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's weights; a tied head counts where it is a copy."""
        matrices = [part.weight for layer in self.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        shared = self.head.weight.shares(self.embedding.weight_VD)
        ends = self.embedding.weight_VD.nbytes + (0 if shared else self.head.weight.nbytes) + self.cos_sin_MH.nbytes
        return ends + sum(matrix.nbytes for matrix in matrices)

    def forward(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> Tensor:
        """Run the blocks, write the step's keys and values, and give logits [R, V] of the sampled tokens."""
        return self.head(self.hidden(inputs, caches))

    def hidden(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> Tensor:
        """Give what the head reads: the normed hidden states [R, D] of the sampled tokens. Keys and values are written."""
        windows = {layer.window for layer in self.layers}
        inputs = inputs._replace(attention=plan_attention(inputs.attention, caches[0].k_BKSH, windows=windows))
        turn = self._turn(inputs)
        stream = self.residual(self.embedding(inputs.tokens_T))
        for layer, cache in zip(self.layers, caches, strict=True):
            out_TE = self._attend(layer, cache, stream.read(layer.qkv, layer.input_norm_D), inputs, turn)
            if layer is self.layers[-1] and inputs.sampled_R is not None:
                # Behind the last keys and values only what reaches the head counts: of a prompt one token in thousands.
                out_TE = stream.keep(inputs.sampled_R, out_TE)
                if not len(inputs.sampled_R):
                    return out_TE.new_empty((0, self.spec.hidden_size))
            stream.add(layer.output, out_TE)
            stream.add(layer.down, stream.read(layer.gate_up, layer.mlp_norm_D, gated=True))
        return stream.normed(self.norm_D)

    @property
    def group(self) -> ParallelGroup:
        """The ranks that share the model."""
        return self.head.group

    def residual(self, x_TD: Tensor, *, few: bool | None = None) -> Residual:
        """Start the residual stream of a step, in the way that its number of rows asks for, or the given one."""
        if few is None:
            few = row_bucket(len(x_TD)) in self.few_rows
        sums = self.group.sums
        if sums is not None and len(x_TD) <= sums.most_rows:
            if sums.shares(len(x_TD)):
                return SharedRows(x_TD, self.spec.norm_eps, sums)
            return RankRows(x_TD, self.spec.norm_eps, sums, few=few)
        return (FewRows if few else ManyRows)(x_TD, self.spec.norm_eps)

    def _turn(self, inputs: StepInputs) -> _Turn:
        """Work out once a step what all layers do with its positions."""
        positions_T = inputs.positions_T
        logn_T11 = None
        if self.spec.logn_from is not None:
            logn_T11 = ((positions_T + 1).log() / math.log(self.spec.logn_from)).clamp(min=1.0)[:, None, None]
        if self.stretched is None:
            return _Turn(self.cos_sin_MH, positions_T, logn_T11)
        assert inputs.stretches is not None, "a step of stretched ropes that doesn't say whose"
        stretch_T = inputs.stretches.stretch_S.index_select(0, inputs.stretches.slots_T)
        rows_T = torch.arange(len(positions_T), device=positions_T.device)
        return _Turn(self.stretched.table(positions_T, stretch_T), rows_T, logn_T11)

    def _attend(self, layer: Layer, cache: LayerCache, qkv_TO: Tensor, inputs: StepInputs, turn: _Turn) -> Tensor:
        """Write the step's keys and values and give the heads' outputs side by side, [T, N · H]."""
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv_TLH = qkv_TO.view(len(qkv_TO), heads + 2 * kv_heads, spec.head_dim)
        q_TNH, k_TKH, v_TKH = qkv_TLH.split([heads, kv_heads, kv_heads], dim=1)
        q_TNH = rotary_kv_write(
            q_TNH,
            k_TKH,
            v_TKH,
            turn.cos_sin_MH,
            turn.rows_T,
            inputs.slots_T,
            cache.k_BKSH,
            cache.v_BKSH,
            layer.q_norm_H,
            layer.k_norm_H,
            spec.norm_eps,
            cache.scales,
        )
        if turn.logn_T11 is not None:
            q_TNH *= turn.logn_T11
        out_TNH = paged_attention(
            q_TNH,
            cache.k_BKSH,
            cache.v_BKSH,
            inputs.attention,
            scale=spec.head_dim**-0.5,
            sliding_window=layer.window,
            scales=cache.scales,
        )
        return out_TNH.flatten(1)
