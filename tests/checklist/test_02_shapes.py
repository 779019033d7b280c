"""Point 2: what goes in decides what comes out."""

from __future__ import annotations

from collections.abc import Iterator

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig, Response

SHORT = GenerationConfig(max_new_tokens=4)
USER = {"role": "user", "content": "x"}


def test_shapes(pipe: AsyncEngine) -> None:
    one = pipe("x", SHORT)
    assert isinstance(one, Response)
    assert pipe(["x"], SHORT) == [one]
    assert isinstance(pipe([USER], SHORT), Response)
    assert [response.text for response in pipe([[USER]], SHORT)] == [one.text]  # type: ignore[union-attr]
    assert [response.text for response in pipe(["x", [USER]], SHORT)] == [one.text] * 2  # type: ignore[union-attr]
    assert pipe([], SHORT) == []
    assert isinstance(pipe(iter(["x"]), SHORT), Iterator)


def test_an_iterator_is_never_drawn_far_ahead_of_what_is_read(pipe: AsyncEngine) -> None:
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"prompt {drawn}"

    answers = pipe(endless(), SHORT)
    assert drawn == 0
    for read in range(1, 400):
        next(answers)  # type: ignore[arg-type]
        assert drawn <= read + 2 * pipe.frontend.window
    answers.close()  # type: ignore[union-attr]
