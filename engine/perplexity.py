"""How well the model foretells given tokens: the mean cross-entropy of a sequence, from its prompt log-probabilities."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from engine.frontend import Frontend
from engine.preparation import TokenIds
from engine.protocol import Failed
from engine.supervisor import error_of
from headrace.completion import Completion
from headrace.config import GenerationConfig
from headrace.errors import InvalidRequest

LEAST_TOKENS = 2
# One token is generated and thrown away: a request ends with a token.
_SCORE = GenerationConfig(prompt_logprobs=0, max_new_tokens=1)


def mean_cross_entropy(frontend: Frontend, input_ids: Any) -> list[float]:
    """Return for each sequence of token ids the mean of -log p(token | those before) over its tokens but the first, in nats.

    `input_ids`: one list of ids or a list of them, each of at least 2. Raise `InvalidRequest` naming the sequence that isn't,
    or the first error that the engine gives.
    """
    sequences = _sequences(input_ids)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    handles: dict[int, int] = {}
    means = [0.0] * len(sequences)
    try:
        for index, ids in enumerate(sequences):
            handles[index] = frontend.submit(TokenIds(ids), _SCORE, done.put, index=index, do_preprocess=False)
            if len(handles) >= frontend.window:
                _take(done.get(), handles, means)
        while handles:
            _take(done.get(), handles, means)
    finally:  # one failed: nobody waits for the others
        for handle in handles.values():
            frontend.abort(handle)
    return means


def _take(completion: Completion, handles: dict[int, int], means: list[float]) -> None:
    del handles[completion.index]
    if completion.error is not None:
        failed = Failed(completion.error.code, f"sequence {completion.index}: {completion.error.message}", "input_ids")
        error = error_of(failed)
        error.index = completion.index
        raise error
    scores = completion.prompt_logprobs
    assert scores, "the engine gave no log-probabilities for a prompt that asked for them"
    means[completion.index] = -sum(one.logprob for one in scores) / len(scores)


def _sequences(input_ids: Any) -> list[tuple[int, ...]]:
    """Tell one sequence from several. Anything with `tolist` (a tensor, an array) is taken by its values."""
    values = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InvalidRequest("input_ids is a list of token ids or a list of such lists", param="input_ids")
    several = [one.tolist() if hasattr(one, "tolist") else one for one in values]
    if all(_is_id(one) for one in several):
        several = [several] if several else []
    for index, ids in enumerate(several):
        if not isinstance(ids, list | tuple) or not all(_is_id(one) for one in ids):
            raise InvalidRequest(f"input_ids[{index}] is not a list of token ids", param="input_ids", index=index)
        if len(ids) < LEAST_TOKENS:
            message = (
                f"input_ids[{index}] has {len(ids)} tokens; the first has nothing before it, so give at least {LEAST_TOKENS}"
            )
            raise InvalidRequest(message, param="input_ids", index=index)
    return [tuple(ids) for ids in several]


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
