"""Requests and shapes of an engine, drawn by hypothesis for the fake device."""

from __future__ import annotations

from fake_device import STOP, request
from hypothesis import strategies as st

prompts = st.lists(st.integers(3, 6), min_size=1, max_size=40)


@st.composite
def jobs(draw):
    """Requests that often share prefixes: few token values, and some prompts extend others."""
    made = draw(st.lists(prompts, min_size=1, max_size=8))
    out = []
    for index, own in enumerate(made):
        base = made[draw(st.integers(0, index))] if draw(st.booleans()) else []
        choices = draw(st.sampled_from([1, 1, 2, 5]))
        fields = {
            "max_new_tokens": draw(st.integers(1, 40)),
            "stream": draw(st.booleans()),
            "ignore_eos": draw(st.booleans()),
            "min_new_tokens": draw(st.integers(0, 3)),
            "stop_ids": (STOP,) if draw(st.booleans()) else (),
            "logprobs": draw(st.sampled_from([None, 0])),
            "prompt_logprobs": draw(st.sampled_from([None, None, 0])),
            "family": None if choices == 1 else f"r{index}",
        }
        out += [request(f"r{index}-{choice}", (base + own)[:60], choice=choice, **fields) for choice in range(choices)]
    return out


shapes = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 6),
        "max_prefill_token_num": st.integers(1, 70),
        "prefill_interval": st.integers(1, 20),
        "enable_prefix_caching": st.booleans(),
        "block_size": st.sampled_from([4, 16]),
    }
)
