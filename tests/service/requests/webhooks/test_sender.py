"""Single attempts to deliver a webhook, to real servers on this machine, by resolvers that lie."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest

from service.requests.webhooks import sender as module
from service.requests.webhooks.sender import Attempt, Resolve, Sender, judge
from tests.helpers.certificates import write_server_certificate
from tests.helpers.receivers import SECRET, Receiver, receiver

LOOPBACK = [ip_network("127.0.0.0/8")]
HERE = "127.0.0.1"
BODY = b'{"id": "1"}'


def resolving(*answers: Sequence[str] | Exception) -> Resolve:
    """A resolver that gives these answers in turn, and the last one for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return resolve


def sender(resolve: Resolve | None = None, networks=LOOPBACK) -> Sender:
    return Sender([SECRET.encode()], networks, resolve)


def send(sender: Sender, url: str) -> Attempt:
    return asyncio.run(sender.send(httpx.URL(url), lambda: BODY))


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


def test_the_body_arrives_signed_at_the_address_that_was_resolved(hook):
    name = f"hooks.example.org:{hook.port}"
    assert send(sender(resolving([HERE])), f"http://{name}/a?b=c") == Attempt(204)
    (received,) = hook.received
    assert (received.path, received.host, received.body) == ("/a?b=c", name, BODY)
    assert received.is_signed()
    assert not received.is_signed("another secret of many characters")


def test_every_secret_signs(hook):
    made = Sender([b"old secret, old secret", b"new secret, new secret"], LOOPBACK, resolving([HERE]))
    assert send(made, hook.url).status == 204
    (received,) = hook.received
    assert received.is_signed("old secret, old secret")
    assert received.is_signed("new secret, new secret")


def test_the_systems_resolver_is_used(hook):
    assert send(sender(), hook.url) == Attempt(204)


@pytest.mark.parametrize(
    "addresses",
    [
        [HERE],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["0.0.0.0"],
        ["169.254.169.254"],
        ["1.1.1.1", HERE],  # one public address does not excuse another
        [HERE, "1.1.1.1"],
        [],
    ],
)
def test_nothing_is_sent_if_an_address_is_not_allowed(hook, addresses: list[str]):
    refused = Attempt(error="address_refused")
    assert send(sender(resolving(addresses), networks=[]), hook.url) == refused
    assert hook.received == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "localhost"])
def test_spellings_of_loopback_are_refused_by_their_address(hook, host: str):
    """The rules refuse such hosts already; here the system's resolver reads them."""
    assert send(sender(networks=[]), f"http://{host}:{hook.port}/").error == "address_refused"
    assert hook.received == []


def test_an_address_that_changes_after_the_check_is_not_connected_to(hook):
    """DNS rebinding: the name has an allowed address at first, and then that of the receiver."""
    only_2 = [ip_network("127.0.0.2/32")]
    made = sender(resolving(["127.0.0.2"], [HERE]), only_2)
    assert send(made, hook.url) == Attempt(error="connection", final=False)
    assert send(made, hook.url) == Attempt(error="address_refused")
    assert hook.received == []


def test_a_host_is_resolved_once_for_each_attempt(hook):
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return [HERE]

    send(sender(resolve), hook.url)
    assert asked == [("localhost", hook.port)]


def test_another_address_is_tried_if_the_first_does_not_accept_connections(hook):
    assert send(sender(resolving(["127.0.0.2", HERE])), hook.url) == Attempt(204)
    assert len(hook.received) == 1


def test_redirects_are_not_followed(hook):
    with receiver([302], location=hook.url) as first:
        assert send(sender(), first.url) == Attempt(302, "redirect")
    assert len(first.received) == 1
    assert hook.received == []


def test_proxies_of_the_environment_are_not_used(hook, monkeypatch):
    with receiver() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{HERE}:{proxy.port}")
        monkeypatch.setenv("ALL_PROXY", f"http://{HERE}:{proxy.port}")
        assert send(sender(), hook.url) == Attempt(204)
        assert proxy.received == []


@pytest.mark.parametrize(("host", "delivered"), [("hooks.example.org", True), ("other.example.org", False)])
def test_certificates_are_verified_for_the_name(tmp_path: Path, monkeypatch, host: str, delivered: bool):
    files = write_server_certificate(tmp_path, "hooks.example.org")
    monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
    with receiver(certificate=files) as hook:
        attempt = send(sender(resolving([HERE])), f"https://{host}:{hook.port}/")
        assert attempt == (Attempt(204) if delivered else Attempt(error="connection", final=False))
        assert len(hook.received) == delivered


def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path: Path):
    files = write_server_certificate(tmp_path, "localhost")
    with receiver(certificate=files) as hook:
        assert send(sender(), f"https://localhost:{hook.port}/").error == "connection"
        assert hook.received == []


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such host"), "unresolved"),
        (ConnectionRefusedError(), "connection"),
        (ssl.SSLError(), "connection"),
        (httpx.ReadTimeout("late"), "timeout"),
    ],
)
def test_failures_have_fixed_words_and_may_be_repeated(error: Exception, word: str):
    assert send(sender(resolving(error)), "http://localhost/") == Attempt(error=word, final=False)


def test_statuses_that_may_change_are_repeated():
    kinds = {status: (judge(status).error, judge(status).final) for status in range(200, 600)}
    assert {status for status, kind in kinds.items() if kind == (None, True)} == set(range(200, 300))
    assert {status for status, kind in kinds.items() if kind[0] == "redirect"} == set(range(300, 400))
    repeated = {408, 425, 429, *range(500, 600)}
    assert {status for status, kind in kinds.items() if kind == ("status", False)} == repeated


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that answers its first connection with a function, until the client closes it."""
    with socket.create_server((HERE, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                try:
                    answer(connection)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://{HERE}:{listener.getsockname()[1]}/"
        thread.join(20)
        assert not thread.is_alive(), "the client has not closed the connection"


def endless_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")


def endless_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: " + b"x" * 2**12 + b"\r\n")


def slow_headers(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"H")
        time.sleep(0.02)


def other_protocol(connection: socket.socket) -> None:
    connection.sendall(b"\0\xff not HTTP\r\n\r\n")


def silence(connection: socket.socket) -> None:
    while connection.recv(2**16):
        pass


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (endless_body, Attempt(200)),
        (endless_headers, Attempt(error="connection", final=False)),
        (silence, Attempt(error="timeout", final=False)),
        (
            other_protocol,
            Attempt(error="connection", final=False),
        ),
        (lambda connection: None, Attempt(error="connection", final=False)),
    ],
)
def test_what_a_receiver_answers_is_bounded(monkeypatch, answer, expected: Attempt):
    monkeypatch.setattr(module, "ATTEMPT_SECONDS", 1.0)
    with raw_server(answer) as url:
        assert send(sender(), url) == expected


def test_a_receiver_that_answers_byte_by_byte_is_left(monkeypatch):
    monkeypatch.setattr(module, "ATTEMPT_SECONDS", 0.5)
    with raw_server(slow_headers) as url:
        assert send(sender(), url).error in ("timeout", "connection")


def test_a_slow_resolver_is_left(monkeypatch):
    monkeypatch.setattr(module, "ATTEMPT_SECONDS", 0.05)

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [HERE]

    assert send(sender(resolve), "http://localhost/") == Attempt(error="timeout", final=False)


def test_attempts_at_the_same_time_are_bounded():
    now, most = 0, 0

    async def resolve(host: str, port: int) -> list[str]:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.01)
        now -= 1
        return []

    async def scenario() -> None:
        made = sender(resolve)
        await asyncio.gather(*(made.send(httpx.URL("http://localhost/"), lambda: BODY) for _ in range(50)))

    asyncio.run(scenario())
    assert most == module.MAX_SENDS
