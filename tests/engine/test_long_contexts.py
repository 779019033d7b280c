"""Beyond the trained length: ropes stretched from sequence to sequence against transformers, and logn attention by its definition."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import make_engine, run, texts, token_request, transformers_greedy
from plan_driver import options_for
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from engine.executor import LocalExecutor
from engine.model_info import ModelInfo
from engine.models.loading import load_decoder
from engine.models.spec import ModelSpec, RopeSpec
from engine.options import resolve
from engine.parallel import SingleRank
from engine.preparation import Preparer
from engine.profile import _step_of
from engine.request import TokenRequest
from engine.templates import choose_template
from engine.tokenizer import Tokenizer
from headrace import GenerationConfig, InvalidRequest, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from headrace.errors import ModelLoadError

TRAINED, THETA, HEAD_DIM = 64, 10000.0, 16
IDS = [(7 * place + 3) % 290 + 5 for place in range(200)]
ENGINE: dict[str, Any] = {"session_len": 200, "num_gpu_blocks": 64, "block_size": 16, "max_batch_size": 4}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained with 64 positions."""
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param, max_position_embeddings=TRAINED)


def theirs(path: Path, **rope: Any) -> Any:
    rope_parameters = {"rope_type": "default", "rope_theta": THETA, **rope}
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, rope_parameters=rope_parameters)


def job(name: int, prompt: list[int], length: int, factor: float) -> TokenRequest:
    """A request as the frontend makes it."""
    stretch = RopeSpec(kind="dynamic", factor=factor, original_max_positions=TRAINED).stretch(len(prompt) + length)
    return replace(token_request(str(name), prompt, max_new_tokens=length, eos_ids=()), rope_stretch=stretch)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_token_at_a_length_is_that_of_dynamic_ntk(path: Path, factor: float) -> None:
    """Four reaches side by side, two of them short. Transformers stretches by the length of the pass, so that must be the reach."""
    reaches = (30, TRAINED, 90, 200)
    expected = []
    for reach in reaches:
        with torch.inference_mode():
            logits = theirs(path, rope_type="dynamic", factor=factor)(torch.tensor([IDS[:reach]])).logits[0]
        expected.append([int(logits[reach - 2].argmax())])
    engine = make_engine(path, rope_scaling_factor=factor, **ENGINE)
    assert texts(run(engine, [job(n, IDS[: reach - 1], 1, factor) for n, reach in enumerate(reaches)])) == expected


def test_a_sequence_keeps_its_base_from_start_to_end(path: Path) -> None:
    """As a model of that base would answer: batched, and found again in the cache."""
    factor, prompts = 2.0, [IDS[:20], IDS[:70], IDS[3:150], IDS[:70]]
    lengths = [10, 40, 30, 90]
    jobs = [job(n, prompt, length, factor) for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))]
    expected = []
    for one in jobs:
        model = theirs(path, rope_theta=THETA * one.rope_stretch ** (HEAD_DIM / (HEAD_DIM - 2)))
        expected.append(transformers_greedy(model, one.prompt_ids, max_new_tokens=one.max_new_tokens, ignore_eos=True))
    assert len({one.rope_stretch for one in jobs}) == 4
    engine = make_engine(path, rope_scaling_factor=factor, **ENGINE)
    assert texts(run(engine, jobs)) == expected
    # The second and the fourth have the same prompt and bases of their own: neither may find the other's keys.
    assert engine.stats().cached_tokens == 0
    assert texts(run(engine, jobs)) == expected
    assert engine.stats().cached_tokens == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)


def test_preempted_and_in_chunks(path: Path) -> None:
    jobs = [job(number, IDS[number : number + 10], 100, 2.0) for number in range(4)]
    model = theirs(path, rope_theta=THETA * jobs[0].rope_stretch ** (HEAD_DIM / (HEAD_DIM - 2)))
    expected = [transformers_greedy(model, one.prompt_ids, max_new_tokens=100, ignore_eos=True) for one in jobs]
    # With an end that never comes nobody knows how long they get, so more are let in than there is room for.
    never = next(token for token in range(3, 300) if not any(token in tokens for tokens in expected))
    endless = [replace(one, eos_ids=(never,)) for one in jobs]
    tight = {**ENGINE, "num_gpu_blocks": 10, "max_prefill_token_num": 7, "prefill_interval": 1}
    engine = make_engine(path, rope_scaling_factor=2.0, **tight)
    assert texts(run(engine, endless)) == expected
    assert engine.stats().preemptions > 0, "the pool was large enough: half of the claim was not tested"


def test_the_frontend_says_how_far_a_request_may_reach(path: Path) -> None:
    tokenizer = Tokenizer(str(path))
    template = choose_template(tokenizer, config=None, model_name=None, engine_model_name=None)
    rope = RopeSpec(kind="dynamic", factor=2.0, original_max_positions=TRAINED)
    preparer = Preparer(tokenizer, template, ModelInfo.read(path), 200, rope)

    def prepared(**config: Any) -> TokenRequest:
        how: dict[str, Any] = {"handle": 1, "do_preprocess": False, "is_streamed": False, "seed_key": None}
        return preparer.prepare("the mill wheel turns while the water runs", GenerationConfig(**config), **how).requests[0]

    length = len(prepared().prompt_ids)
    assert 1 < length < TRAINED
    assert prepared(max_new_tokens=TRAINED - length).rope_stretch == 1.0
    assert prepared(max_new_tokens=96 - length).rope_stretch == 2.0 * 96 / 64 - 1
    farthest = 2.0 * 200 / 64 - 1
    assert prepared(max_new_tokens=1000).rope_stretch == prepared(max_new_tokens=None).rope_stretch == farthest


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_logn_attention(path: Path, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query beyond the trained length times log(position) / log(trained length), positions counted from 1."""
    model = theirs(path, **({"rope_type": "dynamic", "factor": factor} if factor else {}))
    module = importlib.import_module(type(model).__module__)
    rotate = module.apply_rotary_pos_emb

    def scaled(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        factors = [max(1.0, math.log(place) / math.log(TRAINED)) for place in range(1, q.shape[2] + 1)]
        return q * torch.tensor(factors)[:, None], k

    count = 180
    with torch.inference_mode():
        plain = model(torch.tensor([IDS[:count]])).logits[0]
        monkeypatch.setattr(module, "apply_rotary_pos_emb", scaled)
        expected = model(torch.tensor([IDS[:count]])).logits[0]
    options = options_for(path, session_len=200, rope_scaling_factor=factor or 1.0, use_logn_attn=True)
    whole = replace(options, rope_scaling_factor=factor).model_spec()
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "group": SingleRank()}
    decoder = load_decoder(path, max_positions=201, whole=whole, **where)
    executor = LocalExecutor(options)  # for its caches: 64 blocks of 64
    inputs = _step_of(count, replace(options, max_prefill_token_num=count), device=torch.device("cpu"))
    stretches = executor._rank.runner._table.stretches(torch.zeros(count, dtype=torch.int64))
    assert stretches is not None
    stretches.stretch_S.fill_(whole.rope.stretch(count))
    with torch.inference_mode():
        inputs = inputs._replace(tokens_T=torch.tensor(IDS[:count]), sampled_R=None, stretches=stretches if factor else None)
        ours = decoder.forward(inputs, executor._rank.runner._caches)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)
    assert (plain[:TRAINED] - expected[:TRAINED]).abs().max() < 1e-6
    assert (plain[TRAINED + 8 :] - expected[TRAINED + 8 :]).abs().max() > 0.01


def test_two_ranks(path: Path) -> None:
    given: dict[str, Any] = {"device": "cpu", "rope_scaling_factor": 2.0, "use_logn_attn": True, **ENGINE}
    answers = []
    for tp in (1, 2):
        with pipeline(str(path), backend_config=PytorchEngineConfig(tp=tp, **given)) as pipe:
            gen = GenerationConfig(top_k=1, max_new_tokens=90, ignore_eos=True)
            answers.append([response.token_ids for response in pipe(["One is", "Two is a"], gen_config=gen)])
    assert answers[0] == answers[1]
    assert all(len(tokens) == 90 for tokens in answers[0])


def test_how_long_a_session_may_be(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="rope_scaling_factor goes beyond") as refused:
        resolve(path, PytorchEngineConfig(device="cpu", session_len=65))
    assert refused.value.param == "session_len"
    config = TurbomindEngineConfig(session_len=500, rope_scaling_factor=2.0, use_logn_attn=True)
    options = resolve(path, config)
    assert (options.session_len, options.rope_scaling_factor, options.use_logn_attn) == (500, 2.0, True)
    assert resolve(path, PytorchEngineConfig(device="cpu", rope_scaling_factor=2.0)).session_len == 2 * TRAINED
    fields = json.loads((path / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelInfo.read(tmp_path).max_length == 256
    assert ModelSpec.read(fields).rope == RopeSpec(theta=THETA, kind="dynamic", factor=4.0, original_max_positions=64)
    # Transformers reads nothing of this key where the rope is dynamic.
    fields["rope_parameters"]["original_max_position_embeddings"] = 32
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelInfo.read(tmp_path).max_length == 256
    assert ModelSpec.read(fields).rope.original_max_positions == 64


@pytest.mark.parametrize(
    "config",
    [
        PytorchEngineConfig(device="cpu", use_logn_attn=True),
        PytorchEngineConfig(device="cpu", rope_scaling_factor=2.0, session_len=TRAINED),
        PytorchEngineConfig(device="cpu", rope_scaling_factor=2.0, session_len=TRAINED + 1),
    ],
    ids=lambda config: str(config.to_dict()),
)
def test_scaling_that_nothing_outgrows_is_said(
    path: Path, config: PytorchEngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    options = resolve(path, config)
    said = [record for record in caplog.records if getattr(record, "event", "") == "scaling_unused"]
    assert len(said) == (options.session_len <= TRAINED)


def test_what_is_scored_is_turned_for_its_own_length(path: Path) -> None:
    """`get_ppl` has one token more computed than it scores, which reaches nothing."""
    given: dict[str, Any] = {"device": "cpu", "rope_scaling_factor": 8.0, **ENGINE}
    lengths = (TRAINED - 1, TRAINED, TRAINED + 1, 150)
    expected = []
    for length in lengths:
        with torch.inference_mode():
            logits = theirs(path, rope_type="dynamic", factor=8.0)(torch.tensor([IDS[:length]])).logits[0, :-1]
        expected.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:length]))))
    with pipeline(str(path), backend_config=PytorchEngineConfig(**given)) as pipe:
        assert pipe.get_ppl([IDS[:length] for length in lengths]) == pytest.approx(expected, abs=1e-4)


def test_a_rope_that_is_scaled_otherwise_is_not_stretched(path: Path, tmp_path: Path) -> None:
    fields = json.loads((path / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InvalidRequest, match="linear") as refused:
        resolve(tmp_path, PytorchEngineConfig(device="cpu", rope_scaling_factor=2.0))
    assert refused.value.param == "rope_scaling_factor"
    with pytest.raises(InvalidRequest, match="positions of") as refused:
        resolve(tmp_path, PytorchEngineConfig(device="cpu", session_len=9999))
    assert "rope_scaling_factor" not in refused.value.message


@pytest.mark.parametrize("factor", ["4", -4.0, 0, True])
def test_a_factor_of_no_meaning_in_the_config(path: Path, tmp_path: Path, factor: Any) -> None:
    fields = json.loads((path / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": THETA, "factor": factor}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelLoadError, match="'factor'"):
        resolve(tmp_path, PytorchEngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_scaling_factor", -1.0), ("rope_scaling_factor", 1e308), ("rope_scaling_factor", "2"), ("use_logn_attn", 1)],
)
@pytest.mark.parametrize("kind", [PytorchEngineConfig, TurbomindEngineConfig])
def test_values_of_no_meaning(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field):
        kind(**{field: value})
