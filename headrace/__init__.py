"""headrace: asynchronous batch inference. A million prompts in, every answer out, exactly once.

Names are imported when they are first used, so that `import headrace` costs no torch, no SQL and no HTTP client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.batch import Batch, BatchStatus, RequestCounts
    from headrace.client import Client
    from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs, TokenUsage
    from headrace.config import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
    from headrace.errors import (
        Conflict,
        ContextLengthExceeded,
        EngineError,
        HeadersTooLarge,
        HeadraceError,
        InvalidRequest,
        KVCapacity,
        ModelLoadError,
        ModelNotFound,
        NotFound,
        NumericalError,
        PayloadTooLarge,
        PoisonPrompt,
        QueueFull,
        QueueUnavailable,
        QuotaExceeded,
        RankLost,
        RequestAborted,
        ServiceUnavailable,
        StorageFull,
        StoreUnavailable,
        Unauthorized,
        UnsupportedOption,
    )
    from headrace.offline import pipeline
    from headrace.response import Response

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "BatchStatus",
    "ChatTemplateConfig",
    "Choice",
    "Client",
    "Completion",
    "CompletionError",
    "Conflict",
    "ContextLengthExceeded",
    "EngineError",
    "GenerationConfig",
    "HeadersTooLarge",
    "HeadraceError",
    "InvalidRequest",
    "KVCapacity",
    "ModelLoadError",
    "ModelNotFound",
    "NotFound",
    "NumericalError",
    "PayloadTooLarge",
    "PoisonPrompt",
    "PytorchEngineConfig",
    "QueueFull",
    "QueueUnavailable",
    "QuotaExceeded",
    "RankLost",
    "RequestAborted",
    "RequestCounts",
    "Response",
    "ServiceUnavailable",
    "StorageFull",
    "StoreUnavailable",
    "TokenLogprobs",
    "TokenUsage",
    "TurbomindEngineConfig",
    "Unauthorized",
    "UnsupportedOption",
    "pipeline",
]

_HOMES = {
    **dict.fromkeys(("Batch", "BatchStatus", "RequestCounts"), "headrace.batch"),
    **dict.fromkeys(("Choice", "Completion", "CompletionError", "TokenLogprobs", "TokenUsage"), "headrace.completion"),
    **dict.fromkeys(
        ("ChatTemplateConfig", "GenerationConfig", "PytorchEngineConfig", "TurbomindEngineConfig"), "headrace.config"
    ),
    "Client": "headrace.client",
    "Response": "headrace.response",
    "pipeline": "headrace.offline",
}
"""Where a public name lives; every other name of `__all__` is an error."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "headrace.errors")), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
