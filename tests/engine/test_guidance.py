"""The masks that the host makes, against the library's own, token by token; and what they do where the library is missing."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engine_driver import token_request

from engine import grammar as grammar_module
from engine.grammar import Grammars
from engine.guidance import Guide, Guides, Row
from engine.model_info import ModelInfo
from engine.request import TokenRequest
from engine.token_masks import TokenMasks
from engine.tokenizer import Tokenizer
from headrace.errors import InvalidRequest, UnsupportedOption
from headrace.response_format import ResponseFormat

EOS = 2
# Formats that no automaton takes: what one takes needs no masks of the host.
PAIR = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "array", "items": {"oneOf": [{"enum": ["a", 12]}]}, "maxItems": 2}},
}


def request(name: int, response_format: object = PAIR, **fields: object) -> TokenRequest:
    return token_request(str(name), [40], max_new_tokens=64, response_format=response_format, **fields)


@pytest.fixture(scope="module")
def guides(tiny_model_dir: Path) -> Guides:
    return Guides(tiny_model_dir)


def start(guides: Guides, *requests: TokenRequest) -> list[Guide]:
    for one in requests:
        guides.start(one)
    made: list[Guide] = []
    while guides.is_compiling:
        for _, guide in guides.take(patient=True):
            assert isinstance(guide, Guide), guide
            made.append(guide)
    return made


def mask(guides: Guides, rows: list[Row]) -> TokenMasks:
    return guides.masks(guides.begin(rows))


def accept(guides: Guides, guide: Guide, token: int) -> bool:
    guides.advance([(guide, token)])
    return guide.complete


def allowed(words_W: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist())


def test_every_mask_on_the_way_is_the_librarys(guides):
    draw = random.Random(1)
    rows = [Row(entry, guide, 0) for entry, guide in enumerate(start(guides, *(request(i) for i in range(5))))]
    ended = 0
    for _ in range(40):
        masks = mask(guides, rows)
        assert masks.entries == tuple(row.entry for row in rows)
        going = []
        for row, words_W in zip(rows, masks.words_qW, strict=True):
            own = np.frombuffer(row.guide.matcher.compute_bitmask(), dtype=np.int32)
            assert allowed(words_W) == allowed(own)
            token = draw.choice(sorted(allowed(words_W) - {EOS}))
            if accept(guides, row.guide, token):
                ended += 1
            else:
                going.append(row)
        rows = going
        if not rows:
            break
    assert ended == 5


def test_ends_come_only_where_the_form_is_complete(guides):
    letters = {"type": "grammar", "grammar": "start: /ab|abc/"}
    guide, late = start(guides, request(0, letters, stop_token_ids=()), request(1, letters, min_new_tokens=9))
    vocabulary = Tokenizer(guides._model_path)
    for letter in "ab":
        masks = mask(guides, [Row(0, guide, 0), Row(1, late, 0)])
        assert EOS not in allowed(masks.words_qW[0])
        (token,) = vocabulary.encode_raw(letter)
        assert not accept(guides, guide, token)
        assert not accept(guides, late, token)
    masks = mask(guides, [Row(0, guide, 2), Row(1, late, 2)])
    assert EOS in allowed(masks.words_qW[0])
    assert allowed(masks.words_qW[1]) == allowed(masks.words_qW[0]) - {EOS}
    (token,) = vocabulary.encode_raw("c")
    assert accept(guides, guide, token)


def test_a_token_outside_the_grammar_is_an_error_not_a_crash(guides):
    (guide,) = start(guides, request(0))
    assert guide.error() is None
    assert not accept(guides, guide, 399)
    mask(guides, [Row(0, guide, 1)])
    assert "response_format" in guide.error().message


def test_masks_survive_the_wire():
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 8)).astype(np.int32)
    masks = TokenMasks((0, 4, 7), words)
    again = TokenMasks.from_bytes(masks.to_bytes())
    assert again.entries == masks.entries
    assert np.array_equal(again.words_qW, words)
    assert again.words_qW.flags.writeable
    assert TokenMasks.from_bytes(TokenMasks((), words[:0]).to_bytes()).words_qW.shape == (0, 8)


@pytest.fixture
def grammars(tiny_model_dir: Path) -> Grammars:
    return Grammars(Tokenizer(tiny_model_dir), ModelInfo.read(tiny_model_dir))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}, "Invalid type: nope"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/x"}}}, "does not exist"),
        ({"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True, "type": "array"}}}, "uniqueItems"),
        ({"type": "json_schema", "json_schema": {"schema": {"minimum": 3, "maximum": 1, "type": "integer"}}}, "Unsatisfiable"),
        ({"type": "regex", "regex": "(a"}, "unclosed group"),
        ({"type": "grammar", "grammar": "start: other"}, "unknown name"),
        ({"type": "grammar", "grammar": "root ::= ("}, "grammar"),
    ],
)
def test_what_does_not_compile_is_refused_each_time(grammars, wanted, said):
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=said) as caught:
            grammars.check(ResponseFormat.parse(wanted))
        assert caught.value.param == "response_format"


def test_a_format_that_an_automaton_follows_needs_no_guide(guides):
    guides.start(request(0, {"type": "regex", "regex": "[ab]+"}))
    guides.start(request(1))
    taken = []
    while guides.is_compiling:
        taken += [(one.request_id, guide) for one, guide in guides.take(patient=True)]
    assert [name for name, _ in taken] == ["0", "1"]
    assert taken[0][1] is None
    assert isinstance(taken[1][1], Guide)


def test_a_slow_format_holds_up_nobody_elses_and_is_compiled_once(grammars, monkeypatch):
    def regex(source):
        return ResponseFormat.parse({"type": "regex", "regex": source})

    began, goes_on, compiled = threading.Event(), threading.Event(), []
    library = grammar_module._compile

    def slowly(vocabulary, wanted):
        compiled.append(wanted.source)
        if wanted.source == "slow[(]":
            began.set()
            assert goes_on.wait(30)
        return library(vocabulary, wanted)

    grammars.check(regex("known"))
    monkeypatch.setattr(grammar_module, "_compile", slowly)
    with ThreadPoolExecutor(3) as pool:
        try:
            waiting = [pool.submit(grammars.matcher, regex("slow[(]")) for _ in range(2)]
            assert began.wait(30)
            for source in ("known", "new"):
                pool.submit(grammars.check, regex(source)).result(timeout=30)
            assert not any(one.done() for one in waiting)
        finally:
            goes_on.set()
        assert len({id(one.result(timeout=30)) for one in waiting}) == 2, "a matcher for each"
    assert sorted(compiled) == ["new", "slow[(]"]


def test_nobody_waits_for_ever_for_a_format(grammars, monkeypatch):
    wanted, goes_on = ResponseFormat.parse({"type": "regex", "regex": "for ever"}), threading.Event()
    library = grammar_module._compile
    monkeypatch.setattr(grammar_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(grammar_module, "_compile", lambda *asked: goes_on.wait(30) and library(*asked))
    try:
        for _ in range(2):
            with pytest.raises(
                InvalidRequest, match="response_format: this regex can't be compiled: it isn't ready after"
            ) as refused:
                grammars.check(wanted)
            assert refused.value.param == "response_format"
    finally:
        goes_on.set()
    grammars._kept[wanted].matcher.result(timeout=30)
    grammars.check(wanted)


def test_no_more_than_a_few_formats_are_compiled_at_once(grammars, monkeypatch):
    lock, running, most = threading.Lock(), [0], [0]
    library = grammar_module._compile

    def counted(vocabulary, wanted):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return library(vocabulary, wanted)

    monkeypatch.setattr(grammar_module, "_compile", counted)
    with ThreadPoolExecutor(16) as pool:
        formats = [ResponseFormat.parse({"type": "regex", "regex": f"many{number}"}) for number in range(16)]
        list(pool.map(grammars.check, formats))
    assert 1 < most[0] <= grammar_module._AT_ONCE


def test_more_formats_than_are_kept(grammars):
    for number in range(150):
        assert grammars.matcher(ResponseFormat.parse({"type": "regex", "regex": f"a{number}"})).is_error() is False
    assert len(grammars._kept) <= 64


def test_without_the_library_a_request_is_refused_with_the_remedy(grammars, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedOption, match="pip install llguidance") as caught:
        grammars.check(ResponseFormat.parse({"type": "json_object"}))
    assert caught.value.param == "response_format"


def test_the_engine_is_imported_without_the_library():
    code = "import engine.rank, engine.engine, engine.frontend, engine.executor, sys; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


DEEP = """
import sys
from pathlib import Path
from engine.grammar import Grammars
from headrace.config import GenerationConfig
grammars = Grammars.of_model(Path(sys.argv[1]))
chain = {"$defs": {f"r{n}": {"type": "array", "items": {"$ref": f"#/$defs/r{n + 1}"}} for n in range(4000)}, "$ref": "#/$defs/r0"}
chain["$defs"]["r4000"] = {"type": "null"}
for wanted in (
    {"type": "json_schema", "json_schema": {"schema": chain}},
    {"type": "grammar", "grammar": "start: A0\\nA8000: \\"b\\"\\n" + "".join(f"A{n}: A{n + 1}\\n" for n in range(8000))},
    {"type": "grammar", "grammar": "start: A0\\nA800: \\"b\\"\\n" + "".join(f"A{n}: {'(' * 15}A{n + 1}{')' * 15}\\n" for n in range(800))},
):
    grammars.check(GenerationConfig(response_format=wanted).response_format)
print("done")
"""


def test_a_format_whose_definitions_nest_thousands_deep_ends_no_process(tiny_model_dir):
    # Three thousand references in a row were enough: the library goes down into each, and a stack overflow is nobody's exception.
    done = subprocess.run(
        [sys.executable, "-c", DEEP, str(tiny_model_dir)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
