"""Conversations to text: the tokenizer's own template first, or a named one as data over one rendering rule.

Which one: `chat_template_config` or `model_name` of the call, then `backend_config.model_name`, then the tokenizer's. Nothing
is guessed from a directory's name. A role only selects among known parts; it is never looked up or evaluated.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from engine.template_families import FAMILIES, TemplateParts
from engine.tokenizer import Tokenizer
from headrace.config import MESSAGE_FIELDS, ROLES, ChatTemplateConfig, Message, extra_fields
from headrace.errors import InvalidRequest, UnsupportedOption

OWN = "hf"
"""The name that stands for the tokenizer's own template."""
END_OF_INFILLING = "<EOT>"
_PART_FIELDS = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa")
_REMEDY = "pass chat_template_config=ChatTemplateConfig(model_name=…), or send plain text with do_preprocess=False"


class ChatTemplate(Protocol):
    """Renders one prompt."""

    @property
    def source(self) -> str:
        """Where the template comes from, for the report."""
        ...

    @property
    def stop_words(self) -> tuple[str, ...]:
        """What ends an answer, besides the model's end-of-sequence tokens."""
        ...

    def encode(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Return the prompt's token ids; raise `InvalidRequest` for a conversation that has no form here."""
        ...


def parse_messages(prompt: object) -> list[Message]:
    """Check a conversation and join its text parts; raise `InvalidRequest` saying which message is wrong and why."""
    if not isinstance(prompt, list | tuple) or not prompt:
        raise InvalidRequest("a conversation is a non-empty list of {'role', 'content'} messages", param="messages")
    messages = [_parse_message(number, message) for number, message in enumerate(prompt)]
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise InvalidRequest("the last message of the conversation is empty; write something in it", param="messages")
    return messages


def _parse_message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"message {number} is not an object with 'role' and 'content'", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"message {number} has the role {role!r:.80}; the roles are {', '.join(ROLES)}", param="messages")
    if extra := extra_fields(message):
        raise UnsupportedOption(
            f"message {number} ({role}) has a field {extra[0]!r:.80}, which goes into no prompt; its fields are {', '.join(MESSAGE_FIELDS)}",
            param="messages",
        )
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(_text_part(number, part) for part in content)
    if not isinstance(content, str):
        raise InvalidRequest(f"message {number} ({role}) has no text in 'content'", param="messages")
    name = message.get("name")
    if name is None:
        return {"role": role, "content": content}
    if not isinstance(name, str):
        raise InvalidRequest(f"message {number} ({role}) has the name {name!r:.80}; a name is text", param="messages")
    return {"role": role, "content": content, "name": name}


def _text_part(number: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UnsupportedOption(
        f"message {number} has a content part of type {kind!r:.40}; only 'text' parts are supported", param="messages"
    )


def render_turns(parts: TemplateParts, messages: Sequence[Message]) -> str:
    """Write a conversation in a family's form.

    System messages at the head replace `meta_instruction`. A conversation that ends with the assistant is continued: its last
    text stays open, without `eoa` and without a new opening.
    """
    head = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[len(head) :]):
        raise InvalidRequest("this chat template takes system messages at the head of the conversation only", param="messages")
    if not turns:
        raise InvalidRequest("a conversation needs a user message besides the system's", param="messages")
    system = "\n".join(head) or parts.meta_instruction
    system_part = f"{parts.system}{system}{parts.eosys}" if system else ""
    inside = system_part if parts.system_inside_user else ""
    text = "" if parts.system_inside_user else system_part
    rounds = itertools.count(1)  # here, not beside the parts: a number kept there would go on in somebody else's conversation
    for turn in turns:
        if turn["role"] == "user":
            if parts.round_number:
                text += str(next(rounds)).join(parts.round_number)
            text += f"{parts.user}{inside}{turn['content']}{parts.eoh}"
            inside = ""
        elif turn["role"] == "assistant":
            text += f"{parts.assistant}{turn['content']}{parts.eoa}"
        else:
            raise InvalidRequest(f"this chat template has no form for the role {turn['role']!r}", param="messages")
    if inside:
        raise InvalidRequest("this chat template puts the system text into a user message, and there is none", param="messages")
    if turns[-1]["role"] == "assistant":
        return text[: len(text) - len(parts.eoa)]
    return text + (parts.assistant if parts.opening is None else parts.opening)


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A family of the registry, perhaps with parts of the caller's own."""

    tokenizer: Tokenizer
    parts: TemplateParts
    source: str
    stop_words: tuple[str, ...]

    def encode(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Render and encode; BOS stands first where the tokenizer puts it before every text."""
        messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode_chat(self.tokenizer.bos_text + render_turns(self.parts, messages))


@dataclass(frozen=True, slots=True)
class TokenizerTemplate:
    """The Jinja template that came with the model."""

    tokenizer: Tokenizer
    meta_instruction: str
    source: str
    stop_words: tuple[str, ...]

    def encode(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Render and encode; what the template itself refuses is an `InvalidRequest` with its words."""
        from jinja2 import TemplateError  # only where a template is rendered

        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        if self.meta_instruction and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=self.meta_instruction))
        try:
            text = self.tokenizer.render(messages, continue_final=messages[-1]["role"] == "assistant")
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}", param="messages") from error
        return self.tokenizer.encode_chat(text)


@dataclass(frozen=True, slots=True)
class RawTemplate:
    """No template: text is continued as it stands (capability 'completion' or 'python', a base model)."""

    tokenizer: Tokenizer
    source: str
    stop_words: tuple[str, ...] = ()
    infill: tuple[str, str, str] | None = None

    def encode(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Encode text; raise `InvalidRequest` for messages."""
        if not isinstance(prompt, str):
            raise InvalidRequest(f"there is no chat template for messages ({self.source}); {_REMEDY}", param="messages")
        if self.infill is None:
            return self.tokenizer.encode_raw(prompt)
        if prompt.count("<FILL>") != 1:
            raise InvalidRequest("capability='infilling' needs exactly one <FILL> in the prompt", param="prompt")
        prefix, suffix = prompt.split("<FILL>")
        before, between, after = self.infill
        return self.tokenizer.encode_raw(f"{before}{prefix}{between}{suffix}{after}")


def choose_template(
    tokenizer: Tokenizer, *, config: ChatTemplateConfig | None, model_name: str | None, engine_model_name: str | None
) -> ChatTemplate:
    """Pick the template; raise `InvalidRequest` where two names differ or a name isn't known, or is no name."""
    if config is not None and not isinstance(config, ChatTemplateConfig):
        kind = type(config).__name__
        raise InvalidRequest(f"chat_template_config is a ChatTemplateConfig, not {kind}", param="chat_template_config")
    if not isinstance(model_name, str | None):
        raise InvalidRequest(f"model_name is a chat template's name, not {model_name!r:.80}", param="model_name")
    named = {"chat_template_config.model_name": config.model_name if config else None, "model_name": model_name or None}
    named["backend_config.model_name"] = engine_model_name or None
    given = {param: name for param, name in named.items() if name}
    if len(set(given.values())) > 1:
        listed = " and ".join(f"{param}={name!r}" for param, name in given.items())
        raise InvalidRequest(f"{listed} name different chat templates; give one", param="model_name")
    name = next(iter(given.values()), OWN)
    config = config or ChatTemplateConfig(model_name=name)
    if config.capability not in (None, "chat"):
        unused = next((field for field in _PART_FIELDS if getattr(config, field)), None)
        if unused is not None:
            message = f"ChatTemplateConfig.{unused} has no place where capability={config.capability!r} renders no messages"
            raise InvalidRequest(message, param=unused)
    return _own_template(tokenizer, config, is_asked_for=bool(given)) if name == OWN else _named_template(tokenizer, config)


def _own_template(tokenizer: Tokenizer, config: ChatTemplateConfig, *, is_asked_for: bool) -> ChatTemplate:
    for field in _PART_FIELDS:
        if field != "meta_instruction" and getattr(config, field) is not None:
            raise InvalidRequest(
                f"ChatTemplateConfig.{field} has no place in the tokenizer's own template (model_name={OWN!r})", param=field
            )
    if config.capability in ("completion", "python"):
        return RawTemplate(tokenizer, f"none: capability={config.capability!r}", config.stop_words)
    if config.capability == "infilling":
        raise InvalidRequest("capability='infilling' needs a template that has it: model_name='codellama'", param="capability")
    if config.meta_instruction == "":
        raise InvalidRequest(
            "meta_instruction='' has no place in the tokenizer's own template, which may have a system text of its own; give a text, "
            "or name one of our templates",
            param="meta_instruction",
        )
    if tokenizer.chat_template:
        return TokenizerTemplate(tokenizer, config.meta_instruction or "", "the tokenizer's own template", config.stop_words)
    if is_asked_for:
        raise InvalidRequest("the model's tokenizer has no chat template of its own; name one of ours", param="model_name")
    return RawTemplate(tokenizer, "the model's tokenizer has none")


def _named_template(tokenizer: Tokenizer, config: ChatTemplateConfig) -> ChatTemplate:
    name = config.model_name
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(sorted((*FAMILIES, OWN)))
        raise InvalidRequest(f"there is no chat template {name!r}; the names are {known}", param="model_name")
    own: dict[str, Any] = {field: getattr(config, field) for field in _PART_FIELDS if getattr(config, field) is not None}
    # An `assistant` text of the caller's is also what opens the answer: the family's shorter opening no longer fits it.
    if "assistant" in own:
        own["opening"] = None
    parts = replace(family, **own)
    stop_words = tuple(dict.fromkeys(family.stop_words + config.stop_words))
    source = f"the named template {name!r}"
    if config.capability == "infilling":
        if parts.infill is None:
            raise InvalidRequest(f"the template {name!r} can't infill; model_name='codellama' can", param="capability")
        return RawTemplate(
            tokenizer, f"{source}, infilling", tuple(dict.fromkeys((END_OF_INFILLING, *config.stop_words))), parts.infill
        )
    if config.capability in ("completion", "python") or (family.is_raw and not any(own.values())):
        return RawTemplate(tokenizer, f"{source}, which is for plain text", config.stop_words)
    return NamedTemplate(tokenizer, parts, source, stop_words)
