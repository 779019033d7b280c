"""docs/options.md is what its script writes, its notes are about fields that exist, and its ranges are the classes' own."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headrace.config import ChatTemplateConfig, GenerationConfig
from headrace.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = script()
FIELDS = [(cls, spec.name) for cls in MAKE.CLASSES for spec in dataclasses.fields(cls)]
RANGES = [
    (cls, name, float(found[1]), float(found[2]) if found[2] else None)
    for cls, name in FIELDS
    if (found := re.search(r"(?:^|, or )(?:from )?(-?\d+)(?: to (\d+))?(?:,|$)", MAKE.NOTES[cls].get(name, MAKE.Note()).range))
]


def test_the_page_is_current() -> None:
    assert MAKE.PAGE.read_text(encoding="utf-8") == MAKE.page(), "run `python docs/make_options.py`"


@pytest.mark.parametrize("cls", MAKE.CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_meaning_and_every_note_a_field(cls: Any) -> None:
    names = {spec.name for spec in dataclasses.fields(cls)}
    assert names == set(MAKE.meanings(cls))
    # Two that are announced may still come; a note for anything else is about a field that was renamed or removed.
    assert set(MAKE.NOTES[cls]) - names <= {"prompt_logprobs", "response_format"}


def build(cls: Any, name: str, value: float) -> None:
    real = type(next(spec.default for spec in dataclasses.fields(cls) if spec.name == name)) is float
    others = {"max_new_tokens": None} if name == "min_new_tokens" else {}  # which is its bound, where there is one
    cls(**others, **{name: value if real else int(value)})


@pytest.mark.parametrize(("cls", "name", "low", "high"), RANGES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_ranges_are_what_the_classes_take(cls: Any, name: str, low: float, high: float | None) -> None:
    whole = 1 if high is None or high < 2**53 else 2**12  # a float can't hold the next whole number of a large one
    build(cls, name, low)
    outside = [low - 1]
    if high is not None:
        build(cls, name, high if high < 2**53 else high - whole)
        outside.append(high + whole)
    for value in outside:
        with pytest.raises(InvalidRequest) as refused:
            build(cls, name, value)
        assert refused.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # As float32 these are 0 and infinity, and the first makes infinities of logits: NaN, and the model's fault, it would seem.
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e300),
        # More digits than Python makes a number of, by an error that names nothing.
        ("logit_bias", {"9" * 5000: 1}),
        # One of the two would have no effect.
        ("logit_bias", ((5, 1.0), (5, 2.0))),
        ("logit_bias", {"5": 1.0, 5: 2.0}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_could_not_be_done_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} must be") as refused:
        GenerationConfig(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize("name", ["stop_words", "bad_words"])
@pytest.mark.parametrize("word", ["\ud800", "cut \ud83d", "\ude42 rest"])
def test_words_that_no_answer_can_have_are_refused_by_name(name: str, word: str) -> None:
    assert getattr(GenerationConfig(**{name: ["🙂", "水"]}), name) == ("🙂", "水")
    for value in (word, ["END", word]):
        with pytest.raises(InvalidRequest, match=f"^{name} has a text .* cut texts between whole characters") as refused:
            GenerationConfig(**{name: value})
        assert refused.value.param == name
        assert refused.value.message.encode(), "it is shown on terminals and sent over HTTP"
    with pytest.raises(InvalidRequest, match="stop_words has a text"):
        ChatTemplateConfig("chatml", stop_words=(word,))


def test_there_are_ranges_to_check() -> None:
    assert len(RANGES) >= 18
