"""Every architecture against transformers: the same logits, the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_driver import generate, options_for, request
from tiny_models import save_tiny_model

from engine.executor import LocalExecutor
from engine.models.loading import load_decoder
from engine.models.spec import ARCHITECTURES, ModelSpec
from engine.parallel import SingleRank
from engine.plan import Admission, PlanRow, StepPlan
from engine.profile import _step_of
from headrace.errors import InvalidRequest, ModelLoadError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-layer-types": ("mistral", {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33, list(range(300, 316))]
STEPS = 12


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = VARIANTS[request.param]
    path = save_tiny_model(tmp_path_factory.mktemp(request.param), architecture, **overrides)
    _randomise_vectors(path)
    return path


def _randomise_vectors(path: Path) -> None:
    """Biases of 0 and norms of 1, as random models have them, would hide a forgotten or a swapped one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor)
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})


def reference_greedy(path: Path, prompt: list[int], steps: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_logits_equal_transformers(variant: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = options_for(variant, max_prefill_token_num=70, session_len=70)
    decoder = load_decoder(variant, dtype=torch.float32, device=torch.device("cpu"), group=SingleRank(), max_positions=128)
    spec = decoder.spec
    from engine.kv_cache import allocate

    caches = allocate(spec, num_blocks=2, block_size=64, dtype=torch.float32, device=torch.device("cpu"))
    inputs = _step_of(70, options, device=torch.device("cpu"))
    prompt = torch.tensor(PROMPTS[0])
    with torch.inference_mode():
        ours = decoder.forward(inputs._replace(tokens_T=prompt, sampled_R=None), caches)
        theirs = AutoModelForCausalLM.from_pretrained(str(variant), dtype=torch.float32)(prompt[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_greedy_tokens_equal_transformers_batched_and_chunked(variant: Path) -> None:
    expected = [reference_greedy(variant, prompt, STEPS) for prompt in PROMPTS]
    for block_size, chunk, overlap in ((64, 10_000, False), (16, 10_000, True), (32, 7, False)):
        executor = LocalExecutor(options_for(variant, block_size=block_size))
        tokens, _ = generate(
            executor, [request(prompt) for prompt in PROMPTS], steps=STEPS, block_size=block_size, chunk=chunk, overlap=overlap
        )
        assert tokens == expected, (block_size, chunk)


def test_one_by_one_equals_batched(tiny_model_dir: Path) -> None:
    executor = LocalExecutor(options_for(tiny_model_dir))
    together, _ = generate(executor, [request(prompt) for prompt in PROMPTS], steps=STEPS, block_size=64)
    alone = [generate(executor, [request(prompt)], steps=STEPS, block_size=64)[0][0] for prompt in PROMPTS]
    assert alone == together


def test_a_cached_prefix_is_read_where_another_request_wrote_it(tiny_model_dir: Path) -> None:
    executor = LocalExecutor(options_for(tiny_model_dir, block_size=16))
    first, second = [*range(5, 37), 40, 41], [*range(5, 37), 90, 91, 92]
    expected, _ = generate(executor, [request(second)], steps=4, block_size=16)
    writer = request(first)
    plan = StepPlan(
        step=0, admitted=(Admission(2, writer, writer.prompt_ids, ()),), rows=(PlanRow(2, 0, 34, True, 0, (7, 3, 9)),)
    )
    executor.launch(plan)
    reader = request(second)
    shared = Admission(5, reader, reader.prompt_ids, (7, 3))
    tokens = list(
        executor.launch(StepPlan(step=1, admitted=(shared,), rows=(PlanRow(5, 32, 3, True, 0, (1,)),))).result().tokens
    )
    for index in (1, 2, 3):
        tokens += (
            executor.launch(StepPlan(step=2, admitted=(), rows=(PlanRow(5, 34 + index, 1, True, index, ()),))).result().tokens
        )
    assert [tokens] == expected


def test_unknown_architecture_is_refused_naming_the_supported(tiny_model_dir: Path) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="MambaForCausalLM") as refused:
        ModelSpec.read({**config, "architectures": ["MambaForCausalLM"]})
    assert all(name in refused.value.message for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "awq"}, "without 'quant_method'"),
        ({"quantization_config": {"bits": 4}}, "without 'quant_method'"),
        ({"quantization_config": {"quant_method": "awq", "group_size": True}}, "group_size"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "bits=8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "GEMV"}}, "version='GEMV'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": False}}, "zero_point=False"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}}, "group_size"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny_model_dir: Path, change: dict[str, Any], named: str) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    with pytest.raises(ModelLoadError, match=named):
        ModelSpec.read({**config, **change})


def test_old_and_new_rope_fields_mean_the_same() -> None:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = ModelSpec.read({**base, "rope_theta": 500000.0, "rope_scaling": scaling})
    older = ModelSpec.read(
        {
            **base,
            "rope_theta": 500000.0,
            "rope_scaling": {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}},
        }
    )
    new = ModelSpec.read({**base, "rope_parameters": LLAMA3})
    assert old == new == older


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("mistral", {}), ("qwen2", {}), ("qwen2", {"use_sliding_window": True}), ("qwen3", {"use_sliding_window": True})],
)
def test_windows_that_a_config_does_not_say_are_those_of_transformers(architecture: str, said: dict[str, Any]) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 40}
    theirs = AutoConfig.for_model(architecture, **sizes, **said)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 40
    ours = ModelSpec.read({"architectures": [f"{architecture.capitalize()}ForCausalLM"], **sizes, **said})
    assert ours.windows == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in types)
    assert any(ours.windows) == (architecture == "mistral" or bool(said))


@pytest.mark.parametrize(("tp", "ok"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_tp_must_divide_the_heads(tiny_model_dir: Path, tp: int, ok: bool) -> None:
    spec = ModelSpec.read(json.loads((tiny_model_dir / "config.json").read_text()))
    if ok:
        assert spec.shard(tp).num_heads * tp == 4
        assert spec.shard(tp).num_kv_heads == max(1, 2 // tp)
    else:
        with pytest.raises(InvalidRequest, match=f"tp={tp}") as refused:
            spec.shard(tp)
        assert refused.value.param == "tp"
