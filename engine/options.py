"""What an engine runs with, resolved: no None, no 'auto', no field that this build can't honour.

`resolve` turns a caller's config (of either class) into `EngineOptions`, or refuses a field by name. It reads the model's
JSON files, never its weights, and creates no CUDA context.
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

from engine.model_info import ModelInfo, locate_model, read_config
from engine.models.spec import ModelSpec
from headrace.config import PytorchEngineConfig, TurbomindEngineConfig
from headrace.errors import InvalidRequest, ModelLoadError, UnsupportedOption

log = logging.getLogger(__name__)

DTypeName = Literal["float32", "float16", "bfloat16"]
DeviceName = Literal["cpu", "cuda"]

# What `max_batch_size=None` stands for on GPUs of at least so many GiB. 8B on one H200 made 29 % more tokens a second with 1,024 than with 128
# (docs/decisions/0017); but each running request needs room for its logits, which on a small GPU would take the KV pool's place.
_MAX_RUNNING = ((64, 1024), (40, 512), (20, 256), (0, 128))
_MAX_RUNNING_ON_CPU = 128
_ASKING_S = 20.0
"""A driver that nothing keeps awake has to start first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Resolved engine options; the same on every rank. Fields mean what they mean in `PytorchEngineConfig`."""

    model_path: str
    """A local directory."""
    tp: int
    session_len: int
    max_batch_size: int
    block_size: int
    num_blocks: int
    """KV blocks in the pool; 0: as many as `cache_max_entry_count` of the free memory holds."""
    max_prefill_token_num: int
    prefill_interval: int
    cache_max_entry_count: float
    enable_prefix_caching: bool
    quant_policy: Literal[0, 8]
    rope_scaling_factor: float
    use_logn_attn: bool
    dtype: DTypeName
    device: DeviceName
    eager_mode: bool
    template_name: str | None

    @property
    def max_blocks_per_sequence(self) -> int:
        """Blocks that one sequence of `session_len` tokens fills."""
        return -(-self.session_len // self.block_size)

    @property
    def int8_kv(self) -> bool:
        """Whether the KV pool holds 8-bit integers."""
        return self.quant_policy == 8

    def model_spec(self) -> ModelSpec:
        """Read the whole model's config.json, with what these options change of it."""
        return ModelSpec.read(
            read_config(Path(self.model_path)),
            rope_scaling_factor=self.rope_scaling_factor,
            use_logn_attn=self.use_logn_attn,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict` form."""
        return cls(**data)


def resolve(model_path: str | Path, backend_config: PytorchEngineConfig | TurbomindEngineConfig | None = None) -> EngineOptions:
    """Find the model and settle every option.

    Raise `UnsupportedOption` or `InvalidRequest` with the field as `param`, or `ModelLoadError`.
    """
    config = backend_config if backend_config is not None else PytorchEngineConfig()
    layout = None
    if isinstance(config, TurbomindEngineConfig):
        layout, config = config.model_format, _from_turbomind(config)
    if not isinstance(config, PytorchEngineConfig):
        kind = type(config).__name__
        raise InvalidRequest(
            f"backend_config is a PytorchEngineConfig or a TurbomindEngineConfig, not {kind}", param="backend_config"
        )
    _refuse_unsupported(config)
    path = locate_model(model_path)
    info = ModelInfo.read(path)
    spec = ModelSpec.read(read_config(path), rope_scaling_factor=config.rope_scaling_factor, use_logn_attn=config.use_logn_attn)
    spec.shard(config.tp)  # an unknown architecture or a tp that doesn't divide is refused here
    if layout is not None and layout != (found := "hf" if spec.awq_group is None else "awq"):
        raise InvalidRequest(
            f"model_format={layout!r}, but the checkpoint in {path} is {found!r} by its config.json; leave model_format at None",
            param="model_format",
        )
    device = _device(config)
    return EngineOptions(
        model_path=info.path,
        tp=config.tp,
        session_len=_session_len(config.session_len, info, spec),
        max_batch_size=config.max_batch_size or _max_running(device),
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks,
        max_prefill_token_num=config.max_prefill_token_num,
        prefill_interval=config.prefill_interval,
        cache_max_entry_count=config.cache_max_entry_count,
        enable_prefix_caching=config.enable_prefix_caching,
        quant_policy=config.quant_policy,
        rope_scaling_factor=config.rope_scaling_factor,
        use_logn_attn=config.use_logn_attn,
        dtype=_dtype(config, info, device),
        device=device,
        eager_mode=config.eager_mode,
        template_name=config.model_name,
    )


def _from_turbomind(config: TurbomindEngineConfig) -> PytorchEngineConfig:
    """Map field by field onto the one engine; a whole number in `cache_max_entry_count` counts blocks."""
    if config.model_format == "llama":
        raise UnsupportedOption(
            "model_format='llama' is not supported by this build; give a Hugging Face directory", param="model_format"
        )
    if config.quant_policy == 4:
        log.warning(
            "quant_policy=4 is the document's number for an 8-bit KV cache, and that is what runs; later releases mean 4 bits by it: say 8",
            extra={"event": "quant_policy_by_document"},
        )
    pool = config.cache_max_entry_count
    sizes: dict[str, Any] = {"num_gpu_blocks": int(pool)} if pool >= 1 else {"cache_max_entry_count": float(pool)}
    return PytorchEngineConfig(
        model_name=config.model_name,
        tp=config.tp,
        session_len=config.session_len,
        max_batch_size=config.max_batch_size,
        quant_policy=8 if config.quant_policy else 0,
        rope_scaling_factor=config.rope_scaling_factor,
        use_logn_attn=config.use_logn_attn,
        **sizes,
    )


def _refuse_unsupported(config: PytorchEngineConfig) -> None:
    if config.eviction_type != "recompute":
        raise UnsupportedOption("eviction_type='copy' is not supported by this build; use 'recompute'", param="eviction_type")
    if config.num_cpu_blocks:
        raise UnsupportedOption(
            "num_cpu_blocks is not supported by this build (nothing is swapped to the host); leave it at 0",
            param="num_cpu_blocks",
        )
    if config.adapters:
        raise UnsupportedOption("adapters are not supported by this build; merge the adapter into the model", param="adapters")


def _session_len(wanted: int | None, info: ModelInfo, spec: ModelSpec) -> int:
    rope, longest = spec.rope, info.max_length
    if rope.kind == "dynamic":
        longest = max(longest, int(rope.original_max_positions * rope.factor))
    elif wanted is not None and wanted > longest:
        hint = "; rope_scaling_factor goes beyond them" if rope.kind == "default" else ""
        raise InvalidRequest(
            f"session_len={wanted} is more than the {longest} positions of {info.architecture} in {info.path}{hint}",
            param="session_len",
        )
    session_len = wanted or longest
    trained = spec.logn_from or (rope.original_max_positions if rope.kind == "dynamic" else None)
    if trained is not None and session_len <= trained:
        log.warning(
            "no sequence of session_len=%d outgrows the %d positions that the model was trained with: neither rope_scaling_factor nor "
            "use_logn_attn changes anything; raise session_len",
            session_len,
            trained,
            extra={"event": "scaling_unused", "session_len": session_len, "trained": trained},
        )
    return session_len


def _device(config: PytorchEngineConfig) -> DeviceName:
    if config.device == "cpu":
        return "cpu"
    import torch  # only here; device_count asks NVML and creates no CUDA context in this process

    count = torch.cuda.device_count()
    if config.device == "auto" and count == 0:
        return "cpu"
    if count == 0:
        raise InvalidRequest("device='cuda' but this host shows no CUDA device; use device='cpu' or 'auto'", param="device")
    if config.tp > count:
        raise InvalidRequest(f"tp={config.tp} needs as many CUDA devices; this host shows {count}", param="tp")
    return "cuda"


def _max_running(device: DeviceName) -> int:
    """Give what a device runs at once where nobody says it; among GPUs the host's smallest counts."""
    if device == "cpu":
        return _MAX_RUNNING_ON_CPU
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        # Asking the driver costs no CUDA context, which the parent of engines would hold on the GPU for one number.
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_S, check=True).stdout  # noqa: S603  # fixed words
        gib = min(int(line) for line in said.splitlines()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        gib = _MAX_RUNNING[0][0]
        log.warning(
            "nvidia-smi doesn't say how much memory the GPU has (%s): it is taken for a large one; set max_batch_size for a small one",
            error,
            extra={"event": "gpu_memory_unknown"},
        )
    return next(count for least, count in _MAX_RUNNING if gib >= least)


def _dtype(config: PytorchEngineConfig, info: ModelInfo, device: DeviceName) -> DTypeName:
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        return "float32"  # CPUs without bf16 instructions run bf16 two to three times slower than fp32
    if info.dtype not in ("float32", "float16", "bfloat16"):
        raise ModelLoadError(
            f"the checkpoint in {info.path} has dtype {info.dtype!r}; say dtype='bfloat16' to convert it", param="dtype"
        )
    return cast("DTypeName", info.dtype)
