"""Which GEMMs serve a step of few rows: PyTorch's (cuBLAS) or ours, measured once for each GPU, shape and version of the code.

The times go to `gemm-table.json` under $HEADRACE_HOME (or ~/.cache/headrace), so that two engines of one machine choose alike: the
two ways round differently. What is timed is what a step does between two attentions, over several layers' weights, in a
captured graph. Knows nothing of requests, and nothing of how a kernel is cut (`kernels.gpu.skinny_gemm`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import measured_table
from engine.captured_time import captured_us
from engine.models.decoder import ROW_BUCKETS, Decoder, Layer
from engine.models.spec import ModelSpec
from kernels import skinny_gemm

log = logging.getLogger(__name__)

_WORTH_CHANGING = 0.99
"""Ours serves where it needs at most this share of cuBLAS's time: less may be noise."""
_BYTES_TIMED = 1 << 29
"""Weights a timed graph reads at least, where the model has them: several times the L2 cache."""

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
    if device.type != "cuda":
        return ()
    from kernels.gpu.launchers import load_one_at_a_time  # a host without a GPU needs no Triton

    load_one_at_a_time()
    alone = ranks == 1  # among several ranks the sum takes the residual and the norm with it
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    around = {"norm": False, "gated": False, "bias": False, "residual": False}
    layers = (
        {
            **around,
            "width": heads + 2 * spec.num_kv_heads * spec.head_dim,
            "inner": hidden,
            "norm": alone,
            "bias": spec.qkv_bias,
        },
        {**around, "width": hidden, "inner": heads, "residual": alone, "bias": spec.output_bias},
        {**around, "width": spec.intermediate_size, "inner": hidden, "norm": alone, "gated": True, "bias": spec.mlp_bias},
        {**around, "width": hidden, "inner": spec.intermediate_size, "residual": alone, "bias": spec.mlp_bias},
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

    On a CPU, on ranks that can't reach each other's memory, for repacked weights, and where Triton can't compile our kernels it stays as it is. `prepared`:
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
    """Read the table, and measure and write what it doesn't hold: the same on every rank."""

    def timed() -> measured_table.Rows:
        with torch.cuda.device(decoder.norm_D.device), torch.inference_mode():
            return _to_rows(measure(decoder, buckets))

    rows = [str(bucket) for bucket in buckets]
    return _from_rows(
        measured_table.read_or_measure(decoder.group, path, table_key(decoder), rows, ("cublas_us", "ours_us"), timed)
    )


def faster(times: dict[int, Times]) -> frozenset[int]:
    """Return the buckets that ours serves clearly faster."""
    return frozenset(bucket for bucket, of in times.items() if of.ours < _WORTH_CHANGING * of.cublas)


def servable(decoder: Decoder) -> tuple[int, ...]:
    """Return the buckets whose rows our kernels can multiply by every matrix of the layers."""
    parts = [part for layer in decoder.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    summed = decoder.group.size == 1 or decoder.group.sums is not None
    if not summed or not all(part.weight.is_plain for part in parts):
        return ()
    return tuple(rows for rows in ROW_BUCKETS if all(skinny_gemm.serves(rows, part.weight.plain) for part in parts))


def table_path() -> Path:
    """Return the user's table."""
    return measured_table.home() / "gemm-table.json"


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
        *([f"rank of {decoder.group.size}"] if decoder.group.size > 1 else []),
        f"kernels {hashlib.sha256(code).hexdigest()[:12]}",
        str(decoder.norm_D.dtype).removeprefix("torch."),
        " ".join(f"{rows}x{columns}" for rows, columns in shapes),
    )
    return ", ".join(parts)


def read_times(path: Path, key: str) -> dict[int, Times]:
    """Read the times that the table holds under `key`; nothing where it is missing or no table."""
    try:
        return _from_rows(measured_table.read(path, key))
    except (ValueError, KeyError):
        return {}


def write_times(path: Path, key: str, times: dict[int, Times]) -> None:
    """Add to the table. One that can't be written is measured again next time."""
    measured_table.write(path, key, _to_rows(times))


def _from_rows(rows: measured_table.Rows) -> dict[int, Times]:
    return {int(bucket): Times(of["cublas_us"], of["ours_us"]) for bucket, of in rows.items()}


def _to_rows(times: dict[int, Times]) -> dict[str, dict[str, float]]:
    return {str(rows): {"cublas_us": of.cublas, "ours_us": of.ours} for rows, of in times.items()}


def measure(decoder: Decoder, buckets: Sequence[int]) -> dict[int, Times]:
    """Time both ways for a full bucket of rows each, on the current device, which is the decoder's."""
    layers = _some(decoder.layers)
    times: dict[int, Times] = {}
    for rows in buckets:
        x_TD = _rows_of(decoder, rows, decoder.spec.hidden_size)
        both = (captured_us(partial(_layers, decoder, layers, few, x_TD)) / len(layers) for few in (False, True))
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


def _layers(decoder: Decoder, layers: Sequence[Layer], few: bool, x_TD: Tensor) -> Tensor:  # noqa: FBT001  # bound by `partial`
    """Do what a step does, except that the queries stand in for what attention gives."""
    stream = decoder.residual(x_TD.clone(), few=few)
    width = decoder.spec.num_heads * decoder.spec.head_dim
    for layer in layers:
        stream.add(layer.output, stream.read(layer.qkv, layer.input_norm_D)[:, :width])
        stream.add(layer.down, stream.read(layer.gate_up, layer.mlp_norm_D, gated=True))
    return stream.normed(decoder.norm_D)
