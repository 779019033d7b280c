"""Point 3: a text and the equivalent single user message are the same ids, whatever the template."""

from __future__ import annotations

import pytest

from engine.template_families import FAMILIES
from engine.templates import choose_template
from engine.tokenizer import Tokenizer

TEXT = "turn the wheel\n水車 🙂"


@pytest.mark.parametrize("name", ["hf", *(name for name, parts in FAMILIES.items() if not parts.is_raw)])
def test_same_ids(tokenizer: Tokenizer, name: str) -> None:
    template = choose_template(tokenizer, config=None, model_name=name, engine_model_name=None)
    assert template.encode(TEXT) == template.encode([{"role": "user", "content": TEXT}])
