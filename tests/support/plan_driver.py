"""Drives an executor with hand-made plans: no scheduler, every choice (chunks, batch mates, blocks) is the test's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.options import EngineOptions, resolve
from engine.plan import Admission, Executor, PlanRow, StepOutput, StepPlan
from engine.request import TokenRequest
from headrace.config import GenerationConfig, PytorchEngineConfig


def options_for(path: object, **fields: Any) -> EngineOptions:
    """Resolve options for a tiny model on the CPU: 8 slots, 64 blocks."""
    return resolve(str(path), PytorchEngineConfig(**{"device": "cpu", "max_batch_size": 8, "num_gpu_blocks": 64, **fields}))


def request(prompt_ids: Sequence[int], *, seed: int = 0, choice: int = 0, request_id: str = "r", **fields: Any) -> TokenRequest:
    own = {name: fields.pop(name) for name in ("eos_ids", "stop_ids", "bad_sequences") if name in fields}
    config = GenerationConfig(**{"top_k": 1, **fields})
    return TokenRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        config=config,
        seed=seed,
        choice=choice,
        max_new_tokens=config.max_new_tokens or 1,
        limit="max_new_tokens",
        **own,
    )


def generate(
    executor: Executor,
    requests: Sequence[TokenRequest],
    *,
    steps: int,
    block_size: int,
    chunk: int = 10_000,
    overlap: bool = False,
) -> tuple[list[list[int]], list[StepOutput]]:
    """Run all requests side by side, one slot each, for `steps` tokens each; prompts in chunks of at most `chunk` tokens.

    Blocks are handed out backwards, so that a table is never 0, 1, 2 … With `overlap` a step is launched before the one before
    it is read, as the engine does. Gives each request's tokens and all outputs.
    """
    free = list(range(executor.num_blocks))
    done = [0] * len(requests)  # tokens computed
    owned = [0] * len(requests)  # blocks
    made = [0] * len(requests)  # tokens chosen
    tokens: list[list[int]] = [[] for _ in requests]
    outputs: list[StepOutput] = []
    unread: tuple[Any, list[int]] | None = None
    step = 0
    while any(count < steps for count in made):
        rows, sampling = [], []
        for slot, one in enumerate(requests):
            if made[slot] >= steps:
                continue
            known = len(one.prompt_ids) + made[slot]
            count = min(chunk, known - done[slot])
            samples = done[slot] + count == known
            need = -(-(done[slot] + count) // block_size) - owned[slot]
            blocks = tuple(free.pop() for _ in range(need))
            owned[slot] += need
            rows.append(PlanRow(slot, done[slot], count, samples, made[slot], blocks))
            done[slot] += count
            made[slot] += samples
        rows.sort(key=lambda row: row.count != 1)
        sampling = [row.slot for row in rows if row.samples]
        admitted = tuple(Admission(slot, one, one.prompt_ids, ()) for slot, one in enumerate(requests)) if step == 0 else ()
        running = executor.launch(StepPlan(step=step, admitted=admitted, rows=tuple(rows)))
        pending, unread = unread, (running, sampling)
        if not overlap:
            pending, unread = unread, None
        if pending:
            _read(pending, tokens, outputs)
        step += 1
    if unread:
        _read(unread, tokens, outputs)
    return tokens, outputs


def _read(pending: tuple[Any, list[int]], tokens: list[list[int]], outputs: list[StepOutput]) -> None:
    output = pending[0].result()
    outputs.append(output)
    assert len(output.tokens) == len(pending[1])
    for slot, token in zip(pending[1], output.tokens, strict=True):
        tokens[slot].append(token)
