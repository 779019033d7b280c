"""Which GEMMs serve a step of few rows: PyTorch's (cuBLAS) or ours, measured once for each GPU, shape and version of the code.

The times go to `gemm-table.json` under $HEADRACE_HOME (or ~/.cache/headrace), so that two engines of one machine choose alike: the
two ways round differently. What is timed is what a step does between two attentions, over several layers' weights, in a
captured graph. Knows nothing of requests, and nothing of how a kernel is cut (`kernels.gpu.skinny_gemm`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.models.decoder import ROW_BUCKETS, Decoder, Layer
from engine.models.residual import FewRows, ManyRows, Residual
from engine.models.spec import ModelSpec
from kernels import skinny_gemm

log = logging.getLogger(__name__)

_WORTH_CHANGING = 0.99
"""Ours serves where it needs at most this share of cuBLAS's time: less may be noise."""
_BYTES_TIMED = 1 << 29
"""Weights a timed graph reads at least, where the model has them: several times the L2 cache."""
_REPEATS = 5
_lock = threading.Lock()

Prepared = Sequence[Future[None]]
"""Kernels that are being compiled."""


class Times(NamedTuple):
    """Microseconds of a layer's GEMMs, with what stands between them except attention."""

    cublas: float
    ours: float


def prepare(spec: ModelSpec, *, ranks: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Start to compile what `with_table` times, beside the thread that loads the weights: together they cost less than one by one.

    `spec` is this rank's share, one of `ranks`.
    """
    if device.type != "cuda" or ranks > 1:
        return ()
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    around = {"norm": False, "gated": False, "bias": False, "residual": False}
    layers = (
        {
            **around,
            "width": heads + 2 * spec.num_kv_heads * spec.head_dim,
            "inner": hidden,
            "norm": True,
            "bias": spec.qkv_bias,
        },
        {**around, "width": hidden, "inner": heads, "residual": True, "bias": spec.output_bias},
        {**around, "width": spec.intermediate_size, "inner": hidden, "norm": True, "gated": True, "bias": spec.mlp_bias},
        {**around, "width": hidden, "inner": spec.intermediate_size, "residual": True, "bias": spec.mlp_bias},
    )

    def compiled(rows: int, layer: dict[str, Any]) -> None:
        with torch.cuda.device(device), torch.inference_mode():
            skinny_gemm.prepare(rows=rows, dtype=dtype, device=device, **layer)

    pool = ThreadPoolExecutor(4, thread_name_prefix="compile")
    futures = tuple(pool.submit(compiled, rows, layer) for rows in ROW_BUCKETS for layer in layers)
    pool.shutdown(wait=False)
    return futures


def with_table(decoder: Decoder, prepared: Prepared = (), *, path: Path | None = None) -> Decoder:
    """Return the decoder with the row buckets filled in that our kernels serve faster; measure them first if nobody has.

    On a CPU, on several ranks, for repacked weights, and where Triton can't compile our kernels it stays as it is. `prepared`:
    what is compiled meanwhile. `path`: another file than the user's.
    """
    buckets = servable(decoder)
    if decoder.norm_D.device.type != "cuda" or not buckets:
        return decoder
    from triton.errors import TritonError  # a host without a GPU needs no Triton

    try:
        for kernel in prepared:
            kernel.result()
        return replace(decoder, few_rows=faster(_times(decoder, buckets, path or table_path())))
    except TritonError as error:
        log.warning(
            "our GEMMs of few rows don't run on this GPU; cuBLAS serves every step: %s",
            error,
            extra={"event": "gemms_unavailable", "error": str(error)[:500]},
        )
        return decoder


def _times(decoder: Decoder, buckets: Sequence[int], path: Path) -> dict[int, Times]:
    """Read the table, and measure and write what it doesn't hold."""
    key = table_key(decoder)
    with _lock:
        times = read_times(path, key)
        if any(bucket not in times for bucket in buckets):
            with torch.cuda.device(decoder.norm_D.device), torch.inference_mode():
                times = measure(decoder, buckets)
            write_times(path, key, times)
    return times


def faster(times: dict[int, Times]) -> frozenset[int]:
    """Return the buckets that ours serves clearly faster."""
    return frozenset(bucket for bucket, of in times.items() if of.ours < _WORTH_CHANGING * of.cublas)


def servable(decoder: Decoder) -> tuple[int, ...]:
    """Return the buckets whose rows our kernels can multiply by every matrix of the layers."""
    parts = [part for layer in decoder.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    if any(layer.output.group.size > 1 for layer in decoder.layers) or not all(part.weight.is_plain for part in parts):
        return ()
    return tuple(rows for rows in ROW_BUCKETS if all(skinny_gemm.serves(rows, part.weight.plain) for part in parts))


def table_path() -> Path:
    """Return the user's table."""
    return Path(os.environ.get("HEADRACE_HOME") or "~/.cache/headrace").expanduser() / "gemm-table.json"


def table_key(decoder: Decoder) -> str:
    """Name all that a time depends on: the GPU, the libraries, our kernels, the shapes and the type."""
    import triton

    from kernels.gpu import rms_norm, silu_mul
    from kernels.gpu import skinny_gemm as gpu

    layer = decoder.layers[0]
    shapes = [tuple(part.weight.plain.shape) for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (gpu, rms_norm, silu_mul))
    parts = (
        torch.cuda.get_device_name(decoder.norm_D.device),
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        f"kernels {hashlib.sha256(code).hexdigest()[:12]}",
        str(decoder.norm_D.dtype).removeprefix("torch."),
        " ".join(f"{rows}x{columns}" for rows, columns in shapes),
    )
    return ", ".join(parts)


def read_times(path: Path, key: str) -> dict[int, Times]:
    """Return the times that the table holds under `key`; nothing where it is missing or no table."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[key]
        return {int(bucket): Times(float(of["cublas_us"]), float(of["ours_us"])) for bucket, of in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_times(path: Path, key: str, times: dict[int, Times]) -> None:
    """Add to the table, in one rename. A table that can't be written is measured again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        table: dict[str, object] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            table = found if isinstance(found, dict) else {}
        table[key] = {str(rows): {"cublas_us": round(of.cublas, 2), "ours_us": round(of.ours, 2)} for rows, of in times.items()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(table, file, indent=1)
        Path(file.name).replace(path)


def measure(decoder: Decoder, buckets: Sequence[int]) -> dict[int, Times]:
    """Time both ways for a full bucket of rows each, on the current device, which is the decoder's."""
    layers, eps = _some(decoder.layers), decoder.spec.norm_eps
    times: dict[int, Times] = {}
    for rows in buckets:
        x_TD = _rows_of(decoder, rows, decoder.spec.hidden_size)
        both = (_time(partial(_layers, decoder, layers, way, x_TD, eps)) / len(layers) for way in (ManyRows, FewRows))
        times[rows] = Times(*both)
    log.info(
        "GEMMs of few rows timed; the table serves every engine on such a GPU from now on",
        extra={"event": "gemms_timed", "few_rows": sorted(faster(times)), "us": {rows: list(of) for rows, of in times.items()}},
    )
    return times


def _some(layers: Sequence[Layer]) -> Sequence[Layer]:
    one = sum(part.weight.nbytes for part in (layers[0].qkv, layers[0].output, layers[0].gate_up, layers[0].down))
    return layers[: max(4, -(-_BYTES_TIMED // one))]


def _rows_of(decoder: Decoder, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device=decoder.norm_D.device).to(decoder.norm_D.dtype)


def _layers(
    decoder: Decoder, layers: Sequence[Layer], way: Callable[[Tensor, float], Residual], x_TD: Tensor, eps: float
) -> Tensor:
    """Do what a step does, except that the queries stand in for what attention gives."""
    stream = way(x_TD.clone(), eps)
    width = decoder.spec.num_heads * decoder.spec.head_dim
    for layer in layers:
        stream.add(layer.output, stream.read(layer.qkv, layer.input_norm_D)[:, :width])
        stream.add(layer.down, stream.read(layer.gate_up, layer.mlp_norm_D, gated=True))
    return stream.normed(decoder.norm_D)


def _time(run: Callable[[], Tensor]) -> float:
    """Microseconds of a replay: the least of a few."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        best = float("inf")
        for _ in range(_REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e3)
    torch.cuda.current_stream().wait_stream(stream)
    return best
