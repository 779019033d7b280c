"""Wire shapes: what crosses HTTP, checked by pydantic over the same dataclasses that every room uses.

`GenerationConfig`, `Completion` and `Batch` have no twin here: a config is built by its own `from_dict`, a completion is its
dataclass, and `BatchOut` is the OpenAI Batch object with what is ours under the one key `headrace`.
This module knows no FastAPI, no SQL and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
)
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from headrace.batch import WINDOW, Batch, BatchStatus, RequestCounts, check_window
from headrace.completion import Completion, TokenUsage
from headrace.config import ROLES, GenerationConfig

_COMPLETION = TypeAdapter(Completion)
CompletionOut = Completion
"""One completion on the wire is the dataclass itself."""

_MESSAGE_SCHEMA = {
    "type": "object",
    "title": "Message",
    "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}, "name": {"type": "string"}},
    "required": ["role", "content"],
    "additionalProperties": False,
}
_PROMPTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [{"type": "string", "title": "Text"}, {"type": "array", "title": "Conversation", "items": _MESSAGE_SCHEMA}]
    },
}


_LINE_ENDS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\u0085\u2028\u2029")


def _config(value: object) -> object:
    """Build the config by its own constructor, so that HTTP accepts and refuses what `pipeline` does, in the same words."""
    return GenerationConfig() if value is None else GenerationConfig.from_dict(value)  # type: ignore[arg-type]  # it checks


def to_wire(value: Any) -> bytes:
    """Return JSON that every parser takes, and no reader of lines cuts in two.

    Infinities are the strings of pydantic, half surrogate pairs become U+FFFD, and what Unicode takes for an end of line is escaped.
    """
    try:
        data = to_json(value, inf_nan_mode="strings")
    except PydanticSerializationError:
        # One such character in a completion would otherwise cut the stream at that row for ever.
        data = to_json(_mended(to_jsonable_python(value, inf_nan_mode="strings")))
    if data.isascii():
        return data
    # `str.splitlines` and the `iter_lines` of OpenAI's client end a line at these; outside of texts JSON has none.
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return {key: _mended(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_completion(line: str | bytes) -> Completion:
    """Read one line of an NDJSON stream: the JSON of `to_wire(completion)`. Raises ValueError for anything else."""
    return _COMPLETION.validate_json(line)


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchCreate(BaseModel):
    """The body of POST /v1/batches: `prompts`, or the `input_file_id` of an uploaded file. Unknown fields are refused by name."""

    # Strict: "5" is not a number and 1 is not a text; a silent conversion would hide the caller's bug in a million rows.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(default=None, description="One of GET /v1/models; default: the first of them.")
    # Elements stay as they were parsed: pydantic's own union errors would be several records for each of a million prompts.
    prompts: Annotated[list[Any] | None, WithJsonSchema(_PROMPTS_SCHEMA)] = Field(
        default=None,
        description="Texts, or conversations of {role, content} messages (`name` where the model's chat template writes it). Answers come back under the same indexes.",
    )
    input_file_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="A file of POST /v1/files with one request a line, instead of `prompts`.",
    )
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/batches"] | None = Field(
        default=None,
        description=(
            "Of `input_file_id`. OpenAI's two: lines of {custom_id, method, url, body}, each body with its own sampling parameters. "
            "`/v1/batches` (the default): a JSON text, {prompt} or {messages} a line."
        ),
    )
    gen_config: Annotated[GenerationConfig, BeforeValidator(_config)] = Field(
        default_factory=GenerationConfig, description="How to continue every prompt of this batch."
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=16, description="At most 16 pairs of your own; keys up to 64 characters, values up to 512."
    )
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher is served first.")
    completion_window: Annotated[str, AfterValidator(check_window)] = Field(
        default="24h",
        json_schema_extra={"pattern": f"^{WINDOW}$"},
        description="The batch expires after so many seconds, minutes, hours or days.",
    )


class ErrorItem(BaseModel):
    """One reason why a whole batch failed."""

    model_config = ConfigDict(extra="allow")

    code: str | None = None
    message: str | None = None
    param: str | None = None
    line: int | None = None


class ErrorList(_Shape):
    """OpenAI's list of batch errors."""

    object: Literal["list"] = "list"
    data: list[ErrorItem]


class CountsOut(_Shape):
    """Prompts: all, answered, failed."""

    total: int
    completed: int
    failed: int


class CachedDetails(_Shape):
    """Prompt tokens that were read from the prefix cache."""

    cached_tokens: int


class ReasoningDetails(_Shape):
    """Always 0: no served model separates its reasoning."""

    reasoning_tokens: int = 0


class UsageOut(_Shape):
    """Tokens of the whole batch so far."""

    input_tokens: int
    input_tokens_details: CachedDetails
    output_tokens: int
    output_tokens_details: ReasoningDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: TokenUsage) -> Self:
        """Translate a `TokenUsage`."""
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=CachedDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=ReasoningDetails(),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class Links(_Shape):
    """Where to go from here; paths relative to the server."""

    self: str
    results: str
    results_jsonl: str
    cancel: str


class Extras(_Shape):
    """What OpenAI's Batch object has no field for."""

    gen_config: GenerationConfig
    priority: int
    progress: float = Field(description="Fraction of the prompts that are done, 0..1.")
    tokens_per_second: float | None = Field(description="Generated tokens a second so far; null before the first row.")
    eta_s: float | None = Field(description="Seconds of work left at the rate so far; 0 when over, null when unknown.")
    begun: int = Field(description="Prompts that workers are seen to have begun with, those that are done included.")
    started_at: float | None = Field(description="When a worker first claimed a chunk.")
    updated_at: float | None = Field(description="When a row was last recorded.")
    queue: Literal["sent", "unavailable"] | None = Field(
        default=None,
        description="Only in the reply to POST: 'unavailable' means that Redis was down; the reconciler sends the batch later.",
    )
    links: Links


class BatchOut(_Shape):
    """OpenAI's Batch object; times are whole Unix seconds, null while not reached. `headrace` holds what is ours."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str
    input_file_id: str = Field(description="'inline': the prompts came in the request body.")
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: CountsOut
    usage: UsageOut
    errors: ErrorList | None
    metadata: dict[str, str] | None
    headrace: Extras

    @classmethod
    def of(cls, batch: Batch, *, queue: Literal["sent", "unavailable"] | None = None) -> Self:
        """Translate a `Batch`; `queue` says in a reply to POST whether its first chunks were sent."""
        path = f"/v1/batches/{batch.id}"
        counts = batch.counts
        times: dict[str, Any] = {name: _seconds(getattr(batch, name)) for name in _TIMES}
        return cls(
            **times,
            id=batch.id,
            endpoint=batch.endpoint,
            model=batch.model,
            input_file_id=batch.input_file_id or "inline",
            output_file_id=batch.file_id("output"),
            error_file_id=batch.file_id("errors"),
            completion_window=batch.completion_window,
            status=batch.status,
            created_at=int(batch.created_at),
            request_counts=CountsOut(total=counts.total, completed=counts.completed, failed=counts.failed),
            usage=UsageOut.of(batch.usage),
            errors=ErrorList(data=[ErrorItem(**error) for error in batch.errors]) if batch.errors else None,
            metadata=dict(batch.metadata) or None,
            headrace=Extras(
                gen_config=batch.gen_config,
                priority=batch.priority,
                progress=batch.progress,
                tokens_per_second=batch.tokens_per_second,
                eta_s=batch.eta_s,
                begun=batch.begun,
                started_at=batch.started_at,
                updated_at=batch.updated_at,
                queue=queue,
                links=Links(
                    self=path, results=f"{path}/results", results_jsonl=f"{path}/results.jsonl", cancel=f"{path}/cancel"
                ),
            ),
        )


_TIMES = (
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def read_batch(data: Mapping[str, Any]) -> Batch:
    """Rebuild a `Batch` from a BatchOut object (times in whole seconds). Unknown keys of a newer server are ignored."""
    extras, counts, usage = data["headrace"], data["request_counts"], data["usage"]
    return Batch(
        **{name: data[name] for name in (*_TIMES, "id", "endpoint", "model", "completion_window", "created_at")},
        status=BatchStatus(data["status"]),
        counts=RequestCounts(total=counts["total"], completed=counts["completed"], failed=counts["failed"]),
        usage=TokenUsage(
            prompt_tokens=usage["input_tokens"],
            cached_tokens=usage["input_tokens_details"]["cached_tokens"],
            completion_tokens=usage["output_tokens"],
        ),
        gen_config=GenerationConfig.from_dict(extras["gen_config"]),
        priority=extras["priority"],
        begun=extras.get("begun", 0),  # a server of before doesn't say
        started_at=extras["started_at"],
        updated_at=extras["updated_at"],
        metadata=data["metadata"] or {},
        errors=tuple((data["errors"] or {}).get("data", ())),
        # A server of before had no files.
        input_file_id=None if data.get("input_file_id") in (None, "inline") else data["input_file_id"],
    )


class BatchPage(_Shape):
    """A page of batches, newest first; the next one is `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[BatchOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CompletionPage(_Shape):
    """A page of completions in input order. While the batch runs it ends before the first prompt that isn't done yet."""

    object: Literal["list"] = "list"
    data: list[CompletionOut]
    first_id: int | None
    last_id: int | None
    has_more: bool = Field(description="Whether more are there or will come.")
    next: str | None = Field(description="The path of the next page; null after the last prompt of the batch.")


class ModelOut(_Shape):
    """OpenAI's Model object."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"


class ModelList(_Shape):
    """The models that this server accepts."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class Check(_Shape):
    """One thing that the service needs."""

    name: str
    ok: bool
    detail: str


class Health(_Shape):
    """Whether this process can do its work, and if not, which part is missing."""

    status: Literal["ok", "ready", "not_ready"]
    checks: list[Check] = []
