"""CUDA graphs of the decode step: a plan whose rows are all single tokens replays one captured graph.

A captured graph reads its inputs from fixed addresses: the state table's `singles`, in which it lays out every step of single
tokens, with padding behind them. A padding row writes no key (slot -1) and has no context, so attention gives zeros for it at
once. The output head stays outside: it runs on the real rows only, and logits of each captured size would fill the memory.

Knows nothing of requests or of sampling. Plans with longer rows run eagerly, packed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.models.decoder import Decoder, LayerCache, StepInputs, Stretches
from kernels.attention import AttentionMetadata
from kernels.state import SingleRows

log = logging.getLogger(__name__)

_WORTH_PADDING = 0.93
"""A larger graph is taken where it needs at most this share of the fitting one's time: less may be noise, and padding rows
change how a GEMM rounds."""
_PADDED_FROM = 64
"""Below this many rows a step reads the weights and little else: no size is faster than another."""


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the row counts to capture up to `max_rows`, ascending.

    Padding costs at most 8 rows up to 128, 16 up to 512 and 32 beyond: a grid of powers of two would waste a third of a
    decode step right above each power.
    """
    sizes = {1, 2, 4, *range(8, 129, 8), *range(144, 513, 16), *range(544, max_rows + 1, 32), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


def fastest_sizes(times: Mapping[int, float]) -> list[int]:
    """Return, indexed by row count from 0 to the largest size, the captured size to replay; `times` is ms by size.

    The smallest size that fits, except where a larger one is clearly faster: cuBLAS has holes (Llama-3.1-8B's gate-up takes
    302 us at 448 rows and 166 us at 512 on an H100), and a step of the larger size then costs less with its padding.
    """
    sizes = sorted(times)
    chosen: list[int] = []
    for index, size in enumerate(sizes):
        faster = min(sizes[index:], key=times.__getitem__)
        worth = size >= _PADDED_FROM and times[faster] < _WORTH_PADDING * times[size]
        chosen += [faster if worth else size] * (size + 1 - len(chosen))
    return chosen


class GraphForward:
    """`Runner`'s forward: replays a graph where there is one for the plan's shape, runs the model otherwise."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        singles: SingleRows,
        *,
        session_len: int,
        stretch_S: Tensor | None = None,
    ) -> None:
        """Make ready for as many rows as `singles` has; capture nothing yet. `stretch_S`: see `Stretches`."""
        self._stretch_S = stretch_S
        max_rows, device = len(singles.tokens_R), singles.tokens_R.device
        self._model = model
        self._caches = caches
        self._singles = singles
        self._session_len = session_len
        self._sizes = graph_sizes(max_rows)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Filled by capture(): for each row count the size whose graph serves it.
        self._size_for_rows: list[int] = []
        self.largest_ms = 0.0
        """A replay of the largest graph, on rows that are padding. Filled by capture(), too."""
        self._pool: Any = None  # what torch gives as a pool handle has no public type
        self._query_start_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._hidden_RD = torch.zeros((max_rows, model.spec.hidden_size), dtype=model.norm_D.dtype, device=device)

    def __call__(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> Tensor:
        """Give the hidden states of the positions that reach the head. They may lie in memory that the next replay overwrites."""
        # By address: a step of single tokens that was laid out elsewhere (one that scores, say) isn't where the graph looks.
        if inputs.tokens_T.data_ptr() != self._singles.tokens_R.data_ptr():
            return self._model.hidden(inputs, caches)
        rows = inputs.attention.num_single
        self._graphs[self._size_for_rows[rows]].replay()
        return self._hidden_RD[:rows]

    @torch.inference_mode()
    def capture(self) -> float:
        """Capture every size, the largest first so that the smaller ones reuse its memory. Return the seconds it took."""
        started = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A layer of each kind makes all the launches that there are: a run of the whole model for each size takes seconds.
        kinds = {layer.window: (layer, cache) for layer, cache in zip(self._model.layers, self._caches, strict=True)}
        layers, layer_caches = zip(*kinds.values(), strict=True)
        sample = replace(self._model, layers=layers)
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):
                inputs = self._static_inputs(size)
                # Triton compiles and cuBLAS picks its algorithm at the first call, which no capture survives.
                self._hidden_RD[:size] = sample.hidden(inputs, layer_caches)
                graph = torch.cuda.CUDAGraph()
                # Other threads of the process may call CUDA while this one captures.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    self._hidden_RD[:size] = self._model.hidden(inputs, self._caches)
                self._pool = self._pool or graph.pool()
                self._graphs[size] = graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        timed = {*(size for size in self._sizes if size >= _PADDED_FROM), self._sizes[-1]}
        times = {size: self._time(graph) if size in timed else 0.0 for size, graph in self._graphs.items()}
        # Ranks that replayed different sizes would wait for each other for ever.
        times = dict(zip(times, self._model.group.agreed(list(times.values())), strict=True))
        self._size_for_rows = fastest_sizes(times)
        self.largest_ms = times[self._sizes[-1]]
        seconds = time.perf_counter() - started
        log.info(
            "decode graphs captured: a step of single tokens is one launch from now on",
            extra={
                "event": "graphs_captured",
                "graphs": len(self._graphs),
                "max_rows": self._sizes[-1],
                "seconds": round(seconds, 2),
            },
        )
        return seconds

    def _time(self, graph: torch.cuda.CUDAGraph) -> float:
        """Return the milliseconds of a replay. All rows are padding still: what is timed is the GEMMs."""
        best = float("inf")
        for _ in range(2):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
        return best

    def _static_inputs(self, size: int) -> StepInputs:
        singles = self._singles
        attention = AttentionMetadata(
            block_tables_RP=singles.block_tables_RP[:size],
            query_start_R1=self._query_start_R1[: size + 1],
            context_lens_R=singles.context_lens_R[:size],
            num_single=size,
            max_query_len=1,
            # The graph serves every length up to the session's: what is decided on the host must hold for the longest.
            max_context_len=self._session_len,
        )
        return StepInputs(
            tokens_T=singles.tokens_R[:size],
            positions_T=singles.positions_R[:size],
            slots_T=singles.cache_slots_R[:size],
            attention=attention,
            sampled_R=None,
            stretches=None if self._stretch_S is None else Stretches(self._stretch_S, singles.slots_R[:size]),
        )
