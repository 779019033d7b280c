"""Point 4: a bare call samples with the document's defaults, `GenerationConfig()` is greedy, and `gen_config` wins with a warning."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from engine.async_engine import LEGACY_DEFAULTS, AsyncEngine
from headrace import GenerationConfig, InvalidRequest, Response

GREEDY = GenerationConfig(max_new_tokens=8)


def one(answer: object) -> Response:
    assert isinstance(answer, Response)
    return answer


def test_a_bare_call_samples(pipe: AsyncEngine) -> None:
    assert dict(LEGACY_DEFAULTS) == {
        "request_output_len": 512,
        "top_k": 40,
        "top_p": 0.8,
        "temperature": 0.8,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({response.text for response in pipe(["water"] * 4)}) > 1  # type: ignore[union-attr]


def test_the_default_config_is_greedy(pipe: AsyncEngine) -> None:
    assert GenerationConfig().is_greedy
    assert len({response.text for response in pipe(["water"] * 4, GREEDY)}) == 1  # type: ignore[union-attr]
    assert pipe.batch_infer("water") == pipe("water", GenerationConfig())


def test_deprecated_arguments_warn_and_count(pipe: AsyncEngine) -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        answer = one(pipe("water", request_output_len=6, ignore_eos=True, top_k=1))
    assert answer.generate_token_len == 6
    assert sorted(str(w.message).split()[0] for w in caught) == ["ignore_eos", "request_output_len", "top_k"]
    assert answer.token_ids == one(pipe("water", GenerationConfig(max_new_tokens=6, ignore_eos=True))).token_ids


@pytest.mark.parametrize("wrong", [{"top_k": 3}, [GREEDY], [], "greedy", 0], ids=repr)
def test_what_is_no_gen_config_is_refused_by_name(pipe: AsyncEngine, wrong: Any) -> None:
    async def generate() -> None:
        async for _ in pipe.generate("water", wrong):
            pass

    calls = [
        lambda: asyncio.run(generate()),
        lambda: pipe.chat("water", gen_config=wrong),
        lambda: pipe(iter(["water"]), wrong),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match="GenerationConfig") as refused:
            call()  # type: ignore[no-untyped-call]
        assert refused.value.param == "gen_config"


def test_gen_config_wins_with_a_warning(pipe: AsyncEngine) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loud = pipe("water", GREEDY, request_output_len=3, temperature=2.0)
    assert loud == pipe("water", GREEDY)
    assert [w.category for w in caught] == [DeprecationWarning, DeprecationWarning, UserWarning]
    assert "request_output_len, temperature is ignored" in str(caught[-1].message)
