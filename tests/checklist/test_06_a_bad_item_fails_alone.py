"""Point 6: in a thousand prompts the poisonous ones (too long, a bad role, NaN logits) are errors in their places, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from device import DEVICE
from tiny_models import save_tiny_model

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig

BAD = {
    17: ("long " * 2000, "context_length_exceeded"),
    500: ([{"role": "evil", "content": "x"}], "invalid_request"),
    999: ("", "invalid_request"),
}


def test_a_thousand_prompts(pipe: AsyncEngine) -> None:
    prompts: list[Any] = [f"prompt {number}" for number in range(1000)]
    for index, (prompt, _) in BAD.items():
        prompts[index] = prompt
    answers: Any = pipe(prompts, GenerationConfig(max_new_tokens=2, ignore_eos=True))
    assert [answer.index for answer in answers] == list(range(1000))
    assert {answer.index: answer.error_code for answer in answers if answer.error_code} == {
        index: code for index, (_, code) in BAD.items()
    }
    assert all(answer.generate_token_len == 2 for answer in answers if not answer.error_code)


@pytest.mark.slow
def test_nan_logits(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from headrace import PytorchEngineConfig, pipeline

    path = save_tiny_model(tmp_path)
    weights = load_file(path / "model.safetensors")
    with pipeline(str(path), backend_config=PytorchEngineConfig(device=DEVICE, num_gpu_blocks=64)) as healthy:
        token = healthy.frontend.tokenizer.encode_chat("\x07")[0]
        expected = healthy("water", GenerationConfig(max_new_tokens=8, bad_token_ids=(token,)))
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pipeline(str(path), backend_config=PytorchEngineConfig(device=DEVICE, num_gpu_blocks=64)) as pipe:
        answers: Any = pipe(["water", "ring the \x07", "water"], GenerationConfig(max_new_tokens=8, bad_token_ids=(token,)))
    assert [answer.error_code for answer in answers] == [None, "numerical_error", None]
    assert answers[0].text == answers[2].text == expected.text  # type: ignore[union-attr]
