"""Questions to a model behind an OpenAI-compatible endpoint: retried, at a rate, and never for longer than a limit.

What goes wrong is of three kinds. A busy or broken server (408, 409, 425, 429, 5xx, time limits, connections, replies
that are no chat completion) is asked again, later each time (after ``Retry-After``, if the server says it). What is
wrong with this one question is an :class:`UnansweredError`. What is wrong with all of them (no such model, a key that
is refused) ends the run at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from eggroll import _environment
from eggroll._optional import require
from eggroll.errors import RewardError
from eggroll.llm.rewards.judge_text import SCHEMA

BUSY = frozenset({408, 409, 425, 429})
NO_USE = {
    401: f"it refuses the key: set {_environment.JUDGE_KEY} to one that it takes",
    403: f"it refuses the key or the model: set {_environment.JUDGE_KEY} to a key that may use it",
    404: "it has no such address or no such model: the URL ends in /v1 for most servers, and the model's name is "
    "the server's own",
    405: "its address takes no chat completions: the URL ends in /v1 for most servers",
}
"""Answers that every further question would get."""
MOST_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
_TOO_LONG = re.compile(r"context|too long|length|tokens", re.I)
MAX_TOKENS = 400
"""Of a judge's reply; a reasoning model's thoughts are not counted here by most servers."""


class UnansweredError(Exception):
    """There is no grade for one answer."""


class _LaterError(Exception):
    """Worth another try, ``seconds`` from now if the server has said so."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class JudgeClient:
    """Asks one model.

    Args:
        url: of the endpoint, with or without ``/chat/completions``.
        model: the server's name for it.
        rate: requests per minute at most, tries included; 0 is without a limit.
        timeout: seconds for one try.
        retries: further tries.

    Raises:
        RewardError: the URL is none, or has a password or key in it.
        MissingExtraError: httpx or tenacity is not installed.
    """

    def __init__(self, url: str, model: str, *, rate: float, timeout: float, retries: int) -> None:
        self.url = _checked(url)
        self.model, self.rate, self.timeout, self.retries = model, rate, timeout, retries
        require("httpx", extra="judge")
        require("tenacity", extra="judge")
        self.extras: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS, "response_format": SCHEMA}
        self._next = 0.0
        self._connections: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": None, "_next": 0.0}

    async def ask(self, messages: list[dict[str, str]]) -> str:
        """What the model answers.

        Raises:
            UnansweredError: nothing, after all tries; or this question is too much for it.
            RewardError: no question would be answered.
        """
        tenacity: Any = require("tenacity", extra="judge")
        backoff = tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S / 2)

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            seconds = getattr(error, "seconds", None)
            return backoff(state) if seconds is None else seconds

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.retries + 1), wait=wait, reraise=True,
            retry=tenacity.retry_if_exception_type(_LaterError),
        )  # fmt: skip
        try:
            return await retrying(self._try, messages)
        except _LaterError as error:
            raise UnansweredError(f"{error}, after {self.retries + 1} tries") from error

    async def _try(self, messages: list[dict[str, str]]) -> str:
        httpx: Any = require("httpx", extra="judge")
        while True:
            await self._turn()
            sent = dict(self.extras)
            try:
                async with asyncio.timeout(self.timeout):
                    status, headers, body = await self._post({"model": self.model, "messages": messages, **sent})
            except TimeoutError as error:
                raise _LaterError(f"no reply within {self.timeout:g} s") from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                raise _LaterError(f"{type(error).__name__}: {self._safe(str(error)) or 'no connection'}") from error
            if status == 200:
                return _content(body)
            said = self._safe(body.decode(errors="replace"))
            if status in BUSY or status >= 500:
                seconds = _retry_after(headers.get("retry-after"))
                if seconds is not None:
                    self._next = max(self._next, asyncio.get_running_loop().time() + seconds)
                raise _LaterError(f"status {status}{_said(said)}", seconds)
            if status in NO_USE or 300 <= status < 400:
                hint = NO_USE.get(status, f"it points to {headers.get('location', 'elsewhere')}, which is not followed")
                raise RewardError(
                    f"the judge {self.model!r} at {self.url} answers with status {status}{_said(said)}: {hint}"
                )
            if not self._adapted(sent, said):
                raise UnansweredError(f"status {status}{_said(said)}")

    def _adapted(self, sent: dict[str, Any], said: str) -> bool:
        """Whether a request that was refused can be sent again without what the server does not know."""
        named = next((name for name in ("response_format", "max_tokens", "temperature") if name in said), None)
        if named is None and "response_format" in sent and not _TOO_LONG.search(said):
            named = "response_format"  # what fewest servers know
        if named is None or named not in sent:
            return False
        if self.extras.pop(named, None) is not None and named == "max_tokens":
            self.extras["max_completion_tokens"] = 8 * MAX_TOKENS  # thoughts count there
        return True

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        key = _key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self._client().stream("POST", self.url, json=body, headers=headers) as response:
            found = b""
            async for part in response.aiter_bytes():
                found += part
                if len(found) > MOST_BYTES:
                    raise UnansweredError(f"a reply of more than {MOST_BYTES:,} bytes")
            return response.status_code, response.headers, found

    async def _turn(self) -> None:
        """Wait until the rate, and a server that has asked for patience, allow the next request."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + (60.0 / self.rate if self.rate else 0.0)
        if start > now:
            await asyncio.sleep(start - now)

    def _client(self) -> Any:
        """The connections of this process; its rewards share one event loop."""
        if self._connections is None or self._connections[0] != os.getpid():
            httpx: Any = require("httpx", extra="judge")
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._connections = os.getpid(), httpx.AsyncClient(timeout=self.timeout, limits=limits)
        return self._connections[1]

    @staticmethod
    def _safe(text: str) -> str:
        """A text for messages, without the key, whatever a server echoes."""
        key = _key()
        return " ".join((text.replace(key, "***") if key else text).split())[:2000]


def _key() -> str:
    """What is sent as a bearer token; empty without one.

    Raises:
        RewardError: no header can hold it.
    """
    key = _environment.value(_environment.JUDGE_KEY).strip()
    if not all("!" <= char <= "~" for char in key):
        raise RewardError(f"{_environment.JUDGE_KEY} has white space or other characters in it that no key has")
    return key


def _checked(url: str) -> str:
    """The address of chat completions.

    Raises:
        RewardError: it is none, or has a secret in it, which would be in the run's files.
    """
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018  (raises for what is no port)
    except ValueError as error:
        raise RewardError(f"judge_url (={url!r}) is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(
            f"judge_url (={url!r}) must be the http(s) address of an OpenAI-compatible server, such as "
            "http://localhost:8000/v1"
        )
    secret = [name for name, _ in parse_qsl(parts.query) if re.search(r"key|token|secret|password|sig", name, re.I)]
    if parts.username or parts.password or secret:
        raise RewardError(
            f"judge_url has {repr(secret[0]) if secret else 'a user or password'} in it, which would stand in the "
            f"run's files; leave it out and set {_environment.JUDGE_KEY}, which is sent as a bearer token"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def _content(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        _LaterError: it is none.
    """
    try:
        message = json.loads(body)["choices"][0]["message"]
        content = message["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _LaterError(f"a reply that is no chat completion{_said(body.decode(errors='replace'))}") from error
    if isinstance(content, list):  # in parts, as some servers send it
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise UnansweredError(f"a reply without text ({message.get('refusal') or 'content is missing'})"[:300])
    return content


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; at most a minute."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None


def _said(text: str) -> str:
    flat = " ".join(text.split())
    return f" ({flat[:200]})" if flat else ""
