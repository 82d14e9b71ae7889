"""How the Python client's calls travel: over HTTP or to the controller's actor, blocking or awaited."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx

from configs.errors import ConfigError, InvalidField, NotOffered, ServiceError
from tidegate.answers import Json, error_of, is_answer
from tidegate.calls import Ask, Call, Streamed
from tidegate.faults import NoAnswer, StreamCut, Unreachable

T = TypeVar("T")

_CONNECT_S = 10.0
#: two events of one stream; a rank that is silent for longer is given up
_BETWEEN_EVENTS_S = 120.0


class HttpTransport:
    """Calls over HTTP. Safe to use from several threads."""

    def __init__(self, url: str, key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url
        try:
            # trust_env: a proxy of the environment must not see admin keys meant for this address
            self._http = httpx.Client(base_url=url, headers=_headers(key), trust_env=False, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"{url!r} is no address: {error}") from None

    def run(self, call: Call[T]) -> T:
        return call.read(*(self._one(ask, call.timeout_s) for ask in call.asks))

    def events(self, call: Streamed[T]) -> Generator[T, None, None]:
        """Each event as it comes. Closing the iterator hangs up, which ends the request on the server."""
        timeout = httpx.Timeout(_BETWEEN_EVENTS_S, connect=_CONNECT_S)
        try:
            with self._http.stream(call.ask.method, call.ask.path, **_body(call.ask), timeout=timeout) as response:
                if response.status_code != 200:
                    response.read()
                    _answer(self._url, call.ask, response)
                reader = EventReader()
                for line in response.iter_lines():
                    shown = _shown(call, reader.read(line))
                    if shown is not None:
                        yield shown
                reader.end()
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None

    def save(self, ask: Ask, file: Path) -> None:
        """Write the answer's bytes to `file`, which appears when they are all there."""
        try:
            with self._http.stream(ask.method, ask.path, timeout=_BETWEEN_EVENTS_S) as response:
                if response.status_code != 200:
                    response.read()
                    _answer(self._url, ask, response)
                with _appearing(file) as sink:
                    for chunk in response.iter_raw():
                        sink.write(chunk)
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None

    def close(self) -> None:
        self._http.close()

    def _one(self, ask: Ask, timeout_s: float) -> Json:
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        try:
            response = self._http.request(ask.method, ask.path, **_body(ask), timeout=timeout)
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None
        return _answer(self._url, ask, response)


class AsyncHttpTransport:
    """Calls over HTTP, for one event loop."""

    def __init__(self, url: str, key: str | None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = url
        try:
            self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), trust_env=False, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"{url!r} is no address: {error}") from None

    async def run(self, call: Call[T]) -> T:
        return call.read(*[await self._one(ask, call.timeout_s) for ask in call.asks])

    async def events(self, call: Streamed[T]) -> AsyncGenerator[T, None]:
        timeout = httpx.Timeout(_BETWEEN_EVENTS_S, connect=_CONNECT_S)
        ask = call.ask
        try:
            async with self._http.stream(ask.method, ask.path, **_body(ask), timeout=timeout) as response:
                if response.status_code != 200:
                    await response.aread()
                    _answer(self._url, ask, response)
                reader = EventReader()
                async for line in response.aiter_lines():
                    shown = _shown(call, reader.read(line))
                    if shown is not None:
                        yield shown
                reader.end()
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None

    async def save(self, ask: Ask, file: Path) -> None:
        try:
            async with self._http.stream(ask.method, ask.path, timeout=_BETWEEN_EVENTS_S) as response:
                if response.status_code != 200:
                    await response.aread()
                    _answer(self._url, ask, response)
                with _appearing(file) as sink:
                    async for chunk in response.aiter_raw():
                        sink.write(chunk)
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def _one(self, ask: Ask, timeout_s: float) -> Json:
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        try:
            response = await self._http.request(ask.method, ask.path, **_body(ask), timeout=timeout)
        except httpx.HTTPError as error:
            raise _unreachable(self._url, error) from None
        return _answer(self._url, ask, response)


class ActorTransport:
    """Control calls straight to the controller's actor, from a Ray job or a driver."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def run(self, call: Call[T]) -> T:
        # Ray comes with it: a second that callers over HTTP need not wait
        from actors.ray_errors import outcome_now

        return _read(call, outcome_now(_remote(self._handle, call), call.timeout_s))

    def events(self, call: Streamed[T]) -> Generator[T, None, None]:
        raise _only_over_http(call.ask)

    def save(self, ask: Ask, file: Path) -> None:
        raise _only_over_http(ask)

    def close(self) -> None:
        """Nothing to close: the handle is the caller's."""


class AsyncActorTransport:
    """The same for an event loop."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def run(self, call: Call[T]) -> T:
        from actors.ray_errors import outcome_within

        pending: Awaitable[Any] = _remote(self._handle, call)
        return _read(call, await outcome_within(pending, call.timeout_s))

    def events(self, call: Streamed[T]) -> AsyncGenerator[T, None]:
        raise _only_over_http(call.ask)

    async def save(self, ask: Ask, file: Path) -> None:
        raise _only_over_http(ask)

    async def close(self) -> None:
        """Nothing to close: the handle is the caller's."""


class EventReader:
    """Reads the lines of one event stream; knows whether it was whole."""

    def __init__(self) -> None:
        self._is_done = False

    def read(self, line: str) -> Json | None:
        """The JSON object of an event; None for an empty line and for the end. Raises what an error event tells."""
        text = line.removeprefix("data:").strip()
        if not text:
            return None
        if text == "[DONE]":
            self._is_done = True
            return None
        try:
            content = json.loads(text)
        except ValueError:
            raise StreamCut("the stream broke off in the middle of an event") from None
        told = content.get("error")
        if told is not None:
            code = told.get("code") if isinstance(told, dict) else None
            raise error_of(content, code if isinstance(code, int) else 500)
        return content

    def end(self) -> None:
        """Raises StreamCut unless the server said that this is the end."""
        if not self._is_done:
            raise StreamCut("the stream ended before its answer did")


@contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes its name when the block ends well, and is removed otherwise."""
    unfinished = file.with_name(f"{file.name}.part")
    try:
        with open(unfinished, "wb") as sink:
            yield sink
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def _body(ask: Ask) -> dict[str, Any]:
    if ask.body is None:
        return {}
    try:
        content = json.dumps(ask.body, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidField(f"the arguments are no JSON: {error}", "body") from None
    return {"content": content, "headers": {"content-type": "application/json"}}


def _shown(call: Streamed[T], event: Json | None) -> T | None:
    return None if event is None else call.read(event)


def _unreachable(url: str, error: httpx.HTTPError) -> Unreachable:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
        return Unreachable(f"{url} cannot be reached: {error}")
    if isinstance(error, httpx.TimeoutException):
        return NoAnswer(f"{url} did not answer in time")
    return NoAnswer(f"{url} broke the connection: {error}")


def _answer(url: str, ask: Ask, response: httpx.Response) -> Json:
    """The answer's object. Raises what a refusal tells, and Unreachable for what no Tidegate says."""
    try:
        content = response.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Unreachable(f"{url}{ask.path} answered {response.status_code} and no JSON; is it Tidegate?")
    if is_answer(content, response.status_code, ask.answers_with):
        return content
    raise error_of(content, response.status_code, response.headers.get("retry-after", ""))


def _remote(handle: Any, call: Call[Any]) -> Any:
    if call.method is None:
        raise _only_over_http(call.asks[0])
    name, arguments = call.method
    method = getattr(handle, name, None)
    if method is None:
        raise ConfigError('this actor is no controller; take ray.get_actor("controller", namespace="tidegate")')
    return method.remote(**arguments)


def _read(call: Call[T], outcome: Any) -> T:
    """The controller's answer, as its HTTP twin would be read."""
    # the caller imported it already
    from actors.ray_errors import CallFailed

    if isinstance(outcome, CallFailed):
        kinds: dict[str, type[ServiceError]] = {"error": ServiceError, "died": Unreachable}
        raise kinds.get(outcome.kind, NoAnswer)(f"the controller does not answer: {outcome.message}")
    answer = outcome.value
    code = answer.get("http_status") or (200 if answer.get("success") is True else 503)
    if is_answer(answer, code, call.asks[0].answers_with):
        return call.read(answer)
    raise error_of(answer, code)


def _only_over_http(ask: Ask) -> NotOffered:
    return NotOffered(f"the controller's actor has no {ask.path}; make the client with the server's URL")
