"""Conversations to text: the goldens of each family, the order of choice, and hostile input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.template_families import FAMILIES
from engine.templates import ChatTemplate, choose_template, parse_messages, render_turns
from engine.tokenizer import Tokenizer
from headrace.config import ChatTemplateConfig, Message
from headrace.errors import InvalidRequest, UnsupportedOption

TALK: list[Message] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
GOLDENS = {
    "internlm-chat-7b": "<|System|>:S\n<|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:",
    "internlm2-chat-7b": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
    "vicuna": "S USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
    "solar": "### System:\nS\n\n### User:\na\n\n### Assistant:\nb\n\n### User:\nc\n\n### Assistant:\n",
    "baichuan2-7b": "S<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>",
    "ultralm": "S\nUser: a</s>\nAssistant: b</s>\nUser: c</s>\nAssistant:",
    "puyu": "Sabc",
    "falcon": "S\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant:",
    "chatglm2-6b": "S\n\n[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答：",
}
GOLDENS |= {"codellama": GOLDENS["llama2"], "wizardlm": GOLDENS["vicuna"], "solar-70b": GOLDENS["solar"]}
NAMES_OF_THE_TIME = """
base llama internlm vicuna wizardlm internlm-chat internlm-chat-7b internlm-chat-20b internlm-chat-7b-8k internlm-20b internlm2-7b
internlm2-20b internlm2-chat-7b internlm2-chat-20b baichuan-7b baichuan2-7b puyu llama2 llama-2 llama-2-chat qwen-7b qwen-14b
codellama falcon chatglm2-6b solar solar-70b ultracm ultralm yi yi-chat yi-200k yi-34b
"""
THE_DOCUMENTS_33 = NAMES_OF_THE_TIME.split()
CHATML = [name for name, parts in FAMILIES.items() if parts.user.startswith("<|im_start|>")]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_model_dir)


def choose(
    tokenizer: Tokenizer, config: ChatTemplateConfig | None = None, name: str | None = None, engine: str | None = None
) -> ChatTemplate:
    return choose_template(tokenizer, config=config, model_name=name, engine_model_name=engine)


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    assert render_turns(FAMILIES[name], TALK) == GOLDENS[name]


def test_every_name_of_the_documents_time_is_there() -> None:
    assert len(THE_DOCUMENTS_33) == 33
    assert set(THE_DOCUMENTS_33) <= set(FAMILIES)
    assert {name for name in THE_DOCUMENTS_33 if FAMILIES[name].is_raw} == {
        *("base", "llama", "internlm", "internlm-20b", "internlm2-7b", "internlm2-20b", "baichuan-7b")
    }


def test_rounds_are_counted_in_each_conversation_anew() -> None:
    chatglm2 = FAMILIES["chatglm2-6b"]
    first = render_turns(chatglm2, TALK)
    assert render_turns(chatglm2, TALK) == first
    assert render_turns(chatglm2, TALK[1:2]) == "[Round 1]\n\n问：a\n\n答："


def test_nothing_in_a_message_is_a_format_or_an_expression(tokenizer: Tokenizer) -> None:
    hostile = "{0} {user} %s $x {{ 7 * 7 }} {% raw %} 1 [Round 9] __import__('os')"
    for name, parts in FAMILIES.items():
        if not parts.is_raw:
            assert render_turns(parts, [{"role": "user", "content": hostile}]).count(hostile) == 1, name
    ids = choose(tokenizer).encode(hostile)
    assert tokenizer.decode(ids).count(hostile) == 1


@pytest.mark.parametrize("name", CHATML)
def test_chatml_families_agree_with_a_jinja_chatml_template(tokenizer: Tokenizer, name: str) -> None:
    assert render_turns(FAMILIES[name], TALK) == tokenizer.render(TALK, continue_final=False)
    assert render_turns(FAMILIES[name], TALK[:3]) + "…" == tokenizer.render(TALK[:3], continue_final=True) + "…"


def test_the_users_system_text_replaces_the_default_one() -> None:
    qwen = FAMILIES["qwen"]
    assert "You are a helpful assistant." in render_turns(qwen, TALK[1:2])
    assert "You are a helpful assistant." not in render_turns(qwen, TALK[:2])
    assert render_turns(FAMILIES["yi"], TALK[1:2]).startswith("<|im_start|>user")


@pytest.mark.parametrize("name", [None, *FAMILIES])
def test_text_and_its_single_user_message_are_the_same_ids(tokenizer: Tokenizer, name: str | None) -> None:
    template = choose(tokenizer, name=name)
    if name in FAMILIES and FAMILIES[name].is_raw:
        with pytest.raises(InvalidRequest, match="no chat template for messages"):
            template.encode([{"role": "user", "content": "turn the wheel"}])
        assert template.encode("turn the wheel") == tokenizer.encode_raw("turn the wheel")
        return
    assert template.encode("turn the wheel") == template.encode([{"role": "user", "content": "turn the wheel"}])


def test_the_tokenizers_own_template_is_the_default(tokenizer: Tokenizer) -> None:
    ids = choose(tokenizer).encode(TALK)
    assert list(ids) == tokenizer.hf.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ids[0] == tokenizer.hf.bos_token_id
    assert ids[1] != tokenizer.hf.bos_token_id


def test_order_of_choice(tokenizer: Tokenizer) -> None:
    assert "solar" in choose(tokenizer, engine="solar").source
    assert "solar" in choose(tokenizer, ChatTemplateConfig("solar"), "solar", "solar").source
    with pytest.raises(InvalidRequest, match=r"model_name='vicuna' and backend_config\.model_name='solar'"):
        choose(tokenizer, name="vicuna", engine="solar")
    with pytest.raises(InvalidRequest, match="different chat templates"):
        choose(tokenizer, ChatTemplateConfig("yi"), name="vicuna")
    with pytest.raises(InvalidRequest, match="there is no chat template 'internlm-9'"):
        choose(tokenizer, name="internlm-9")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"config": "vicuna"}, "chat_template_config"),
        ({"config": {"model_name": "vicuna"}}, "chat_template_config"),
        ({"model_name": ["vicuna"]}, "model_name"),
        ({"model_name": 5}, "model_name"),
    ],
)
def test_what_is_no_template_is_refused_by_name(tokenizer: Tokenizer, given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param} is a") as refused:
        choose_template(tokenizer, **{"config": None, "model_name": None, "engine_model_name": None, **given})
    assert refused.value.param == param


def test_own_parts_of_the_caller(tokenizer: Tokenizer) -> None:
    config = ChatTemplateConfig(
        "puyu", system="<s>", meta_instruction="M", eosys="</s>", user="U:", eoh="\n", assistant="A: ", eoa="!"
    )
    template = choose(tokenizer, config)
    assert template.encode("hi") == tokenizer.encode_chat("<s>M</s>U:hi\nA: ")
    changed = choose(tokenizer, ChatTemplateConfig("vicuna", assistant="BOT: ", stop_words=("USER",)))
    assert tokenizer.decode(changed.encode("hi")).endswith("USER: hi BOT: ")
    assert changed.stop_words == ("USER",)
    united = choose(tokenizer, ChatTemplateConfig("internlm2-chat-7b", stop_words=("USER", "<|im_end|>")))
    assert united.stop_words == ("<|im_end|>", "<|action_end|>", "USER")
    base = choose(tokenizer, ChatTemplateConfig("base", user="Q: ", eoh="\n"))
    assert base.encode("hi") == tokenizer.encode_chat("Q: hi\n")


def test_own_template_takes_a_system_text_and_no_other_part(tokenizer: Tokenizer) -> None:
    template = choose(tokenizer, ChatTemplateConfig("hf", meta_instruction="S"))
    assert template.encode(TALK[1:]) == choose(tokenizer).encode(TALK)
    assert template.encode(TALK) == choose(tokenizer).encode(TALK)
    with pytest.raises(InvalidRequest, match=r"ChatTemplateConfig\.user"):
        choose(tokenizer, ChatTemplateConfig("hf", user="U"))
    with pytest.raises(InvalidRequest, match="a system text of its own") as refused:
        choose(tokenizer, ChatTemplateConfig("hf", meta_instruction=""))
    assert refused.value.param == "meta_instruction"


@pytest.mark.parametrize("capability", ["completion", "python"])
def test_capability_raw(tokenizer: Tokenizer, capability: Any) -> None:
    for name in ("hf", "llama2"):
        template = choose(tokenizer, ChatTemplateConfig(name, capability=capability))
        assert template.encode("turn") == tokenizer.encode_raw("turn")


@pytest.mark.parametrize("capability", ["completion", "python", "infilling"])
@pytest.mark.parametrize("part", ["system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa"])
def test_a_part_that_nothing_is_rendered_with_is_refused_by_name(tokenizer: Tokenizer, capability: Any, part: str) -> None:
    for name in ("hf", "codellama"):
        with pytest.raises(InvalidRequest, match=rf"ChatTemplateConfig\.{part} has no place") as refused:
            choose(tokenizer, ChatTemplateConfig(name, capability=capability, **{part: "X"}))  # type: ignore[arg-type]
        assert refused.value.param == part


def test_capability_infilling(tokenizer: Tokenizer) -> None:
    template = choose(tokenizer, ChatTemplateConfig("codellama", capability="infilling"))
    assert template.encode("def f(<FILL>): pass") == tokenizer.encode_raw("<PRE> def f( <SUF>): pass <MID>")
    assert template.stop_words == ("<EOT>",)
    more = choose(tokenizer, ChatTemplateConfig("codellama", capability="infilling", stop_words=("\n\n",)))
    assert more.stop_words == ("<EOT>", "\n\n")
    with pytest.raises(InvalidRequest, match="exactly one <FILL>"):
        template.encode("def f")
    with pytest.raises(InvalidRequest, match="can't infill"):
        choose(tokenizer, ChatTemplateConfig("vicuna", capability="infilling"))


@pytest.mark.parametrize(
    "role",
    [
        "__class__",
        "__import__('os').system('echo broken')",
        "system' + str(1)",
        "User",
        "function",
        "",
        None,
        7,
        ["user"],
        "tool\n",
    ],
)
def test_roles_only_select(role: Any) -> None:
    with pytest.raises(InvalidRequest, match="has the role"):
        parse_messages([{"role": role, "content": "x"}])


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        ["x"],
        [{"content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "x", "name": 3}],
        [{"role": "user", "content": "x", "name": ["ann"]}],
        [{"role": "user", "content": "x", "images": ["x.png"]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}, {"role": "user", "content": "x"}],
    ],
)
def test_malformed_conversations(bad: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_messages(bad)


def test_a_field_that_says_nothing_is_taken() -> None:
    """OpenAI's clients write all fields of a message that they were given back."""
    message = {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None, "reasoning_content": "", "prefix": False}
    assert parse_messages([message, {"role": "user", "content": "y"}])[0] == {"role": "assistant", "content": "x"}


def test_content_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]
    with pytest.raises(UnsupportedOption, match="image_url"):
        parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_a_template_may_write_the_speakers_name(tokenizer: Tokenizer, tiny_model_dir: Path) -> None:
    named = parse_messages([{"role": "user", "name": "ann", "content": "a"}, {"role": "user", "name": None, "content": "b"}])
    assert named == [{"role": "user", "content": "a", "name": "ann"}, {"role": "user", "content": "b"}]
    plain: list[Message] = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert choose(tokenizer).encode(named) == choose(tokenizer).encode(plain), "this template writes none"
    assert render_turns(FAMILIES["qwen"], named) == render_turns(FAMILIES["qwen"], plain)
    writes = Tokenizer(tiny_model_dir)
    writes.hf.chat_template = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}\n{% endfor %}"
    assert writes.decode(choose(writes).encode(named)) == "ann: a\nuser: b\n"


def test_what_a_jinja_template_refuses_is_the_callers_error(tokenizer: Tokenizer, tiny_model_dir: Path) -> None:
    strict = Tokenizer(tiny_model_dir)
    strict.hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        choose(strict).encode("hi")
    strict.hf.chat_template = None
    template = choose(strict)
    assert template.encode("hi") == strict.encode_raw("hi")
    with pytest.raises(InvalidRequest, match="no chat template for messages"):
        template.encode([{"role": "user", "content": "hi"}])


def test_misplaced_turns_are_refused_by_named_templates() -> None:
    late: list[Message] = [*TALK[1:], {"role": "system", "content": "late"}]
    with pytest.raises(InvalidRequest, match="head of the conversation"):
        render_turns(FAMILIES["llama2"], late)
    with pytest.raises(InvalidRequest, match="no form for the role 'tool'"):
        render_turns(FAMILIES["qwen"], [*TALK, {"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequest, match="needs a user message"):
        render_turns(FAMILIES["qwen"], TALK[:1])


def test_a_config_from_json(tmp_path: Path) -> None:
    text = '{"model_name": "vicuna", "meta_instruction": "M", "capability": "chat", "stop_words": ["USER"]}'
    (tmp_path / "template.json").write_text(text)
    expected = ChatTemplateConfig("vicuna", meta_instruction="M", capability="chat", stop_words=("USER",))
    assert ChatTemplateConfig.from_json(text) == ChatTemplateConfig.from_json(str(tmp_path / "template.json")) == expected
    assert ChatTemplateConfig.from_json(tmp_path / "template.json") == expected
    for wrong, words in (
        ("{", "can't be read"),
        ("/no/such/file", "can't be read"),
        ('{"user": "U"}', "model_name"),
        ('{"model_name": "vicuna", "sytem": "S"}', "'sytem'"),
        ('{"model_name": "vicuna", "capability": "sing"}', "capability"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            ChatTemplateConfig.from_json(wrong)
