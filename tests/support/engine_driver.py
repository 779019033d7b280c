"""Runs real models through `Engine`, on the CPU unless told otherwise, and through transformers one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device import DEVICE

from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.guidance import Guides
from engine.options import resolve
from engine.request import TokenOutput, TokenRequest
from headrace.config import GenerationConfig, PytorchEngineConfig


def make_engine(path: Path, **config: Any) -> Engine:
    """An engine of `PytorchEngineConfig` fields, float32."""
    options = resolve(path, PytorchEngineConfig(device=DEVICE, dtype="float32", **config))
    return Engine(LocalExecutor(options), options, guides=Guides(options.model_path))


def token_request(
    name: str, prompt: Sequence[int], *, max_new_tokens: int, eos_ids: tuple[int, ...] = (2,), **config: Any
) -> TokenRequest:
    return TokenRequest(
        request_id=name,
        prompt_ids=tuple(prompt),
        config=GenerationConfig(max_new_tokens=max_new_tokens, **{"top_k": 1, **config}),
        seed=int(name) + 1 if name.isdigit() else 0,
        choice=0,
        max_new_tokens=max_new_tokens,
        limit="max_new_tokens",
        eos_ids=eos_ids,
    )


def run(engine: Engine, requests: Sequence[TokenRequest]) -> dict[str, TokenOutput]:
    """Add all requests at once and step until all are done."""
    for one in requests:
        engine.add(one)
    last: dict[str, TokenOutput] = {}
    while engine.has_work:
        for output in engine.step():
            last[output.request_id] = output
    return last


def texts(outputs: dict[str, TokenOutput]) -> list[list[int]]:
    assert all(output.error is None for output in outputs.values()), outputs
    return [list(outputs[name].token_ids) for name in sorted(outputs, key=int)]


def transformers_greedy(model: Any, prompt: Sequence[int], *, max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
    """The tokens that `generate` appends to one prompt, without the end-of-sequence token."""
    import torch

    config: dict[str, Any] = {"eos_token_id": None} if ignore_eos else {}
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **config
        )
    tokens = out[0, len(prompt) :].tolist()
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return tokens[:-1] if not ignore_eos and tokens and tokens[-1] in stops else tokens
