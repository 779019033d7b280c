"""The one exception tree. Every class has a wire `code` and an HTTP `status`; its docstring is its default message.

    HeadraceError                     500 internal_error
    ├── InvalidRequest (ValueError)   422 invalid_request        the caller sent something that can never work
    │   ├── UnsupportedOption         422 unsupported_option     a documented option that this build refuses by name
    │   └── ContextLengthExceeded     422 context_length_exceeded
    ├── Unauthorized                  401 invalid_api_key
    ├── NotFound                      404 not_found
    │   └── ModelNotFound             404 model_not_found
    ├── Conflict                      409 conflict
    │   └── NotStored                 409 conflict               an equal request is being stored; the same one will do in a moment
    ├── PayloadTooLarge               413 payload_too_large
    │   └── HeadersTooLarge           431 headers_too_large
    ├── QueueFull                     429 queue_full
    │   └── QuotaExceeded             429 quota_exceeded         the caller's API key is at one of its limits
    ├── StorageFull                   507 storage_full
    ├── StoreUnavailable              503 store_unavailable
    ├── QueueUnavailable              503 queue_unavailable
    ├── ServiceUnavailable            503 service_unavailable    the API itself doesn't answer (raised by the client)
    └── EngineError                   500 engine_error
        ├── ModelLoadError            500 model_load_error       also a bad path, an unknown architecture, no way to the hub
        ├── KVCapacity                422 kv_capacity            the prompt alone is larger than the KV pool
        ├── OutOfDeviceMemory         503 out_of_device_memory   not even the request alone fits beside what others hold
        ├── NumericalError            500 numerical_error        NaN logits in one row
        ├── RankLost                  503 rank_lost              an engine process died
        ├── PoisonPrompt              500 poison_prompt          alone in the engine, this prompt killed it
        └── RequestAborted            499 aborted

An `assert` in headrace is for our own bugs only. A message says what to do.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Something went wrong inside headrace; the log of the process that raised it says more."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str | None = None, *, param: str | None = None, index: int | None = None) -> None:
        """Keep `param` (the offending field) and `index` (the offending prompt's position) beside the message."""
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.index = index
        super().__init__(self.message)


class InvalidRequest(HeadraceError, ValueError):
    """The request can't be carried out as it stands; correct the named field and send it again."""

    code = "invalid_request"
    status = 422


class UnsupportedOption(InvalidRequest):
    """This option is known but not supported by this build; leave it at its default."""

    code = "unsupported_option"


class ContextLengthExceeded(InvalidRequest):
    """The prompt is longer than the session length; shorten it or raise session_len."""

    code = "context_length_exceeded"


class Unauthorized(HeadraceError):
    """No valid API key came with the request; send `Authorization: Bearer <key>`."""

    code = "invalid_api_key"
    status = 401


class NotFound(HeadraceError):
    """Nothing is stored under this id; list the batches to see which exist."""

    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    """No worker serves this model; GET /v1/models lists the ones that are served."""

    code = "model_not_found"


class Conflict(HeadraceError):
    """The resource is in a state that doesn't allow this."""

    code = "conflict"
    status = 409


class NotStored(Conflict):
    """The batch could not be stored just now; send the same request again in a moment."""


class PayloadTooLarge(HeadraceError):
    """The request body is larger than this server accepts; split the batch."""

    code = "payload_too_large"
    status = 413


class HeadersTooLarge(PayloadTooLarge):
    """The request's headers are larger than this server accepts; send fewer or shorter ones."""

    code = "headers_too_large"
    status = 431


class QueueFull(HeadraceError):
    """This server has as many unanswered prompts as it accepts; send the request again when some are answered."""

    code = "queue_full"
    status = 429


class QuotaExceeded(QueueFull):
    """This API key is at one of its limits; send the request again when some of its batches are done."""

    code = "quota_exceeded"


class StorageFull(HeadraceError):
    """The database's disk is full; free some space, then send the request again. Nothing recorded was lost."""

    code = "storage_full"
    status = 507


class StoreUnavailable(HeadraceError):
    """The database can't be reached; try again shortly."""

    code = "store_unavailable"
    status = 503


class QueueUnavailable(HeadraceError):
    """Redis can't be reached; what was accepted is in the database and is sent when Redis is back."""

    code = "queue_unavailable"
    status = 503


class ServiceUnavailable(HeadraceError):
    """The headrace API can't be reached; check base_url, and that `headrace up` (or `headrace api`) is running."""

    code = "service_unavailable"
    status = 503


class EngineError(HeadraceError):
    """The engine failed; the worker's log says where."""

    code = "engine_error"


class ModelLoadError(EngineError):
    """The model can't be loaded; give a local Hugging Face directory, or a hub id where the hub can be reached."""

    code = "model_load_error"


class KVCapacity(EngineError):
    """The prompt needs more KV blocks than the whole pool has; shorten it or give the engine a larger pool."""

    code = "kv_capacity"
    status = 422


class OutOfDeviceMemory(EngineError):
    """The device has no memory left for a step of this request alone; free what other processes hold, or give the pool less."""

    code = "out_of_device_memory"
    status = 503


class NumericalError(EngineError):
    """The model produced NaN logits for this prompt."""

    code = "numerical_error"


class RankLost(EngineError):
    """An engine process died; unfinished requests are computed again by the next one."""

    code = "rank_lost"
    status = 503


class PoisonPrompt(EngineError):
    """This prompt killed the engine twice, the last time alone in it; it is set aside."""

    code = "poison_prompt"


class RequestAborted(EngineError):
    """The request was cancelled before it finished."""

    code = "aborted"
    status = 499
