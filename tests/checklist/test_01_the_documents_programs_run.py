"""Point 1: the document's five programs run unchanged, tensor-parallel too, without a `__main__` guard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from document import IMPORTS, SNIPPETS
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)  # one program asks for 2024


@pytest.mark.slow
@pytest.mark.parametrize("name", SNIPPETS)
def test_program_without_a_guard(model: Path, tmp_path: Path, name: str) -> None:
    # The guard's absence bites where the main module is imported again by a child: as a file, which -c is not.
    program = tmp_path / "program.py"
    program.write_text((IMPORTS + SNIPPETS[name]).replace("internlm/internlm-chat-7b", str(model)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Response(text=") == 2
    assert done.stdout.count("error_code=None") == 2


def test_the_programs_are_the_documents() -> None:
    assert list(SNIPPETS) == ["defaults", "tp", "sampling", "openai", "pytorch"]
    for name, text in SNIPPETS.items():
        assert "__main__" not in text
        compile(IMPORTS + text, name, "exec")
    assert sum("tp=2" in text for text in SNIPPETS.values()) == 3
