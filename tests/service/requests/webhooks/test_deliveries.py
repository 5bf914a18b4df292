"""Repeated attempts, the states of deliveries, and shutdown; the sender is a fake."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.metrics import Metrics
from service.requests.job_schemas import JobStatus
from service.requests.response_schemas import GenerateResponse, ImageResult, Timings
from service.requests.webhooks import deliveries as module
from service.requests.webhooks.deliveries import Delivery, Webhooks, open_webhooks, read_secrets
from service.requests.webhooks.sender import Attempt
from service.requests.webhooks.targets import read_rules
from service.settings import SettingError, Settings

URL = "https://hooks.example.org/"
AGAIN, NEVER = Attempt(500, "status", final=False), Attempt(400, "status")


class FakeSender:
    """Ends attempts as told, and keeps the bodies. The last outcome holds for ever; None never ends."""

    def __init__(self, *outcomes: Attempt | None) -> None:
        self.outcomes = list(outcomes)
        self.bodies: list[dict] = []

    async def send(self, url: httpx.URL, body: Callable[[], bytes]) -> Attempt:
        self.bodies.append(json.loads(body()))
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if outcome is None:
            await asyncio.Event().wait()
        return outcome

    def close(self) -> None:
        pass


def status(size: int = 0) -> JobStatus:
    """A job that is done, whose image file has so many characters in base64."""
    image = ImageResult(data="x" * size, media_type="image/png", seed=1, width=8, height=8)
    times = Timings(queue=0, denoise=0, decode=0, total=0)
    result = GenerateResponse(id="1", model="m", created=1, images=[image], timings=times, warnings=[])
    return JobStatus(
        id="1", task="generate", status="done", created=1, position=None, estimate=None, step=1, steps=1,
        result=result, error=None,
    )  # fmt: skip


class Scene:
    """Webhooks with a fake sender and pauses that take no time."""

    def __init__(self, *outcomes: Attempt | None, **settings) -> None:
        self.pauses: list[float] = []
        self.metrics = Metrics()
        self.sender = FakeSender(*outcomes)
        rules = read_rules(["hooks.example.org"], http=False)
        self.webhooks = Webhooks(
            Settings(**settings), self.metrics, self.sender, rules, lambda: sum(self.pauses), self.pause
        )

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    def start(self, job: JobStatus | None = None) -> Delivery:
        delivery = self.webhooks.prepare(URL)

        async def describe() -> JobStatus:
            return job or status()

        self.webhooks.start(delivery, "1", describe)
        return delivery

    def deliver(self, job: JobStatus | None = None) -> Delivery:
        """A delivery that has ended."""

        async def scenario() -> Delivery:
            delivery = self.start(job)
            await delivery.ended.wait()
            return delivery

        return asyncio.run(scenario())

    def count(self, outcome: str) -> float:
        return self.metrics.webhooks.labels(outcome)._value.get()


def test_a_delivery_is_repeated_until_it_succeeds():
    scene = Scene(AGAIN, Attempt(error="timeout", final=False), Attempt(200))
    delivery = scene.deliver()
    assert delivery.describe().model_dump() == {
        "state": "delivered",
        "attempts": 3,
        "last_status": 200,
        "last_error": None,
    }
    assert delivery.sent_all
    assert (scene.count("delivered"), scene.count("failed")) == (1, 0)
    assert scene.metrics.webhook_retries._value.get() == 2


def test_the_body_is_the_job_and_the_time_and_state_of_the_attempt():
    scene = Scene(AGAIN, Attempt(200))
    scene.deliver()
    first, second = scene.sender.bodies
    assert abs(second["sent"] - time.time()) < 60
    assert not second["images_omitted"]
    assert (first["webhook"]["attempts"], second["webhook"]["attempts"]) == (1, 2)
    assert (second["webhook"]["state"], second["webhook"]["last_status"]) == ("pending", 500)
    assert JobStatus.model_validate(second).result == status().result


def test_pauses_double_up_to_a_minute_and_end_with_the_total_time():
    scene = Scene(AGAIN, webhook_seconds=600.0)
    delivery = scene.deliver()
    assert (delivery.state, delivery.error, delivery.attempts) == ("failed", "status", len(scene.pauses) + 1)
    limits = [min(2.0**number, 60.0) for number in range(len(scene.pauses))]
    assert all(limit / 2 <= pause <= limit for limit, pause in zip(limits, scene.pauses, strict=True))
    assert 540 < sum(scene.pauses) <= 600
    assert scene.count("failed") == 1


@pytest.mark.parametrize("outcome", [NEVER, Attempt(302, "redirect"), Attempt(error="address_refused")])
def test_final_failures_are_not_repeated(outcome: Attempt):
    scene = Scene(outcome)
    delivery = scene.deliver()
    assert (delivery.state, delivery.attempts, delivery.error) == ("failed", 1, outcome.error)


@pytest.mark.parametrize(("limit", "omitted"), [(10_000, True), (100_000, False), (0, True)])
def test_images_are_left_out_of_large_bodies(limit: int, omitted: bool):
    scene = Scene(Attempt(200), webhook_max_bytes=limit)
    delivery = scene.deliver(status(20_000))
    (body,) = scene.sender.bodies
    assert (body["images_omitted"], delivery.sent_all) == (omitted, not omitted)
    (image,) = body["result"]["images"]
    assert (len(image["data"]), image["seed"]) == (0 if omitted else 20_000, 1)


def test_pending_bodies_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING_BYTES", 50_000)
    scene = Scene(None)

    async def scenario() -> None:
        for _ in range(5):
            scene.start(status(20_000))
        while len(scene.sender.bodies) < 5:
            await asyncio.sleep(0.001)
        await scene.webhooks.finish(0)

    asyncio.run(scenario())
    assert sum(not body["images_omitted"] for body in scene.sender.bodies) == 2
    assert scene.webhooks._bytes == 0


def test_too_many_pending_deliveries_fail_at_once(monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    scene = Scene(None)

    async def scenario() -> None:
        states = [scene.start().state for _ in range(3)]
        assert states == ["pending", "pending", "failed"]
        assert scene.metrics.webhooks_pending.collect()[0].samples[0].value == 2
        await scene.webhooks.finish(0)

    asyncio.run(scenario())


def test_shutdown_waits_for_a_bounded_time():
    scene = Scene(Attempt(200), None)

    async def scenario() -> None:
        quick, stuck = scene.start(), scene.start()
        await scene.webhooks.finish(0.2)
        assert (quick.state, stuck.state, stuck.error) == ("delivered", "failed", "shutdown")
        at_once = scene.start()
        await scene.webhooks.close()
        assert at_once.error == "shutdown"

    asyncio.run(scenario())
    assert (scene.count("delivered"), scene.count("failed")) == (1, 2)
    assert not scene.webhooks._tasks


def test_an_unexpected_error_ends_the_delivery():
    scene = Scene(AGAIN)
    scene.sender.outcomes = []
    delivery = scene.deliver()
    assert (delivery.state, delivery.error) == ("failed", "internal")


def test_a_file_of_secrets_without_hosts_gives_a_warning(caplog):
    assert open_webhooks(Settings(webhook_secret_file="secret"), Metrics()) is None
    assert "webhook_hosts" in caplog.text


def test_hosts_need_a_file_of_secrets(tmp_path: Path):
    assert open_webhooks(Settings(), Metrics()) is None
    with pytest.raises(SettingError, match="webhook_hosts needs webhook_secret_file"):
        open_webhooks(Settings(webhook_hosts=("hooks.example.org",)), Metrics())
    with pytest.raises(SettingError, match="cannot be read: No such file"):
        read_secrets(str(tmp_path / "none"))
    file = tmp_path / "secret"
    for content in ("", "too short\n", "a secret of many characters\nshort\n"):
        file.write_text(content)
        with pytest.raises(SettingError, match="at least 16 characters") as error:
            read_secrets(str(file))
        assert "short" not in str(error.value)
    file.write_text("first secret, 16 or more\n\nsecond secret, 16 or more\n")
    assert read_secrets(str(file)) == [b"first secret, 16 or more", b"second secret, 16 or more"]
