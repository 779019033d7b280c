"""The Python door to a running headrace: submit, look, wait, read, cancel, retry, delete. Synchronous, over HTTP only.

Every call may be repeated by the client itself without doing anything twice: a submission carries an idempotency key, a stream of
results goes on after the last index it gave. Errors are the classes of `headrace.errors`, as if the server's code ran here.
Knows no SQL, no Redis and no engine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import httpx

from headrace.batch import ROWS, Batch, BatchStatus
from headrace.completion import Completion
from headrace.config import GenerationConfig, Prompt
from headrace.errors import Conflict, EngineError, HeadraceError, InvalidRequest, ServiceUnavailable
from headrace.schemas import read_batch, read_completion

log = logging.getLogger(__name__)

_RETRIED: Final = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE_S: Final = 10.0
_FILE_LIFE_S: Final = 86_400
_LONGEST_HINT_S: Final = 60.0
"""A Retry-After beyond this isn't waited for: the caller gets the error and decides."""


class Client:
    """One server. Thread-safe; use it as a context manager or call `close()`.

    Every method raises the exception that the server's problem names, and `ServiceUnavailable` when no server answers
    after `max_retries` repetitions.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url`: with or without `/v1`; `timeout`: seconds for one answer; `transport`: another way than a socket."""
        headers = {b"user-agent": b"headrace-client"}
        if api_key:
            if not api_key.isprintable():
                raise InvalidRequest("api_key has a line break or another control character in it", param="api_key")
            headers[b"authorization"] = f"Bearer {api_key}".encode()
        root = base_url.rstrip("/").removesuffix("/v1")
        limits = httpx.Timeout(timeout, connect=min(timeout, 5.0))
        try:
            self._http = httpx.Client(base_url=root, headers=headers, timeout=limits, transport=transport)
        except httpx.InvalidURL as error:
            raise InvalidRequest(
                f"base_url={base_url!r} is no URL such as http://127.0.0.1:8000: {error}", param="base_url"
            ) from None
        if self._http.base_url.scheme not in ("http", "https"):
            self._http.close()
            raise InvalidRequest(f"base_url={base_url!r} must begin with http:// or https://", param="base_url")
        self._max_retries = max_retries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
        self,
        prompts: Sequence[Prompt],
        gen_config: GenerationConfig | None = None,
        *,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        completion_window: str = "24h",
        idempotency_key: str | None = None,
    ) -> Batch:
        """Submit prompts; when this returns they are stored and will be answered.

        `model`: default the server's first; `idempotency_key`: default a new one, so that only the repetitions of this call
        share it. Give your own to make a whole program repeatable.
        """
        body = {
            "prompts": list(prompts),
            "gen_config": (gen_config or GenerationConfig()).to_dict(),
            "model": model,
            "metadata": dict(metadata) if metadata else None,
            "priority": priority,
            "completion_window": completion_window,
        }
        headers = {"content-type": "application/json", "idempotency-key": _key(idempotency_key)}
        return read_batch(self._json("POST", "/v1/batches", content=_encode(body), headers=headers))

    def submit_file(  # noqa: PLR0913  # one keyword for each thing that a caller may say
        self,
        path: Path,
        gen_config: GenerationConfig | None = None,
        *,
        endpoint: str = ROWS,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        completion_window: str = "24h",
        idempotency_key: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Batch:
        """Upload a JSONL file and submit it as one batch, in constant memory on both sides.

        `endpoint`: one of OpenAI's, for lines of {custom_id, method, url, body}, each with sampling parameters of its own; else lines are
        texts, {prompt} or {messages}, and `gen_config` is for all of them. `on_progress` gets the bytes sent so far. The server reads the
        file while the batch is `validating`, and forgets it after a day.
        """
        body = {
            "input_file_id": self.upload(path, on_progress),
            "endpoint": endpoint,
            "gen_config": None if gen_config is None else gen_config.to_dict(),
            "model": model,
            "metadata": dict(metadata) if metadata else None,
            "priority": priority,
            "completion_window": completion_window,
        }
        headers = {"content-type": "application/json", "idempotency-key": _key(idempotency_key)}
        return read_batch(self._json("POST", "/v1/batches", content=_encode(body), headers=headers))

    def upload(self, path: Path, on_progress: Callable[[int], None] | None = None) -> str:
        """Upload a file and return its id. It is read as it is sent; an attempt that fails is begun again."""
        form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": str(_FILE_LIFE_S)}
        with path.open("rb") as file:
            source = _Told(file, on_progress)
            reply = self._json("POST", "/v1/files", data=form, files={"file": (path.name, source, "application/jsonl")})
        return str(reply["id"])

    def file_content(self, file_id: str) -> Iterator[str]:
        """Yield the lines of a file, such as a batch's `output_file_id`, in constant memory. Raises `NotFound`."""
        try:
            with self._http.stream("GET", f"/v1/files/{file_id}/content") as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                yield from (line.decode("utf-8", "replace").removesuffix("\r") for line in _lines(response))
        except httpx.TransportError as error:
            raise _unreachable(error) from error

    def get(self, batch_id: str) -> Batch:
        """Return the batch as it stands now. Raises `NotFound`."""
        return read_batch(self._json("GET", f"/v1/batches/{batch_id}"))

    def wait(self, batch_id: str, on_progress: Callable[[Batch], None] | None = None, *, timeout: float | None = None) -> Batch:
        """Return the batch when it is over, whatever its end; call `on_progress` with each snapshot that differs from the last.

        Raises `TimeoutError` after `timeout` seconds (the batch goes on).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        etag, batch = "", None
        while True:
            response = self._send("GET", f"/v1/batches/{batch_id}", headers={"if-none-match": etag})
            if response.status_code != httpx.codes.NOT_MODIFIED:
                etag, batch = response.headers.get("etag", ""), read_batch(response.json())
                if on_progress is not None:
                    on_progress(batch)
            assert batch is not None, "the first answer has no tag to match"
            if batch.status.is_terminal:
                return batch
            self._pause(_hint_s(response) or 1.0, deadline, f"{batch_id} is still {batch.status} after {timeout} s")

    def results(self, batch_id: str, *, after: int = -1, follow: bool = False) -> Iterator[Completion]:
        """Yield completions in input order from the one after index `after`, in constant memory.

        A connection that breaks is taken up again after the last index. While the batch runs this ends before the first prompt
        that isn't done yet; with `follow` it waits there, until every prompt of the batch was yielded.
        """
        failures, total = 0, None
        while True:
            try:
                with self._stream(f"/v1/batches/{batch_id}/results.jsonl", after) as response:
                    total, hint_s = int(response.headers["headrace-total"]), _hint_s(response)
                    for line in _lines(response):
                        completion = read_completion(line)
                        after, failures = completion.index, 0
                        yield completion
                # Without a hint the batch is over and nothing will be added. A total of 0: it is still being stored.
                if not follow or hint_s is None or 0 < total <= after + 1:
                    return
            except httpx.TransportError as error:
                if total and after + 1 >= total:
                    return
                failures += 1
                if failures > self._max_retries:
                    raise _unreachable(error) from error
                log.info(
                    "the stream of results broke; it goes on after index %d",
                    after,
                    extra={"event": "results_resumed", "batch_id": batch_id, "after": after},
                )
                hint_s = _backoff_s(failures)
            time.sleep(hint_s)

    def cancel(self, batch_id: str) -> Batch:
        """Stop the batch; what is answered stays. Raises `Conflict` when it came to another end already."""
        try:
            return read_batch(self._json("POST", f"/v1/batches/{batch_id}/cancel"))
        except Conflict:
            # The reply to an earlier attempt may have been lost: what was wanted is the case.
            if (batch := self.get(batch_id)).status is BatchStatus.CANCELLED:
                return batch
            raise

    def retry(self, batch_id: str, *, idempotency_key: str | None = None) -> Batch:
        """Submit the failed prompts of a batch that is over as a new batch, in their order; return that one.

        Its `metadata['retry_of']` names the old one, which stays as it is (with 16 pairs of its own there is no room for it). Raises `Conflict` when nothing of it can be retried.
        """
        headers = {"idempotency-key": _key(idempotency_key)}
        return read_batch(self._json("POST", f"/v1/batches/{batch_id}/retry", headers=headers))

    def delete(self, batch_id: str) -> None:
        """Delete a batch that is over, with its results. Raises `NotFound`, and `Conflict` while it is not over."""
        self._send("DELETE", f"/v1/batches/{batch_id}", is_removal=True)

    def list(self, *, status: BatchStatus | str | None = None, page_size: int = 50) -> Iterator[Batch]:
        """Yield the batches, newest first, fetching pages as they are needed."""
        params: dict[str, Any] = {"limit": page_size} | ({"status": str(status)} if status else {})
        while True:
            page = self._json("GET", "/v1/batches", params=params)
            yield from map(read_batch, page["data"])
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]

    def models(self) -> tuple[str, ...]:
        """Return the models that the server accepts."""
        return tuple(model["id"] for model in self._json("GET", "/v1/models")["data"])

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._send(method, path, **request).json()

    def _send(self, method: str, path: str, *, is_removal: bool = False, **request: Any) -> httpx.Response:
        """Send until there is an answer that a repetition would not change. Raises what its problem names.

        `is_removal`: where the reply to an earlier attempt was lost, 'not found' says that what was wanted is the case.
        """
        for failures in range(1, self._max_retries + 2):
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                if failures > self._max_retries:
                    raise _unreachable(error) from error
                time.sleep(_backoff_s(failures))
                continue
            if not _is_worth_repeating(response) or failures > self._max_retries:
                break
            time.sleep(_hint_s(response) or _backoff_s(failures))
        is_done = is_removal and failures > 1 and response.status_code == httpx.codes.NOT_FOUND
        if response.is_error and not is_done:
            raise error_of(response)
        return response

    @contextlib.contextmanager
    def _stream(self, path: str, after: int) -> Iterator[httpx.Response]:
        with self._http.stream("GET", path, params={"after": after}) as response:
            if _is_worth_repeating(response):
                raise httpx.RemoteProtocolError(f"status {response.status_code}")
            if response.is_error:
                response.read()
                raise error_of(response)
            yield response

    def _pause(self, seconds: float, deadline: float | None, message: str) -> None:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(message)
            seconds = min(seconds, left)
        time.sleep(seconds)


class _Told:
    """A file that tells how far it was read."""

    def __init__(self, file: BinaryIO, on_progress: Callable[[int], None] | None) -> None:
        self._file = file
        self._on_progress = on_progress or (lambda _: None)

    def read(self, count: int = -1) -> bytes:
        piece = self._file.read(count)
        self._on_progress(self._file.tell())
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield the lines of a reply as they arrive, one in memory; not httpx's own, which end at U+2028 and U+0085 inside a text, too."""
    pending = bytearray()
    for piece in response.iter_bytes():
        pending += piece
        if b"\n" in piece:
            *lines, pending = pending.split(b"\n")
            yield from map(bytes, lines)
    if pending:
        yield bytes(pending)


def error_of(response: httpx.Response) -> HeadraceError:
    """Return the exception that a problem response names; the nearest class by status for one of a newer server."""
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    kinds = _kinds()
    kind = kinds.get(str(problem.get("code"))) or next(
        (found for found in kinds.values() if found.status == response.status_code and not issubclass(found, EngineError)),
        HeadraceError,
    )
    message = problem.get("detail") or f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
    request_id = response.headers.get("x-request-id")
    if response.is_server_error and request_id:
        message += f" (request id {request_id}; the server's log has more)"
    return kind(message, param=problem.get("param"), index=problem.get("index"))


def _kinds() -> dict[str, type[HeadraceError]]:
    """Return every class of the exception tree by its code, general classes first."""
    kinds: dict[str, type[HeadraceError]] = {}
    level: list[type[HeadraceError]] = [HeadraceError]
    while level:
        for kind in level:
            kinds.setdefault(kind.code, kind)
        level = [below for kind in level for below in kind.__subclasses__()]
    return kinds


def _key(given: str | None) -> str:
    if given and not (given.isascii() and given.isprintable()):
        raise InvalidRequest("idempotency_key must be printable ASCII characters", param="idempotency_key")
    return given or uuid.uuid4().hex


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps({key: value for key, value in body.items() if value is not None}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        for index, prompt in enumerate(body["prompts"]):
            with contextlib.suppress(UnicodeEncodeError):
                json.dumps(prompt, ensure_ascii=False).encode()
                continue
            raise InvalidRequest(
                f"prompts[{index}] has half of a surrogate pair, which no encoding carries; decode it with errors='replace'",
                param="prompts",
                index=index,
            ) from None
        raise


def _is_worth_repeating(response: httpx.Response) -> bool:
    wish = response.headers.get("x-should-retry")
    if wish in ("true", "false"):
        return bool(wish == "true")
    return response.status_code in _RETRIED and (_hint_s(response) or 0) <= _LONGEST_HINT_S


def _hint_s(response: httpx.Response) -> float | None:
    """Return what Retry-After says, in seconds; a date counts as nothing."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _backoff_s(failures: int) -> float:
    return float(min(_LONGEST_PAUSE_S, 0.2 * 2**failures) * random.uniform(0.7, 1.0))  # noqa: S311  # jitter


def _unreachable(error: httpx.TransportError) -> ServiceUnavailable:
    with contextlib.suppress(RuntimeError):
        return ServiceUnavailable(f"{ServiceUnavailable.__doc__} ({error.request.url}: {error})")
    return ServiceUnavailable(f"{ServiceUnavailable.__doc__} ({error})")
