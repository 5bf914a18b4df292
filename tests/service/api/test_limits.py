"""The limits of keys over HTTP: which requests count, and what a refused client learns."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.api.app import create_app
from service.keys.table import digest
from service.settings import Settings

KEY = {"X-API-Key": "key-of-alice"}
BODY = {"prompt": "p"}


def table(folder: Path, **fields: int) -> str:
    file = folder / "keys.toml"
    lines = "\n".join(f"{name} = {value}" for name, value in fields.items())
    file.write_text(f'[keys.alice]\nsha256 = "{digest(b"key-of-alice").hex()}"\n{lines}\n')
    return str(file)


def send(app: FastAPI, *calls: tuple[str, str], **headers: str) -> list[httpx.Response]:
    """The responses of an app whose worker was never started, so that a job gets a 503."""

    async def send_async() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.request(*call, json=BODY, headers={**KEY, **headers}) for call in calls]

    return asyncio.run(send_async())


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(Settings(key_table=table(tmp_path, requests_per_minute=2)))


def test_post_requests_count_and_all_others_do_not(app):
    calls = (("GET", "/jobs/none"), ("DELETE", "/jobs/none"), ("GET", "/sdapi/v1/samplers"))
    assert [answer.status_code for answer in send(app, *3 * calls)] == 3 * [404, 404, 200]
    statuses = [answer.status_code for answer in send(app, *3 * [("POST", "/generate")])]
    assert statuses == [503, 503, 429]
    assert send(app, ("GET", "/jobs/none"))[0].status_code == 404


def test_a_response_says_what_is_left(app):
    first, second, third = send(app, *3 * [("POST", "/generate")])
    assert first.headers["ratelimit-policy"] == third.headers["ratelimit-policy"] == '"requests";q=2;w=60'
    assert first.headers["ratelimit"].startswith('"requests";r=1;t=')
    assert second.headers["ratelimit"].startswith('"requests";r=0;t=')
    wait = int(third.headers["retry-after"])
    assert third.headers["ratelimit"] == f'"requests";r=0;t={wait}'
    assert 0 < wait <= 61
    assert "ratelimit" not in send(app, ("GET", "/jobs/none"))[0].headers


@pytest.mark.parametrize("path", ["/generate", "/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_every_api_reports_a_refusal_in_the_form_of_its_errors(app, path):
    *_, refused = send(app, *3 * [("POST", path)])
    error = refused.json()["error"]
    assert refused.status_code == 429
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"] == "this key is limited to 2 requests a minute"
    assert error["request_id"] == refused.headers["x-request-id"]


def test_a_request_without_a_valid_key_counts_for_nobody(app):
    assert {one.status_code for one in send(app, *5 * [("POST", "/generate")], **{"X-API-Key": "x"})} == {401}
    assert send(app, ("POST", "/generate"))[0].status_code == 503


def test_refusals_are_counted_by_the_name_of_the_key(app):
    send(app, *5 * [("POST", "/generate")])
    text = send(app, ("GET", "/metrics"))[0].text
    assert 'ldm_key_refused_total{key="alice",reason="rate_limit_exceeded"} 3.0' in text
    assert 'ldm_key_requests_total{key="alice"} 6.0' in text
    assert "key-of-alice" not in text
    assert digest(b"key-of-alice").hex() not in text
