"""The values that cross the store's border, and how prompts and answers are written down as JSON.

Everything here is frozen. This module knows no SQL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, NamedTuple, Self

from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs, TokenText, read_logprobs, read_texts
from headrace.config import GenerationConfig, Prompt
from headrace.errors import InvalidRequest

MESSAGE_VERSION: Final = 1
_CHOICE_FIELDS = tuple(spec.name for spec in fields(Choice))


class ChunkState(StrEnum):
    """Where a chunk stands: queued → leased → done; leased → queued when its worker is lost; either → cancelled."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    CANCELLED = "cancelled"


class RecordStatus(StrEnum):
    """What became of a claim's rows."""

    OK = "ok"
    """They are committed; the lease is extended."""
    FENCED = "fenced"
    """Another worker holds the chunk (or it was handed back): nothing was written, stop working on it."""
    CANCELLED = "cancelled"
    """The batch was cancelled or has expired; every row of the chunk is settled, stop working on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRef:
    """A chunk that is to be sent now: rows `start` to `stop` (exclusive) of a batch, the `number`-th (from 1) of `of`."""

    chunk_id: str
    batch_id: str
    number: int
    of: int
    start: int
    stop: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMessage:
    """What Redis carries for one chunk: `prompts[i]` is the prompt at index `start + i`, None when it was refused at the rim."""

    version: int = MESSAGE_VERSION
    batch_id: str
    chunk_id: str
    number: int
    of: int
    start: int
    stop: int
    model: str
    gen_config: GenerationConfig
    prompts: tuple[Prompt | None, ...]
    own_configs: Mapping[int, GenerationConfig] = field(default_factory=dict)
    """By index, the configs of the prompts that have one of their own."""
    is_raw: bool = False
    """Whether texts are continued as they are, without a chat template."""

    def config_of(self, index: int) -> GenerationConfig:
        """Return how the prompt at `index` is continued."""
        return self.own_configs.get(index, self.gen_config)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        data = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        data |= {"gen_config": self.gen_config.to_dict(), "prompts": list(self.prompts)}
        # Left out where they say nothing: a worker of the release before reads the message then, and else leaves it to another.
        del data["own_configs"], data["is_raw"]
        if self.own_configs:
            data["own_configs"] = {str(index): config.to_dict() for index, config in self.own_configs.items()}
        return {**data, "is_raw": True} if self.is_raw else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict` form; raise `InvalidRequest` for a version that this build doesn't know."""
        if data.get("version") != MESSAGE_VERSION:
            raise InvalidRequest(
                f"chunk message version {data.get('version')!r} is not {MESSAGE_VERSION}: run the same release everywhere"
            )
        own = {int(index): GenerationConfig.from_dict(config) for index, config in data.get("own_configs", {}).items()}
        config = GenerationConfig.from_dict(data["gen_config"])
        return cls(**{**data, "gen_config": config, "own_configs": own, "prompts": tuple(data["prompts"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to work on one chunk, void as soon as the chunk's epoch is another."""

    chunk_id: str
    batch_id: str
    number: int
    of: int
    start: int
    stop: int
    model: str
    epoch: int
    attempt: int
    """1 for the first worker. Higher: so many earlier claims ended without the chunk being done or handed back."""
    worker: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """A prompt that has neither answer nor error yet."""

    index: int
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordResult:
    """What became of the rows that were given for `claim`; `inserted` counts those that were not there before."""

    claim: Claim
    status: RecordStatus
    inserted: int = 0

    @property
    def is_held(self) -> bool:
        """Whether the worker goes on with the chunk."""
        return self.status is RecordStatus.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker as it last reported itself; times are Unix seconds of the database's clock."""

    id: str
    host: str
    model: str
    started_at: float
    heartbeat_at: float
    age_s: float
    """Seconds since the last heartbeat, by the database's clock."""
    stats: Mapping[str, Any] = field(default_factory=dict)


def to_json(value: Any) -> str:
    """Return compact JSON that every database takes: NUL is escaped by JSON itself, lone surrogates by ASCII form."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def encode_answer(
    choices: tuple[Choice, ...],
    error: CompletionError | None,
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None,
    token_texts: Mapping[int, TokenText] | None = None,
) -> str:
    """Return the JSON of what a completion says, without what the row's columns hold."""
    data: dict[str, Any] = {
        "choices": [_choice(choice) for choice in choices],
        "error": None if error is None else asdict(error),
    }
    if prompt_logprobs is not None:
        data["prompt_logprobs"] = _logprobs(prompt_logprobs)
    if token_texts is not None:
        data["token_texts"] = token_texts
    return to_json(data)


def _logprobs(rows: tuple[TokenLogprobs, ...]) -> list[dict[str, Any]]:
    return [{"token_id": row.token_id, "logprob": row.logprob, "top": row.top} for row in rows]


def _choice(choice: Choice) -> dict[str, Any]:
    # Not asdict(): it visits every token id, which costs more than the insert does.
    data = {name: getattr(choice, name) for name in _CHOICE_FIELDS}
    if choice.logprobs is not None:
        data["logprobs"] = _logprobs(choice.logprobs)
    return data


class Answer(NamedTuple):
    """What a row's body says."""

    choices: tuple[Choice, ...]
    error: CompletionError | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    token_texts: Mapping[int, TokenText] | None


def decode_answer(text: str) -> Answer:
    """Undo `encode_answer`."""
    data = json.loads(text)
    error = data["error"]
    return Answer(
        choices=tuple(Choice.from_dict(choice) for choice in data["choices"]),
        error=None if error is None else CompletionError(**error),
        # Bodies of before have no such keys.
        prompt_logprobs=read_logprobs(data.get("prompt_logprobs")),
        token_texts=read_texts(data.get("token_texts")),
    )


def refusal(index: int, error: CompletionError) -> Completion:
    """Return the completion of a prompt that no engine ever saw."""
    return Completion(index=index, error=error, attempts=0)
