"""JSON over HTTP, asked carefully: deadlines, further attempts, limited answers, no redirects, tokens kept to one's own."""

import ipaddress
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards.attempts import NobodyThereError, Patience, TryAgainError, UnansweredError, insist
from async_rlhf.rewards.base import MAX_SHOWN, shown

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

PROBE_S = 10.0
"""Deadline of the look at an endpoint before a run begins."""
MAX_PROBE_BYTES = 1 << 20
"""Of its answer; one that describes a service is a few KB."""

SERVES_NOBODY = (429, 502, 503, 504)
"""Answers for which no request is to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where to ask, and how to say who asks."""

    key: str
    """The setting, for messages: `reward.parts.NAME.url`."""
    url: str
    token_env: str
    allow_plain_http: bool

    def check(self) -> None:
        """Raise ConfigError unless the address is one that may be asked."""
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError as error:
            raise ConfigError(f"{self.key} is no address: {error}; it looks like http://127.0.0.1:8000/score") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.key} must be an http:// or https:// address, got {self.url!r}")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{self.key} holds a user name or password; put a token into the environment and name it by token_env")
        if parts.scheme == "http" and not is_loopback(parts.hostname) and not self.allow_plain_http:
            raise ConfigError(
                f"{self.key} would send prompts, completions and the token unencrypted to {parts.hostname}; use https://, or set "
                "allow_plain_http=true where the network is trusted"
            )
        if self.token_env and not os.environ.get(self.token_env):
            raise ConfigError(
                f"{self.key}: the environment variable {self.token_env} (token_env) is not set; export it where the run starts, and on "
                "a cluster on every node"
            )

    @property
    def headers(self) -> dict[str, str]:
        """Who asks; the answer shall not be compressed, so that its size is what is read."""
        token = os.environ.get(self.token_env, "") if self.token_env else ""
        return {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})}


class JsonClient:
    """Asks one endpoint. Lives in one event loop."""

    def __init__(self, address: Address, settings: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: see Address.check.
        """
        address.check()
        self._address = address
        self._settings = settings
        self._patience = Patience()
        self._client: httpx.AsyncClient | None = None

    async def ask(self, body: Callable[[int], Mapping[str, Any]], read: Callable[[Any], T], url: str = "") -> T:
        """POST and read the answer, with further attempts.

        Args:
            body: of an attempt, counted from 0.
            read: takes what the answer's JSON says; raises RewardError, or TryAgainError where another attempt may help.
        Raises:
            RewardError: no usable answer. RewardLostError: the endpoint cannot be reached.
        """
        url = url or self._address.url

        async def attempt(number: int) -> T:
            content = await self._post(url, body(number))
            self._patience.answered()
            return read(self._parsed(content, url))

        try:
            return await insist(attempt, self._settings, f"POST {url}")
        except UnansweredError as error:
            raise self._patience.tried(error) from error

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, url: str, body: Mapping[str, Any]) -> bytes:
        import httpx

        if self._client is None:
            # One deadline over all of an attempt stands in `insist`. The environment's proxies are not for this machine.
            local = is_loopback(urlsplit(url).hostname or "")
            limits = httpx.Limits(max_connections=self._settings.concurrency)
            self._client = httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=not local, limits=limits)
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self._address.headers}
        try:
            async with self._client.stream("POST", url, content=content, headers=headers) as response:
                return await self._body(response, url)
        except httpx.ConnectError as error:
            raise NobodyThereError(f"cannot connect: {error}") from error
        except httpx.TransportError as error:
            raise TryAgainError(f"the connection broke: {type(error).__name__}: {error}") from error

    async def _body(self, response: "httpx.Response", url: str) -> bytes:
        if response.is_redirect:
            raise RewardError(
                f"POST {url} answered {response.status_code}, a redirect to {shown(response.headers.get('location', '?'))}, which is not "
                f"followed; set {self._address.key} to where it leads, if you trust that"
            )
        limit = int(self._settings.max_response_mib * (1 << 20))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RewardError(f"POST {url} answered compressed, which was not asked for; turn that off there")
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > limit:
                raise RewardError(
                    f"POST {url} answered more than {self._settings.max_response_mib:g} MiB (max_response_mib); the rest was not read"
                )
        if response.status_code in SERVES_NOBODY:
            raise NobodyThereError(f"HTTP {response.status_code}: {_text(content)}")
        if response.status_code >= 500:
            raise TryAgainError(f"HTTP {response.status_code}: {_text(content)}")
        if response.status_code != 200:
            raise RewardError(f"POST {url} answered HTTP {response.status_code}: {_text(content)}{_remedy(response.status_code)}")
        return bytes(content)

    def _parsed(self, content: bytes, url: str) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise RewardError(f"POST {url} must answer JSON, got {_text(content)}; is that the right address?") from None


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, by name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def probe(address: Address, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
    """One request before a run begins; returns the answer's JSON, or None where it has none.

    Raises:
        ConfigError: nobody answers, or says that this request can never be served.
    """
    import httpx

    address.check()
    local = is_loopback(urlsplit(url).hostname or "")
    try:
        with (
            httpx.Client(timeout=PROBE_S, follow_redirects=False, trust_env=not local) as client,
            client.stream(method, url, json=body, headers=address.headers) as response,
        ):
            content = _beginning(response)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(
            f"{address.key}: {url} does not answer ({type(error).__name__}: {error}); start the service first, or mend the address"
        ) from error
    if response.is_redirect or response.status_code in (401, 403, 404, 405):
        raise ConfigError(
            f"{address.key}: {method} {url} answered HTTP {response.status_code}: {_text(content)}{_remedy(response.status_code)}"
        )
    try:
        return json.loads(content) if response.status_code == 200 else None
    except (ValueError, RecursionError):
        return None


def _beginning(response: "httpx.Response") -> bytes:
    """What came of the answer within PROBE_S, MAX_PROBE_BYTES at most: a service that drips, or floods, holds up no start."""
    ends, content = time.monotonic() + PROBE_S, bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > MAX_PROBE_BYTES or time.monotonic() > ends:
            break
    return bytes(content[:MAX_PROBE_BYTES])


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "; token_env must name the environment variable that holds the right token"
    if status in (404, 405):
        return "; is that the right address?"
    return "; smaller batches may help (batch_size)" if status == 413 else ""


def _text(content: bytes | bytearray) -> str:
    return shown(bytes(content[: 4 * MAX_SHOWN]).decode("utf-8", "replace"))
