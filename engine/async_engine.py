"""The object that `pipeline()` returns: prompts in every shape of the document, answers in order, streams, chats.

A thin face over `engine.frontend.Frontend`, which does the work on its own thread: calls may come from any thread, many at
once, and from inside a running event loop.
"""

from __future__ import annotations

import queue
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, repeat
from typing import Any, Literal, NamedTuple, Self, overload

from engine import async_calls
from engine.answers import Delta, piece_of
from engine.frontend import Frontend
from engine.perplexity import mean_cross_entropy
from engine.sessions import Key, RunningSessions, Session
from engine.supervisor import EngineEvent, Limits
from headrace.completion import Completion
from headrace.config import ChatTemplateConfig, EngineConfig, GenerationConfig
from headrace.errors import InvalidRequest
from headrace.response import Response

LEGACY_DEFAULTS: Mapping[str, Any] = {
    "request_output_len": 512,
    "top_k": 40,
    "top_p": 0.8,
    "temperature": 0.8,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
}
"""What a call without `gen_config` generates with; `request_output_len` is `max_new_tokens`."""

GenConfigs = GenerationConfig | Sequence[GenerationConfig] | None


class _Call(NamedTuple):
    """A call's prompts, sorted out."""

    shape: Literal["single", "batch", "lazy"]
    pairs: Iterator[tuple[Any, GenerationConfig]]
    """(prompt, config), drawn while the call runs."""


class AsyncEngine:
    """A loaded model. `close()` it, or use it in a `with` statement, to free its device; the end of the program does too."""

    def __init__(
        self,
        model_path: str,
        *,
        model_name: str | None = None,
        backend_config: EngineConfig | None = None,
        chat_template_config: ChatTemplateConfig | None = None,
        engine_command: Sequence[str] | None = None,
        limits: Limits | None = None,
        on_event: Callable[[EngineEvent], None] | None = None,
    ) -> None:
        """Start the engine and wait until it is ready; arguments and errors as for `headrace.pipeline` and `Frontend`."""
        self.frontend = Frontend(
            model_path,
            backend_config=backend_config,
            chat_template_config=chat_template_config,
            model_name=model_name,
            engine_command=engine_command,
            limits=limits,
            on_event=on_event,
        )
        # Also when the object is dropped without close(), as a notebook does that makes the next pipeline under the same name.
        self._finalizer = weakref.finalize(self, self.frontend.close)
        self._running = RunningSessions(self.frontend.abort)
        self._session_numbers = count(1)
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()

    def __call__(  # noqa: PLR0913  # the document's signature
        self,
        prompts: Any = None,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,  # noqa: FBT001, FBT002  # by position too, as in the document
        *,
        request_output_len: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        repetition_penalty: float | None = None,
        ignore_eos: bool | None = None,
    ) -> Response | list[Response] | Iterator[Response]:
        """Generate.

        One text or one conversation (a list of messages) gives a `Response`; a list of them gives a list of the same length and
        order; any other iterable is drawn from as the engine needs prompts, and gives an iterator of responses as they finish
        (`Response.index` says whose). A bad prompt is an error in its own place.

        Without `gen_config` the call samples with `LEGACY_DEFAULTS`, changed by the deprecated arguments; a `gen_config` (or a list,
        one for each prompt) stands alone. `do_preprocess=False` continues texts as they are, without a chat template.
        """
        given = {
            "request_output_len": request_output_len,
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "repetition_penalty": repetition_penalty,
            "ignore_eos": ignore_eos,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return self._generate(prompts, _merge_legacy(gen_config, given), do_preprocess=do_preprocess)

    def batch_infer(self, prompts: Any, gen_config: GenConfigs = None, do_preprocess: bool = True) -> Any:  # noqa: FBT001, FBT002
        """Do what calling does, but without `gen_config` greedily."""
        return self._generate(prompts, GenerationConfig() if gen_config is None else gen_config, do_preprocess=do_preprocess)

    def stream(
        self, prompts: Iterable[Any], gen_config: GenConfigs = None, *, do_preprocess: bool = True
    ) -> Iterator[Response]:
        """Give responses as they finish, drawing prompts from the iterable as the engine needs them."""
        call = _sort_out(prompts, GenerationConfig() if gen_config is None else gen_config)
        return self._responses(call.pairs, do_preprocess=do_preprocess)

    def stream_infer(
        self,
        prompts: Any,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[Response]:
        """Give each choice's text piece by piece, all prompts' pieces interleaved.

        `Response.index` and `.choice` say whose piece it is; a choice's last piece has a `finish_reason`.
        """
        call = _sort_out(prompts, GenerationConfig() if gen_config is None else gen_config)
        return self._deltas(call.pairs, do_preprocess=do_preprocess)

    def generate(
        self,
        prompt: Any,
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
        session_id: int | None = None,
    ) -> AsyncIterator[Response]:
        """Stream one prompt's choices in an event loop. Leaving the loop early aborts the request.

        `session_id`: a number of the caller's for `stop_session`. Raise `InvalidRequest` while another request runs under it.
        """
        config = _one(gen_config)

        def submit(finish: Callable[[Completion], None], on_delta: Callable[[Delta], None]) -> int:
            return self.frontend.submit(prompt, config, finish, do_preprocess=do_preprocess, on_delta=on_delta)

        return async_calls.stream(self._running, submit, session_id)

    async def async_batch_infer(self, prompts: Any, gen_config: GenConfigs = None, *, do_preprocess: bool = True) -> Any:
        """Do what `batch_infer` does without blocking the event loop. Prompts from an iterator give a list too, in their order.

        Cancelling it aborts what isn't answered.
        """
        call = _sort_out(prompts, GenerationConfig() if gen_config is None else gen_config)
        answers = await async_calls.infer(self.frontend, call.pairs, do_preprocess=do_preprocess)
        return answers[0] if call.shape == "single" else answers

    def session(self) -> Session:
        """Return a new conversation for `chat`."""
        session = Session(next(self._session_numbers))
        self._sessions[session.session_id] = session
        return session

    @overload
    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        stream_response: Literal[False] = False,
    ) -> Session: ...
    @overload
    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        stream_response: Literal[True],
    ) -> Iterator[Response]: ...
    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        stream_response: bool = False,
    ) -> Session | Iterator[Response]:
        """Take one turn in a conversation (None: a new one) and return it; `session.response` is the answer.

        With `stream_response` the answer comes piece by piece; the turn is in the history when the last piece was read.
        Raise `InvalidRequest` while another turn of the session runs.
        """
        if not isinstance(prompt, str):
            message = f"chat takes the next turn's text, not {type(prompt).__name__}; call the object itself for conversations"
            raise InvalidRequest(message, param="prompt")
        if not isinstance(session, Session | None):
            message = f"session is what `session()` or an earlier `chat` returned, not {type(session).__name__}"
            raise InvalidRequest(message, param="session")
        session = session or self.session()
        turn = self._turn(session, prompt, _one(gen_config), is_streamed=stream_response)
        if stream_response:
            return turn
        for _ in turn:
            pass
        return session

    def _turn(self, session: Session, prompt: str, config: GenerationConfig, *, is_streamed: bool) -> Iterator[Response]:
        news: queue.SimpleQueue[Delta | Completion] = queue.SimpleQueue()
        on_delta = news.put if is_streamed else None

        def submit() -> int:
            # Once the session is this turn's: another thread's turn may just have been kept.
            return self.frontend.submit(session.messages(prompt), config, news.put, on_delta=on_delta)

        ends: list[Response] = []
        with self._running.run(("chat", session.session_id), submit) as run:
            while isinstance(piece := news.get(), Delta):
                own = replace(piece_of(piece), session_id=session.session_id)
                # A reader may leave at a `finish_reason`: the turn is in the history before it sees one.
                if own.finish_reason is not None:
                    ends.append(own)
                else:
                    yield own
            response = replace(Response.of(piece), session_id=session.session_id)
            if not run.is_stopped or response.error_code is not None:
                session.keep(prompt, response)  # of one that was stopped, no text: another turn may have been taken since
        yield from ends
        if is_streamed and response.error_code is not None:
            yield response

    def stop_session(self, session_id: int | Session) -> None:
        """End what runs in a session of `chat`, with the error 'aborted'; under a bare number that of `generate`, too. From any thread.

        Its blocks are free with the engine's next step. Nothing happens where nothing runs. The prompts of a call are no sessions.
        """
        self._running.stop(*_keys(session_id))

    def end_session(self, session_id: int | Session) -> None:
        """Stop a session and forget its conversation."""
        number = session_id.session_id if isinstance(session_id, Session) else session_id
        self._running.stop(*_keys(session_id))
        session = self._sessions.get(number)
        if session is not None:
            session.close()

    def get_ppl(self, input_ids: Any) -> list[float]:
        """Return each sequence's mean cross-entropy in nats (not its exponential) over its tokens but the first.

        `input_ids`: one list of at least 2 token ids, or a list of them. Raise `InvalidRequest` for anything else, and for ids
        outside the vocabulary or more of them than the session holds.
        """
        return mean_cross_entropy(self.frontend, input_ids)

    def report(self) -> dict[str, Any]:
        """Return what runs here and how: options, memory, chat template, order of sampling, counters."""
        return self.frontend.report()

    def close(self) -> None:
        """Stop the engine and free its device; calls that run get 'aborted'. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, prompts: Any, gen_config: GenerationConfig | Sequence[GenerationConfig], *, do_preprocess: bool) -> Any:
        call = _sort_out(prompts, gen_config)
        responses = self._responses(call.pairs, do_preprocess=do_preprocess)
        if call.shape == "lazy":
            return responses
        if call.shape == "single":
            return next(responses)
        return sorted(responses, key=lambda response: response.index)

    def _responses(self, pairs: Iterator[tuple[Any, GenerationConfig]], *, do_preprocess: bool) -> Iterator[Response]:
        """Submit as far ahead as keeps the engine busy, and no further: a million prompts need no million token lists."""
        done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        handles: dict[int, int] = {}
        try:
            for index, (prompt, config) in enumerate(pairs):
                handles[index] = self.frontend.submit(prompt, config, done.put, index=index, do_preprocess=do_preprocess)
                while len(handles) >= 2 * self.frontend.window or (handles and not done.empty()):
                    completion = done.get()
                    del handles[completion.index]
                    yield Response.of(completion)
            while handles:
                completion = done.get()
                del handles[completion.index]
                yield Response.of(completion)
        finally:  # the caller left early (an error, Ctrl-C, a dropped iterator)
            for handle in handles.values():
                self.frontend.abort(handle)

    def _deltas(self, pairs: Iterator[tuple[Any, GenerationConfig]], *, do_preprocess: bool) -> Iterator[Response]:
        news: queue.SimpleQueue[Delta | Completion] = queue.SimpleQueue()
        handles: dict[int, int] = {}
        waiting = enumerate(pairs)
        try:
            while True:
                while len(handles) < self.frontend.window and (following := next(waiting, None)) is not None:
                    index, (prompt, config) = following
                    handles[index] = self.frontend.submit(
                        prompt, config, news.put, index=index, do_preprocess=do_preprocess, on_delta=news.put
                    )
                if not handles:
                    return
                piece = news.get()
                if isinstance(piece, Delta):
                    yield piece_of(piece)
                    continue
                del handles[piece.index]
                if piece.error is not None:
                    yield Response.of(piece)
        finally:
            for handle in handles.values():
                self.frontend.abort(handle)


def _keys(session: int | Session) -> tuple[Key, ...]:
    """Give what the caller can mean: a number may be one of `chat`'s, or of its own for `generate`."""
    return (("chat", session.session_id),) if isinstance(session, Session) else (("chat", session), ("generate", session))


def _sort_out(prompts: Any, gen_config: GenerationConfig | Sequence[GenerationConfig]) -> _Call:
    """Tell the shapes of prompts apart, and give each prompt its config; raise `InvalidRequest` for no shape of the document."""
    if isinstance(prompts, str) or (isinstance(prompts, list | tuple) and prompts and isinstance(prompts[0], Mapping)):
        return _Call("single", _pair([prompts], gen_config))
    if isinstance(prompts, list | tuple):
        return _Call("batch", _pair(prompts, gen_config))
    if isinstance(prompts, Iterable) and not isinstance(prompts, bytes | bytearray | Mapping):
        if not isinstance(gen_config, GenerationConfig):
            raise InvalidRequest(
                "prompts from an iterator share one GenerationConfig; give a list of prompts for a list of them",
                param="gen_config",
            )
        return _Call("lazy", zip(prompts, repeat(gen_config)))
    raise InvalidRequest(
        f"prompts is a text, a list of messages, a list of either or an iterator of either, not {type(prompts).__name__}",
        param="prompts",
    )


def _pair(
    prompts: Sequence[Any], gen_config: GenerationConfig | Sequence[GenerationConfig]
) -> Iterator[tuple[Any, GenerationConfig]]:
    if isinstance(gen_config, GenerationConfig):
        return zip(prompts, repeat(gen_config))
    if not isinstance(gen_config, list | tuple) or not all(isinstance(config, GenerationConfig) for config in gen_config):
        raise InvalidRequest("gen_config is a GenerationConfig or a list of them", param="gen_config")
    if len(gen_config) != len(prompts):
        raise InvalidRequest(f"{len(gen_config)} gen_configs for {len(prompts)} prompts; give one for each", param="gen_config")
    return zip(prompts, gen_config, strict=True)


def _one(gen_config: GenerationConfig | None) -> GenerationConfig:
    if not isinstance(gen_config, GenerationConfig | None):
        raise InvalidRequest(f"gen_config is a GenerationConfig, not {type(gen_config).__name__}", param="gen_config")
    return gen_config or GenerationConfig()


def _merge_legacy(gen_config: GenConfigs, given: Mapping[str, Any]) -> GenerationConfig | Sequence[GenerationConfig]:
    """Settle what a call generates with; warn about deprecated arguments, and about those that `gen_config` overrules."""
    for name in given:
        field_name = "max_new_tokens" if name == "request_output_len" else name
        warnings.warn(f"{name} is deprecated; use GenerationConfig({field_name}=…)", DeprecationWarning, stacklevel=3)
    if gen_config is not None:
        if given:
            warnings.warn(f"gen_config is given, so {', '.join(given)} is ignored", UserWarning, stacklevel=3)
        return gen_config
    values = {**LEGACY_DEFAULTS, **given}
    try:
        return GenerationConfig(max_new_tokens=values.pop("request_output_len"), **values)
    except InvalidRequest as error:
        if error.param != "max_new_tokens":
            raise
        message = error.message.replace("max_new_tokens", "request_output_len", 1)
        raise InvalidRequest(message, param="request_output_len") from None
