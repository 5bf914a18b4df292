"""Webhooks of a real server, received by a real one on this machine."""

from __future__ import annotations

import hashlib
import hmac
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.helpers.clients import LONG, error_of
from tests.helpers.environment import ROOT
from tests.helpers.receivers import SECRET, Receiver, receiver
from tests.helpers.servers import Server, wait_until

SHORT = {"prompt": "p", "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def start(start_server, tmp_path_factory) -> Callable[..., object]:
    """A context manager that gives a server which may call a receiver, and that receiver."""
    secret = tmp_path_factory.mktemp("secret") / "secret"
    secret.write_text(SECRET)

    @contextmanager
    def started(**settings: str) -> Iterator[tuple[Server, Receiver]]:
        with receiver() as hook:
            defaults = {
                "LDM_WEBHOOK_HOSTS": f"{hook.host}, hooks.example.org, 127.0.0.1:{hook.port}",
                "LDM_WEBHOOK_SECRET_FILE": str(secret),
                "LDM_WEBHOOK_HTTP": "1",
                "LDM_WEBHOOK_NETWORKS": "127.0.0.0/8, ::1",
            }
            with start_server(**defaults | settings) as server:
                yield server, hook

    return started


@pytest.fixture(scope="module")
def running(start) -> Iterator[tuple[Server, Receiver]]:
    with start() as pair:
        yield pair


@pytest.fixture
def hooked(running) -> tuple[Server, Receiver]:
    """The server, and its receiver without anything received."""
    server, hook = running
    hook.received.clear()
    hook.statuses.clear()
    return server, hook


def submit(server: Server, url: str, request: dict = SHORT, **headers: str) -> httpx.Response:
    body = {"task": "generate", "request": request, "webhook": url}
    return server.client.post("/jobs", json=body, headers=headers)


def state(server: Server, path: str) -> dict:
    return server.client.get(path).json()["webhook"]


def delivered(server: Server, path: str) -> dict:
    """The state of a webhook whose delivery has ended."""
    wait_until(lambda: state(server, path)["state"] in ("delivered", "failed"))
    return state(server, path)


def test_the_job_is_sent_signed_as_it_can_be_fetched(hooked):
    server, hook = hooked
    accepted = submit(server, hook.url)
    assert accepted.json()["webhook"]["state"] == "waiting"
    path = accepted.headers["location"]
    assert delivered(server, path) == {
        "state": "delivered",
        "attempts": 1,
        "last_status": 204,
        "last_error": None,
    }
    (received,) = hook.received
    assert received.is_signed()
    body, fetched = received.json, server.client.get(path).json()
    assert abs(body.pop("sent") - time.time()) < 60
    assert body.pop("images_omitted") is False
    assert body["result"]["images"][0]["data"]
    assert body | {"webhook": None} == fetched | {"webhook": None}


def test_failed_and_cancelled_jobs_are_sent_too(hooked):
    server, hook = hooked
    path = submit(server, hook.url, LONG).headers["location"]
    assert server.client.delete(path).json()["status"] == "cancelled"
    late = submit(server, hook.url, LONG | {"timeout": 0.01}).headers["location"]
    for one in (path, late):
        assert delivered(server, one)["state"] == "delivered"
    ends = {f"/jobs/{one.json['id']}": one.json for one in hook.received}
    assert ends[path]["status"] == "cancelled"
    assert (ends[late]["status"], ends[late]["error"]["code"]) == ("failed", "deadline_exceeded")


def test_a_failing_receiver_gets_the_job_again_with_a_new_signature(hooked):
    server, hook = hooked
    hook.statuses.append(503)
    retries = server.metric("ldm_webhook_retries_total")
    path = submit(server, hook.url).headers["location"]
    assert delivered(server, path)["attempts"] == 2
    first, second = hook.received
    assert first.json["id"] == second.json["id"]
    assert first.json["webhook"]["attempts"] < second.json["webhook"]["attempts"]
    assert first.is_signed()
    assert second.is_signed()
    assert server.metric("ldm_webhook_retries_total") == retries + 1


def test_a_repeated_idempotency_key_calls_the_webhook_once(hooked):
    server, hook = hooked
    paths = {submit(server, hook.url, **{"Idempotency-Key": "one"}).headers["location"] for _ in range(3)}
    (path,) = paths
    assert delivered(server, path)["state"] == "delivered"
    other = submit(server, hook.url + "/other", **{"Idempotency-Key": "one"})
    assert error_of(other, 422)["param"] == "Idempotency-Key"
    assert len(hook.received) == 1


def test_what_fails_is_counted_and_says_why(hooked):
    server, hook = hooked
    hook.statuses.append(410)
    failed = server.metric("ldm_webhooks_total", outcome="failed")
    path = submit(server, hook.url).headers["location"]
    assert delivered(server, path)["last_status"] == 410
    assert state(server, path)["last_error"] == "status"
    assert server.metric("ldm_webhooks_total", outcome="failed") == failed + 1


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "http://localhost:1/",
        "http://169.254.169.254/latest/meta-data",
        "http://user@localhost/",
        "file:///etc/passwd",
    ],
)
def test_other_urls_are_a_422_that_names_the_field(hooked, url: str):
    server, hook = hooked
    error = error_of(submit(server, url), 422)
    assert error["param"] == "webhook"
    assert hook.received == []
    assert server.health()["jobs"] == 0


def test_without_allowed_networks_loopback_is_refused(start):
    with start(LDM_WEBHOOK_NETWORKS="") as (server, hook):
        for host in ("localhost", "127.0.0.1"):
            path = submit(server, f"http://{host}:{hook.port}/").headers["location"]
            assert delivered(server, path)["last_error"] == "address_refused"
        assert hook.received == []


def test_without_hosts_a_webhook_is_refused(server):
    error = error_of(submit(server, "https://hooks.example.org/"), 422)
    assert (error["param"], "webhook_hosts" in error["message"]) == ("webhook", True)


def test_at_sigterm_webhooks_are_finished_but_not_waited_for_without_end(start):
    with start() as (server, hook):
        broken = submit(server, hook.url.replace("/hook", "/broken")).json()["id"]
        hook.statuses.append(503)  # one more attempt is needed
        request = {"prompt": "p", "steps": 200}
        ids = {submit(server, hook.url, request).json()["id"] for _ in range(3)}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    done = [one.json["id"] for one in hook.received if one.json["status"] == "done"]
    assert set(done) == ids | {broken}
    assert len([one for one in done if one != broken]) == 4


def test_the_documented_check_accepts_what_was_sent_and_nothing_else(hooked):
    server, hook = hooked
    delivered(server, submit(server, hook.url).headers["location"])
    (received,) = hook.received
    text = (ROOT / "service/README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?def ended_job.*?)```", text, re.DOTALL)[1], names)
    ended_job = names["ended_job"]
    assert ended_job(SECRET, received.signature, received.body) == received.json
    later = received.body.replace(b'"sent":1', b'"sent":2')
    for secret, signature, body in (
        ("another secret", received.signature, received.body),
        (SECRET, received.signature, later),
        (SECRET, "", received.body),
    ):
        with pytest.raises(ValueError, match="wrong signature"):
            ended_job(secret, signature, body)
    old = received.body.replace(f'"sent":{received.json["sent"]}'.encode(), b'"sent":1000')
    signature = hmac.new(SECRET.encode(), old, hashlib.sha256).hexdigest()
    with pytest.raises(ValueError, match="too old"):
        ended_job(SECRET, signature, old)


def test_a_server_with_hosts_and_without_a_secret_does_not_start(tmp_path: Path, capfd):
    from service.cli.main import main

    assert main(["serve", "--webhook-hosts", "hooks.example.org", "--port", "0"]) != 0
    assert "webhook_hosts needs webhook_secret_file" in capfd.readouterr().err
