"""API keys: which addresses need one, and what counts as one."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute

from service.api.app import create_app
from service.api.auth import keys_of
from service.settings import SettingError, Settings

KEYS = ("first-key-of-two", "second-key-of-two")
# Whoever adds an address says here that everybody may ask for it, or gives its router a key in app.py.
PUBLIC = {
    "/",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/docs/{name}",
    "/v1/images/files/{name}",  # the unguessable name is the permission
}


def walk(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, address) of every route and mount."""
    for route in routes:
        if hasattr(route, "original_router"):  # how newer FastAPI keeps an included router
            yield from walk(route.original_router.routes, prefix + route.include_context.prefix)
        elif hasattr(route, "methods"):
            yield from ((method, prefix + route.path) for method in sorted(route.methods))
        else:  # a mount, which takes anything below it; any other kind has no path and fails here
            yield from (("GET", prefix + route.path + end) for end in ("", "/", "/below"))


def ask(
    app: FastAPI, method: str, address: str, content: bytes = b"", **headers: str | bytes
) -> httpx.Response:
    """An answer of the app, whose worker was never started."""

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, address, content=content, headers=headers)

    return asyncio.run(asked())


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings(api_keys=KEYS))


def test_every_address_is_public_by_the_list_or_needs_a_key(app):
    found = list(walk(app.routes))
    for method, address in found:
        answer = ask(app, method, address.replace("{", "").replace("}", ""))
        public = answer.status_code != 401
        assert public == (address in PUBLIC), f"{method} {address}"
        if not public:
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    described = {
        (method.upper(), path)
        for path, item in ask(app, "GET", "/openapi.json").json()["paths"].items()
        for method in item
    }
    assert described <= set(found)
    assert {address for _, address in found} >= PUBLIC | {"/generate", "/jobs/{job_id}"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": f"bearer  {KEYS[1]}"},
        {"X-API-Key": KEYS[1]},
        {"X-API-Key": "no key", "Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": "Basic " + base64.b64encode(f"me:{KEYS[1]}".encode()).decode()},
    ],
)
def test_any_of_the_keys_opens_in_either_header(app, headers):
    assert ask(app, "GET", "/jobs/none", **headers).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": "Basic " + base64.b64encode(KEYS[0].encode()).decode()},
        {"Authorization": "Basic " + base64.b64encode(f"{KEYS[0]}:".encode()).decode()},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer " + KEYS[0][:-1]},
        {"Authorization": f"Bearer {KEYS[0]},{KEYS[1]}"},
        {"X-API-Key": KEYS[0].upper()},
        {"X-API-Key": ""},
        {"X-API-Key": "ключ".encode()},
        {"Cookie": f"X-API-Key={KEYS[0]}"},
    ],
)
def test_nothing_else_is_a_key(app, headers):
    assert ask(app, "GET", "/jobs/none", **headers).status_code == 401


SPELT = (
    "//generate",
    "/generate/",
    "/Generate",
    "/./generate",
    "/health/../generate",
    "/health/%2e%2e/generate",
)


@pytest.mark.parametrize("path", SPELT)
def test_no_spelling_of_an_address_goes_past_the_keys(app, path):
    assert ask(app, "POST", path, b"{}").status_code in (401, 404, 405)


def test_whoever_has_no_key_is_refused_before_the_body_is_read(app):
    kind = {"Content-Type": "application/json"}
    assert ask(app, "POST", "/generate", b"{no json", **kind).status_code == 401
    assert ask(app, "POST", "/generate", bytes(2**26), **kind).status_code == 401
    assert ask(app, "POST", "/generate", b"{no json", **kind, **{"X-API-Key": KEYS[0]}).status_code == 400


def test_without_keys_everybody_may_ask():
    assert ask(create_app(Settings()), "GET", "/jobs/none").status_code == 404


def test_keys_come_from_a_file_too(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# of the shop\nfile-key-1\n\n  file-key-2  \n")
    app = create_app(Settings(api_keys=KEYS[:1], api_key_file=str(file)))
    for key, status in (("file-key-1", 404), ("file-key-2", 404), (KEYS[0], 404), ("# of the shop", 401)):
        assert ask(app, "GET", "/jobs/none", **{"X-API-Key": key}).status_code == status


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "with space in it\n", None])
def test_a_file_without_keys_is_no_open_door(tmp_path: Path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError, match="keys") as error:
        keys_of(Settings(api_key_file=str(file)))
    assert "short" not in str(error.value)
