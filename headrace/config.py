"""What a caller chooses: frozen values that check themselves when they are built.

Field names and defaults are those of LMDeploy's `pipeline` document of January 2024; later fields are additions.
This module knows no torch, no SQL and no HTTP. `GenerationConfig` travels unconverted from client to sampler; on a wire it
is `to_dict()` (only what differs from the default) and `from_dict()` (which refuses unknown fields by name).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict

from headrace.errors import InvalidRequest
from headrace.response_format import ResponseFormat
from headrace.validation import MOST as _MOST
from headrace.validation import Wire as _Wire
from headrace.validation import check as _check
from headrace.validation import ids as _ids
from headrace.validation import is_int as _is_int
from headrace.validation import is_number as _is_number
from headrace.validation import words as _words


class Message(TypedDict):
    """One turn of a conversation in OpenAI's form; `content` is text. `name` tells speakers of one role apart, where a template writes it."""

    role: str
    content: str
    name: NotRequired[str]


ROLES = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "name")


def extra_fields(message: Mapping[str, Any]) -> list[str]:
    """Give the names of a message's fields that no prompt has a place for. Those that say nothing don't count: clients write them back."""
    return sorted(str(name) for name, value in message.items() if name not in MESSAGE_FIELDS and not _says_nothing(value))


def _says_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


Prompt = str | list[Message]
"""One prompt: a text, or a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig(_Wire):
    """How to continue one prompt.

    Order of operations on the fp32 logits of one row: `response_format`, bad words and `bad_token_ids`, `logit_bias`,
    repetition penalty (CTRL rule over prompt and output), presence and frequency penalty (over output), `min_new_tokens`,
    temperature, top-k, top-p, min-p, draw. `top_k=1` or `temperature=0` is greedy: argmax after the penalties.
    """

    n: int = 1
    """Choices for each prompt, 1..128."""
    max_new_tokens: int | None = 512
    """Most tokens to generate; None: as many as the session length leaves."""
    top_p: float = 1.0
    """Keep the most probable tokens while those before them sum up to at most this; 1 keeps all."""
    top_k: int = 1
    """Keep the k most probable tokens; 0 keeps all; 1 (the default) is greedy."""
    temperature: float = 0.8
    """Logits are divided by it; 0 is greedy."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the output less likely: logits above 0 are divided by it, others multiplied."""
    ignore_eos: bool = False
    """Never stop on, and never emit, an end-of-sequence or stop token: exactly `max_new_tokens` tokens come back, but where one of the
    caller's `stop_words` that is no such token ends the text."""
    random_seed: int | None = None
    """64-bit seed; the same seed gives the same text whatever else runs, and choices draw apart. None: drawn for each prompt.
    In a call all prompts have this seed; in a batch or job each item's is made of it and the item's index."""
    stop_words: tuple[str, ...] = field(default=())
    """Texts that end the generation, matched on the decoded text across token boundaries; left out of the text."""
    bad_words: tuple[str, ...] = field(default=())
    """Texts that are not generated as the tokenizer writes them at the start of a text, after a space and inside a line (token
    sequences are banned at their last token). Inside a longer token, or spelled in other tokens, the letters may still come."""
    min_p: float = 0.0
    """Keep tokens that are at least this fraction as probable as the best one; 0 keeps all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the output has it."""
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens are banned until so many tokens are there; a stop word that is complete before ends nothing."""
    stop_token_ids: tuple[int, ...] = field(default=())
    """Tokens that end the generation, as the end-of-sequence token does."""
    bad_token_ids: tuple[int, ...] = field(default=())
    """Tokens that are never generated."""
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    """(token id, added to its logit) pairs; a mapping is accepted."""
    prompt_logprobs: int | None = None
    """With k: for each prompt token but the first its raw log-probability and the k most probable ones; 0..20.
    Such a prompt is computed whole, without the prefix cache."""
    logprobs: int | None = None
    """With k: for each token its raw log-probability and the k most probable ones; 0..20."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text; they stay in the token ids."""
    include_stop_str_in_output: bool = False
    """Leave the stop word that ended the text in it."""
    response_format: ResponseFormat | None = None
    """What the answer must match: `{"type": "json_object"}`, `{"type": "json_schema", "json_schema": {"schema": {…}}}`,
    `{"type": "regex", "regex": "…"}` or `{"type": "grammar", "grammar": "…"}` (Lark or GBNF); None or `{"type": "text"}`:
    anything. Only an answer that finished with 'stop' is sure to match: `max_new_tokens` and stop words cut it. Between the parts
    of a JSON text stands one space or none; properties come in the schema's order. Regular formats (most forms; decision 0015 lists
    their keywords) are followed on the device and cost next to nothing; there an object that lists `properties` and says nothing of
    others has no others. Any other format is followed by the host, slower."""

    def __post_init__(self) -> None:
        """Check every field; raise `InvalidRequest` (a ValueError) naming the first that is wrong."""
        self.take_plain_numbers()
        put = object.__setattr__
        for name in ("stop_words", "bad_words"):
            put(self, name, _words(name, getattr(self, name)))
        for name in ("stop_token_ids", "bad_token_ids"):
            put(self, name, _ids(name, getattr(self, name)))
        put(self, "logit_bias", _bias(self.logit_bias))
        whole = {"n": (1, 128), "top_k": (0, _MOST), "min_new_tokens": (0, _MOST)}
        for name, (low, high) in whole.items():
            value = getattr(self, name)
            _check(
                _is_int(value, low, high),
                name,
                value,
                f"a whole number from {low} to {high}",
            )
        real = {
            "top_p": (0, 1),
            # One that isn't a float32, or makes logits too large for one, would be found as NaN in the middle of a batch.
            "repetition_penalty": (0.001, 1000),
            "min_p": (0, 1),
            "temperature": (0, 2),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
        }
        for name, (lo, hi) in real.items():
            value = getattr(self, name)
            _check(_is_number(value, lo, hi), name, value, f"a number from {lo} to {hi}")
        for name, low, high in (
            ("max_new_tokens", 1, _MOST),
            ("random_seed", 0, 2**64 - 1),
            ("logprobs", 0, 20),
            ("prompt_logprobs", 0, 20),
        ):
            value = getattr(self, name)
            rule = f"None or a whole number from {low} to {high}"
            _check(value is None or _is_int(value, low, high), name, value, rule)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}; lower it or raise the other",
                param="min_new_tokens",
            )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        put(self, "response_format", ResponseFormat.parse(self.response_format))
        if self.ignore_eos and self.response_format is not None:
            raise InvalidRequest(
                "response_format ends the answer where it is complete, ignore_eos never ends it; give one of them",
                param="response_format",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.top_k == 1 or self.temperature == 0


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    ok = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    _check(ok, "logit_bias", value, "a mapping of token id to a number from -100 to 100")
    out = []
    for token, bias in pairs:  # type: ignore[attr-defined]  # checked above
        token_id = (
            int(token) if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10 else token
        )  # JSON objects have string keys
        _check(
            _is_int(token_id, 0, _MOST) and _is_number(bias, -100, 100),
            "logit_bias",
            value,
            "a mapping of token id to a number from -100 to 100",
        )
        out.append((token_id, float(bias)))
    _check(len(dict(out)) == len(out), "logit_bias", value, "a mapping that names each token id once")
    return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class PytorchEngineConfig(_Wire):
    """How to run the engine. A field that this build can't honour is refused by name when the engine starts."""

    model_name: str | None = None
    """Chat template name; None (or ''): the tokenizer's own template."""
    tp: int = 1
    """Devices (on a CPU: processes) that share each layer; it divides the model's heads."""
    session_len: int | None = None
    """Most tokens (prompt and output) of one sequence; None: what the model's config allows."""
    max_batch_size: int | None = 128
    """Most sequences that run at once; None: by device, 128 on a CPU, on a GPU by its memory: 1,024 from 64 GiB, 512 from 40, 256 from 20, else 128."""
    eviction_type: Literal["recompute", "copy"] = "recompute"
    """What becomes of a sequence that gives its KV blocks to others."""
    prefill_interval: int = 16
    """Most decode steps in a row while prompts wait and could be admitted."""
    block_size: int = 64
    """Tokens per KV block; a power of two of at least 16."""
    num_cpu_blocks: int = 0
    """KV blocks on the host, for `eviction_type='copy'`."""
    num_gpu_blocks: int = 0
    """KV blocks in the pool; 0: from `cache_max_entry_count` and the memory that is free."""
    adapters: dict[str, str] | None = None
    """LoRA adapters: name to path."""
    max_prefill_token_num: int = 8192
    """Most tokens that one step computes."""
    cache_max_entry_count: float = 0.8
    """Fraction of the memory left after weights and activations that the KV pool takes."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of what was computed, and don't compute an equal beginning again."""
    quant_policy: Literal[0, 8] = 0
    """KV cache: 0 in the weights' type, 8 as 8-bit integers, one scale for each token's key and value of each head."""
    rope_scaling_factor: float = 0.0
    """From 1 on: stretch the rope of a sequence that may reach more tokens than the model was trained with (dynamic NTK), and let a session be so much longer; below: off."""
    use_logn_attn: bool = False
    """Scale queries beyond the trained length by the logarithm of their position; `rope_scaling_factor` lets sessions get there."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Weights, and the KV cache unless `quant_policy` says otherwise; 'auto': the checkpoint's on a GPU, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """'auto': CUDA where the host has a device, else the CPU."""
    eager_mode: bool = False
    """Run without CUDA graphs."""

    @classmethod
    def for_batches(cls, data: Mapping[str, Any]) -> Self:
        """Read the fields given for a worker or an offline job: where nothing is said of `max_batch_size`, it goes by the device."""
        return cls.from_dict({"max_batch_size": None, **data})

    def __post_init__(self) -> None:
        """Check every field; raise `InvalidRequest` naming the first that is wrong."""
        self.take_plain_numbers()
        object.__setattr__(self, "model_name", self.model_name or None)
        _check_engine_fields(self)
        _check(self.eviction_type in ("recompute", "copy"), "eviction_type", self.eviction_type, "'recompute' or 'copy'")
        _check(
            self.dtype in ("auto", "float32", "float16", "bfloat16"),
            "dtype",
            self.dtype,
            "'auto', 'float32', 'float16' or 'bfloat16'",
        )
        _check(self.device in ("auto", "cuda", "cpu"), "device", self.device, "'auto', 'cuda' or 'cpu'")
        policy = self.quant_policy
        _check(_is_int(policy, 0) and policy in (0, 8), "quant_policy", policy, "0 or 8 (there is no 4-bit KV cache)")
        size = self.block_size
        _check(_is_int(size, 16) and size & (size - 1) == 0, "block_size", size, "a power of two of at least 16")
        fraction = self.cache_max_entry_count
        _check(_is_number(fraction) and 0 < fraction < 1, "cache_max_entry_count", fraction, "a number between 0 and 1")
        for name, low in (("prefill_interval", 1), ("num_cpu_blocks", 0), ("num_gpu_blocks", 0), ("max_prefill_token_num", 1)):
            _check(_is_int(getattr(self, name), low), name, getattr(self, name), f"a whole number from {low}")
        ok = self.adapters is None or (
            isinstance(self.adapters, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in self.adapters.items())
        )
        _check(ok, "adapters", self.adapters, "None or a mapping of name to path")
        for name in ("enable_prefix_caching", "eager_mode", "use_logn_attn"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurbomindEngineConfig(_Wire):
    """The other configuration class of the document; it is mapped field by field onto the same engine."""

    model_name: str | None = None
    """Chat template name; None: the tokenizer's own template."""
    model_format: Literal["hf", "llama", "awq"] | None = None
    """Layout of the checkpoint: 'hf', or 'awq' (4 bits, unpacked as they are read); None: found out."""
    tp: int = 1
    """Devices (on a CPU: processes) that share each layer; it divides the model's heads."""
    session_len: int | None = None
    """Most tokens (prompt and output) of one sequence; None: what the model's config allows."""
    max_batch_size: int | None = 128
    """Most sequences that run at once; None: by device, 128 on a CPU, on a GPU by its memory: 1,024 from 64 GiB, 512 from 40, 256 from 20, else 128."""
    cache_max_entry_count: float = 0.5
    """Below 1: fraction of the memory left for the KV pool; a whole number from 1: KV blocks."""
    quant_policy: int = 0
    """KV cache: 0 in the weights' type; 4 (the document's number) or 8 as 8-bit integers."""
    rope_scaling_factor: float = 0.0
    """From 1 on: stretch the rope of a sequence that may reach more tokens than the model was trained with (dynamic NTK), and let a session be so much longer; below: off."""
    use_logn_attn: bool = False
    """Scale queries beyond the trained length by the logarithm of their position; `rope_scaling_factor` lets sessions get there."""

    def __post_init__(self) -> None:
        """Check every field; raise `InvalidRequest` naming the first that is wrong."""
        self.take_plain_numbers()
        object.__setattr__(self, "model_name", self.model_name or None)
        _check_engine_fields(self)
        _check(
            self.model_format in (None, "hf", "llama", "awq"), "model_format", self.model_format, "None, 'hf', 'llama' or 'awq'"
        )
        count = self.cache_max_entry_count
        ok = _is_number(count) and count > 0 and (count < 1 or float(count).is_integer())
        _check(ok, "cache_max_entry_count", count, "a number between 0 and 1, or a whole number of blocks")
        policy = self.quant_policy
        _check(_is_int(policy, 0) and policy in (0, 4, 8), "quant_policy", policy, "0, 4 or 8")
        _check(isinstance(self.use_logn_attn, bool), "use_logn_attn", self.use_logn_attn, "true or false")


def _check_engine_fields(config: PytorchEngineConfig | TurbomindEngineConfig) -> None:
    factor = config.rope_scaling_factor
    _check(_is_number(factor, 0, 1024), "rope_scaling_factor", factor, "a number from 0 to 1024")
    _check(config.model_name is None or isinstance(config.model_name, str), "model_name", config.model_name, "None or a string")
    _check(_is_int(config.tp, 1), "tp", config.tp, "a whole number from 1")
    _check(
        config.max_batch_size is None or _is_int(config.max_batch_size, 1),
        "max_batch_size",
        config.max_batch_size,
        "None or a whole number from 1",
    )
    _check(
        config.session_len is None or _is_int(config.session_len, 1),
        "session_len",
        config.session_len,
        "None or a whole number from 1",
    )


EngineConfig = PytorchEngineConfig | TurbomindEngineConfig


@dataclass(frozen=True, slots=True)
class ChatTemplateConfig(_Wire):
    """How messages become text. Text fields that are None keep the named template's own."""

    model_name: str
    """A template's name; its parts are used where the fields below are None."""
    system: str | None = None
    """Stands before the system text."""
    meta_instruction: str | None = None
    """The system text of a conversation that brings none; '': no system part."""
    eosys: str | None = None
    """Stands after the system text."""
    user: str | None = None
    """Stands before a user's text."""
    eoh: str | None = None
    """Stands after a user's text."""
    assistant: str | None = None
    """Stands before the assistant's text, and at the end of the prompt."""
    eoa: str | None = None
    """Stands after the assistant's text."""
    capability: Literal["completion", "infilling", "chat", "python"] | None = None
    """'chat' (and None): the template. 'completion', 'python': the text as it is. 'infilling': what belongs at `<FILL>` (codellama).
    Only 'chat' takes the parts above."""
    stop_words: tuple[str, ...] = field(default=())
    """Texts that end the generation, besides the template's own and the model's end-of-sequence tokens. Like the template's own
    they are left out where `ignore_eos` or a `response_format` is asked for."""

    def __post_init__(self) -> None:
        """Check every field; raise `InvalidRequest` naming the first that is wrong."""
        object.__setattr__(self, "stop_words", _words("stop_words", self.stop_words))
        _check(isinstance(self.model_name, str) and bool(self.model_name), "model_name", self.model_name, "a template's name")
        for name in ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa"):
            _check(
                getattr(self, name) is None or isinstance(getattr(self, name), str),
                name,
                getattr(self, name),
                "None or a string",
            )
        _check(
            self.capability in (None, "completion", "infilling", "chat", "python"),
            "capability",
            self.capability,
            "'completion', 'infilling', 'chat' or 'python'",
        )

    @classmethod
    def from_json(cls, file_or_text: str | PathLike[str]) -> Self:
        """Read a JSON file, or JSON text, with this class's fields; raise `InvalidRequest` saying what is wrong with it."""
        try:
            file_or_text = fspath(file_or_text)
            text = file_or_text if file_or_text.lstrip().startswith("{") else Path(file_or_text).read_text(encoding="utf-8")
            data = json.loads(text)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"the chat template can't be read: {error}", param="chat_template_config") from error
        if isinstance(data, dict) and "model_name" not in data:
            raise InvalidRequest(
                "the chat template's JSON names no model_name; 'base' has no parts of its own", param="model_name"
            )
        return cls.from_dict(data)
