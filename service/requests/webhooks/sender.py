"""One attempt to deliver a webhook: resolve the host, check the addresses, connect to one of them, and send.

The request goes to an address that was checked, not to the name, so that a name whose address changes between
check and connection (DNS rebinding) gains nothing. Certificates are verified for the name. Redirects are not
followed, proxies and .netrc of the environment are not used, and the body of the response is never read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpx

from service.requests.job_schemas import WebhookError
from service.requests.webhooks.addresses import Network, may_connect
from service.requests.webhooks.targets import port_of

ATTEMPT_SECONDS = 15.0  # from resolving the host to the headers of the response
CONNECT_SECONDS = 3.0  # for each address
MAX_ADDRESSES = 4  # of one host, that an attempt tries to connect to
MAX_SENDS = 8  # attempts at the same time, which is also the number of threads that resolve names
SIGNATURE = "X-Signature"
REPEATED_STATUSES = (408, 425, 429)  # and 5xx: the receiver may take the same body later

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended. status: of the response, if there was one. error: None if it was delivered."""

    status: int | None = None
    error: WebhookError | None = None
    final: bool = True  # a later attempt would not end otherwise


class AddressRefusedError(Exception):
    """An address of the host may not be connected to."""


class Sender:
    """Sends signed bodies.

    secrets: each signs; networks: allowed besides the internet. resolve: from (host, port) to its addresses.
    """

    def __init__(
        self, secrets: Sequence[bytes], networks: Sequence[Network] = (), resolve: Resolve | None = None
    ) -> None:
        self.secrets = secrets
        self.networks = networks
        self.resolve = resolve or self._look_up
        self._threads = ThreadPoolExecutor(MAX_SENDS, "webhook-dns")  # a slow DNS server blocks only these
        self._slots = asyncio.Semaphore(MAX_SENDS)
        self._tls = httpx.create_ssl_context()  # certifi's certificates, or those of SSL_CERT_FILE

    async def send(self, url: httpx.URL, body: Callable[[], bytes]) -> Attempt:
        """Send a body, made and signed when it is this attempt's turn."""
        async with self._slots:
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    return judge(await self._send(url, body()))
            except AddressRefusedError:
                return Attempt(error="address_refused")
            except (TimeoutError, httpx.TimeoutException):
                return Attempt(error="timeout", final=False)
            except socket.gaierror:
                return Attempt(error="unresolved", final=False)
            except (OSError, httpx.HTTPError):
                return Attempt(error="connection", final=False)

    async def _send(self, url: httpx.URL, body: bytes) -> int:
        """The status of the response. Addresses after the first are for hosts that are partly down."""
        addresses = list(dict.fromkeys(await self.resolve(url.host, port_of(url))))
        if not addresses or not all(may_connect(address, self.networks) for address in addresses):
            raise AddressRefusedError
        *others, last = addresses[:MAX_ADDRESSES]
        for address in others:
            try:
                return await self._post(url, address, body)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._post(url, last, body)

    async def _post(self, url: httpx.URL, address: str, body: bytes) -> int:
        headers = {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "latent-diffusion-service",
            SIGNATURE: self.sign(body),
        }
        timeout = httpx.Timeout(ATTEMPT_SECONDS, connect=CONNECT_SECONDS)
        async with (
            httpx.AsyncClient(
                verify=self._tls, trust_env=False, follow_redirects=False, timeout=timeout
            ) as client,
            client.stream(
                "POST",
                url.copy_with(host=address),
                content=body,
                headers=headers,
                extensions={"sni_hostname": url.host},
            ) as response,
        ):
            return response.status_code

    def sign(self, body: bytes) -> str:
        """HMAC-SHA256 of the body in hexadecimal, one for each secret, separated by commas."""
        return ",".join(hmac.new(secret, body, hashlib.sha256).hexdigest() for secret in self.secrets)

    async def _look_up(self, host: str, port: int) -> list[str]:
        """The addresses of a host, in the order of the system's resolver. Raises OSError."""
        loop = asyncio.get_running_loop()
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await loop.run_in_executor(self._threads, look_up)
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def judge(status: int) -> Attempt:
    """The outcome of an attempt by the status of the response."""
    if 200 <= status < 300:
        return Attempt(status)
    if 300 <= status < 400:
        return Attempt(status, "redirect")
    return Attempt(status, "status", final=status < 500 and status not in REPEATED_STATUSES)
