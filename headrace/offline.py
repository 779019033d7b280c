"""The door to the engine in this process: `pipeline(model)(prompts)`, with no Redis, no SQL and no server.

The one module of this package that reaches for the engine, and only when `pipeline` is called.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from headrace.config import ChatTemplateConfig, EngineConfig
from headrace.log import configure

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine


def pipeline(
    model_path: str,
    model_name: str | None = None,
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "ERROR",
) -> AsyncEngine:
    """Load a model and return the object to call with prompts.

    `model_path`: a Hugging Face directory, a hub id, or 'smollm2'. `model_name`: the name of a chat template (None: the
    tokenizer's own). `log_level`: of headrace's records on stderr.
    Raise `InvalidRequest` or `UnsupportedOption` naming an option, `ModelLoadError`, or `EngineError` with the engine's last words;
    `ImportError` where only the client part of headrace is installed.
    """
    configure(log_level)
    try:
        from engine.async_engine import AsyncEngine
    except ModuleNotFoundError as error:
        if error.name not in ("engine", "engine.async_engine", "torch", "transformers"):
            raise
        hidden_by = getattr(sys.modules.get("engine"), "__file__", None)
        if error.name == "engine.async_engine" and hidden_by is not None:
            raise ImportError(
                f"{hidden_by} hides headrace's package 'engine', which pipeline() needs; give that file another name",
                name=error.name,
                path=hidden_by,
            ) from error
        raise ImportError(
            f"pipeline() needs the engine, and {error.name!r} isn't installed: a wheel of headrace holds the client only. "
            "Clone the repository and run `pip install -e .` in it.",
            name=error.name,
        ) from error
    return AsyncEngine(
        model_path, model_name=model_name, backend_config=backend_config, chat_template_config=chat_template_config
    )
