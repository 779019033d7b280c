"""Where users run the document's programs: in threads, loops, daemons, from stdin and -c, forked and forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from document import IMPORTS, PIPE
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def run(arguments: list[str], folder: Path, stdin: str | None = None) -> str:
    env = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    # Modules of a user's that are named like ours must not get into the engine process.
    for name in ("engine", "kernels"):
        (folder / "beside").mkdir(exist_ok=True)
        (folder / "beside" / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder / "beside",
        env=env,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def script(folder: Path, model: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text((IMPORTS + text).replace("internlm/internlm-chat-7b", str(model)))
    return str(path)


SHORT = "response = pipe(['water'], gen_config=GenerationConfig(max_new_tokens=4))\nprint(response)\n"


@pytest.mark.slow
def test_script_from_stdin_and_from_the_command_line(model: Path, tmp_path: Path) -> None:
    text = (IMPORTS + "backend_config = None\n" + PIPE + SHORT).replace("internlm/internlm-chat-7b", str(model))
    assert "error_code=None" in run(["-P", "-"], tmp_path, stdin=text)
    assert "error_code=None" in run(["-P", "-c", text], tmp_path)


ELSEWHERE = """
import asyncio, multiprocessing, threading
multiprocessing.set_start_method('fork')
answers = []
def work(tp=1):
    with pipeline('internlm/internlm-chat-7b', backend_config=PytorchEngineConfig(tp=tp)) as pipe:
        answers.append(pipe('water', gen_config=GenerationConfig(max_new_tokens=4)).text)
thread = threading.Thread(target=work, args=(2,))
thread.start(); thread.join()
async def main():
    work()
asyncio.run(main())
def daemonic(queue):
    work()
    queue.put(answers[-1])
queue = multiprocessing.Queue()
process = multiprocessing.Process(target=daemonic, args=(queue,), daemon=True)
process.start()
answers.append(queue.get(timeout=100))
process.join()
assert len(answers) == 3 and len(set(answers)) == 1, answers
print('the same three times')
"""


@pytest.mark.slow
def test_in_a_thread_in_an_event_loop_and_in_a_daemonic_process(model: Path, tmp_path: Path) -> None:
    assert "the same three times" in run([script(tmp_path, model, ELSEWHERE)], tmp_path)


DROPPED = """
import gc, os, psutil
pipe = pipeline('internlm/internlm-chat-7b')
first = pipe.frontend.pids[0]
pid = os.fork()
if pid == 0:
    try:
        pipe('water')
    except Exception as error:
        os._exit(0 if 'fork' in str(error) else 1)
    os._exit(2)
assert os.waitpid(pid, 0)[1] == 0
pipe = None
gc.collect()
assert not psutil.pid_exists(first), 'a dropped pipeline keeps its engine'
pipe = pipeline('internlm/internlm-chat-7b')
print(pipe.frontend.pids[0])
"""


@pytest.mark.slow
def test_dropped_and_forgotten_pipelines_leave_no_process(model: Path, tmp_path: Path) -> None:
    import psutil

    pid = int(run([script(tmp_path, model, DROPPED)], tmp_path))
    assert not psutil.pid_exists(pid)


def test_import_is_light() -> None:
    code = (
        "import sys, headrace; loaded = {'torch', 'transformers', 'sqlalchemy', 'httpx', 'engine'} & set(sys.modules); "
        "assert not loaded, loaded; headrace.GenerationConfig; assert 'torch' not in sys.modules; "
        "a = headrace.pipeline; assert a is headrace.pipeline and callable(a) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_that_hides_the_engine_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text("")
    (tmp_path / "script.py").write_text(
        "import headrace\ntry:\n    headrace.pipeline('smollm2')\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert f"{tmp_path / 'engine.py'} hides headrace's package 'engine'" in done.stdout


def test_wheel_without_the_engine_says_so(tmp_path: Path) -> None:
    import headrace

    (tmp_path / "headrace").symlink_to(Path(headrace.__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import headrace\n"
        "try:\n    headrace.pipeline('x')\nexcept ImportError as error:\n    print(error)\n"
    )
    # -S: without the site directories, where the checkout is on the path.
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "a wheel of headrace holds the client only" in done.stdout
