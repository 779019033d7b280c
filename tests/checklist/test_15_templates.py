"""Point 15: each family renders as Jinja of the same form does; a hostile role is refused and never evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.async_engine import AsyncEngine
from engine.template_families import FAMILIES
from engine.templates import render_turns
from engine.tokenizer import Tokenizer
from headrace.config import Message

SYSTEM = "{%- for m in messages if m.role == 'system' %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the models' own tokenizers carry, each in the shortest words.
JINJA = {
    "internlm2-chat-7b": CHATML,
    "qwen-7b": CHATML,
    "yi-34b": CHATML,
    "llama2": SYSTEM + "{%- endfor %}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m.content + ' </s>' + '<s>' }}{% endif %}{% endfor %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "internlm-chat-7b": "{% for m in messages %}{% if m.role == 'system' %}{{ '<|System|>:' + m.content + '\n' }}"
    "{% elif m.role == 'user' %}{{ '<|User|>:' + m.content + '\n' }}{% else %}{{ '<|Bot|>:' + m.content + '<eoa>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Bot|>:{% endif %}",
    "solar-70b": "{% for m in messages %}{{ '### ' + m.role.capitalize() + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}",
    "falcon": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ m.role.capitalize() + ': ' + m.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "chatglm2-6b": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{% set ns.n = ns.n + 1 %}{{ '[Round ' ~ ns.n ~ ']\n\n问：' + m.content + '\n\n' }}"
    "{% else %}{{ '答：' + m.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}答：{% endif %}",
    "baichuan2-7b": "{% for m in messages %}{% if m.role == 'user' %}<reserved_106>{% elif m.role == 'assistant' %}<reserved_107>"
    "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reserved_107>{% endif %}",
}
TALKS: list[list[Message]] = [
    [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}],
    [
        {"role": "system", "content": "S t"},
        {"role": "user", "content": "a {x}"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n{{ d }}"},
    ],
]


@pytest.fixture
def other(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)  # not the shared one: its template is replaced


@pytest.mark.parametrize("talk", TALKS, ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", JINJA)
def test_family(other: Tokenizer, name: str, talk: list[Message]) -> None:
    other.hf.chat_template = JINJA[name]
    assert render_turns(FAMILIES[name], talk) == other.render(talk, continue_final=False)


def test_the_tokenizers_own_template_comes_first(pipe: AsyncEngine) -> None:
    assert pipe.report()["template"] == "the tokenizer's own template"


ROLES = ["__class__", "system + str(print('broken'))", "__import__('os').system('touch broken')", "User", "", None, 7]


@pytest.mark.parametrize("role", ROLES, ids=repr)
def test_a_hostile_role(pipe: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: object) -> None:
    monkeypatch.chdir(tmp_path)
    answer = pipe([{"role": role, "content": "x"}])
    assert answer.error_code == "invalid_request"  # type: ignore[union-attr]
    assert "the roles are" in str(answer.error_message)  # type: ignore[union-attr]
    assert not list(tmp_path.iterdir())
