"""From a checkpoint's names to a decoder's weights, each rank its own rows or columns.

q, k and v are stacked into one matrix, gate and up into another. The only place that knows how Hugging Face names tensors.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from engine import gemm_table
from engine.layers.embedding import Embedding, Head
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.matrix import Matrix
from engine.layers.rope import cos_sin_table, stretched_angles
from engine.model_info import read_config
from engine.models.decoder import Decoder, Layer
from engine.models.spec import ModelSpec
from engine.parallel import ParallelGroup, replicated_share, share
from engine.weights import Checkpoint, Part, open_checkpoint

_THREADS = 8
"""That read weights for a GPU."""


def load_decoder(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: ParallelGroup,
    max_positions: int,
    whole: ModelSpec | None = None,
) -> Decoder:
    """Read this rank's share of the model in `path`. Raise `ModelLoadError` or `InvalidRequest` (param 'tp').

    `whole`: what the model is where that isn't what its config.json says alone.
    """
    whole = whole or ModelSpec.read(read_config(path))
    spec = whole.shard(group.size)
    prepared = gemm_table.prepare(spec, ranks=group.size, dtype=dtype, device=device)
    with open_checkpoint(path, dtype=dtype, device=device, awq_group=whole.awq_group) as checkpoint:
        loader = _Loader(whole, checkpoint, group)
        (embedding, head), layers = _read(loader, spec.num_layers, device)
        norm_D = loader.vector("model.norm.weight", spec.hidden_size)
    stretched = stretched_angles(spec.rope, head_dim=spec.head_dim, device=device)
    # Where each sequence has its own no step reads the table.
    positions = max_positions if stretched is None else 1
    table_MH = cos_sin_table(spec.rope, head_dim=spec.head_dim, positions=positions, device=device)
    decoder = Decoder(
        spec=spec,
        embedding=embedding,
        layers=layers,
        norm_D=norm_D,
        head=head,
        cos_sin_MH=table_MH,
        stretched=stretched,
    )
    return gemm_table.with_table(decoder, prepared)


def head_rows(spec: ModelSpec, group: ParallelGroup) -> int:
    """Return how many rows of the whole model's head each rank holds; the last ones may be beyond the vocabulary."""
    return -(-spec.vocab_size // group.size)


def _read(loader: _Loader, layers: int, device: torch.device) -> tuple[tuple[Embedding, Head], tuple[Layer, ...]]:
    """Read both ends and all blocks; to a GPU by several threads, because one doesn't copy as fast as the GPU takes it."""
    if device.type != "cuda":
        return loader.ends(), tuple(map(loader.layer, range(layers)))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="weights") as pool:
        # Inference mode is each thread's own.
        ends = pool.submit(torch.inference_mode()(loader.ends))
        blocks = tuple(pool.map(torch.inference_mode()(loader.layer), range(layers)))
        return ends.result(), blocks


class _Loader:
    """Reads one rank's share, layer by layer."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, group: ParallelGroup) -> None:
        """Keep the whole model's spec: the checkpoint holds the whole model."""
        self._spec = spec
        self._checkpoint = checkpoint
        self._group = group

    def vector(self, name: str, size: int) -> Tensor:
        """Read a whole vector."""
        return self._checkpoint.tensor(Part(name, (size,)))

    def ends(self) -> tuple[Embedding, Head]:
        """Read the embedding, and the head's rows of this rank (which are the embedding's where they are tied)."""
        spec, group = self._spec, self._group
        shape = (spec.vocab_size, spec.hidden_size)
        embedding = Embedding(self._checkpoint.tensor(Part("model.embed_tokens.weight", shape)))
        rows = head_rows(spec, group)
        mine = slice(min(group.rank * rows, spec.vocab_size), min((group.rank + 1) * rows, spec.vocab_size))
        missing = rows - (mine.stop - mine.start)
        if spec.tied and not missing:
            weight_OD = embedding.weight_VD[mine]
        else:
            name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
            weight_OD = self._checkpoint.stacked([Part(name, shape, mine)], extra_rows=missing)
        return embedding, Head(Matrix(weight_OD), spec.vocab_size, group)

    def layer(self, index: int) -> Layer:
        """Read one block."""
        spec, group = self._spec, self._group
        prefix = f"model.layers.{index}."
        heads_of = {"q_proj": range(spec.num_heads)[share(spec.num_heads, group)]}
        heads_of["k_proj"] = heads_of["v_proj"] = range(spec.num_kv_heads)[_span(spec.num_kv_heads, group)]
        counts = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads, "v_proj": spec.num_kv_heads}
        qkv = [
            (
                f"{prefix}self_attn.{name}",
                counts[name] * spec.head_dim,
                slice(own.start * spec.head_dim, own.stop * spec.head_dim),
            )
            for name, own in heads_of.items()
        ]
        columns = share(spec.intermediate_size, group)
        gate_up = [(f"{prefix}mlp.{name}", spec.intermediate_size, columns) for name in ("gate_proj", "up_proj")]
        heads_in = share(spec.num_heads * spec.head_dim, group)
        return Layer(
            input_norm_D=self.vector(f"{prefix}input_layernorm.weight", spec.hidden_size),
            qkv=self._column(qkv, bias=spec.qkv_bias),
            q_norm_H=self.vector(f"{prefix}self_attn.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
            k_norm_H=self.vector(f"{prefix}self_attn.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
            output=self._row(f"{prefix}self_attn.o_proj", spec.num_heads * spec.head_dim, heads_in, bias=spec.output_bias),
            mlp_norm_D=self.vector(f"{prefix}post_attention_layernorm.weight", spec.hidden_size),
            gate_up=self._column(gate_up, bias=spec.mlp_bias),
            down=self._row(f"{prefix}mlp.down_proj", spec.intermediate_size, columns, bias=spec.mlp_bias),
            window=spec.windows[index],
        )

    def _column(self, sources: list[tuple[str, int, slice]], *, bias: bool) -> ColumnLinear:
        """Stack the named projections' own rows; each source is (name, rows it has, rows that are this rank's)."""
        hidden = self._spec.hidden_size
        weight_OI = self._checkpoint.stacked([Part(f"{name}.weight", (rows, hidden), mine) for name, rows, mine in sources])
        if not bias:
            return ColumnLinear(Matrix(weight_OI))
        return ColumnLinear(
            Matrix(weight_OI), self._checkpoint.stacked([Part(f"{name}.bias", (rows,), mine) for name, rows, mine in sources])
        )

    def _row(self, name: str, columns: int, mine: slice, *, bias: bool) -> RowLinear:
        hidden = self._spec.hidden_size
        weight_OI = self._checkpoint.tensor(Part(f"{name}.weight", (hidden, columns), columns=mine))
        return RowLinear(Matrix(weight_OI), self.vector(f"{name}.bias", hidden) if bias else None, self._group)


def _span(heads: int, group: ParallelGroup) -> slice:
    own = replicated_share(heads, group)
    return slice(own[0], own[-1] + 1)
