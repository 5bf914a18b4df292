"""API keys: which paths need one, and which headers carry one."""

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
from service.keys.keys import Keys
from service.settings import SettingError, Settings

KEYS = ("first-key-of-two", "second-key-of-two")
# Paths that need no key. A new path is either added here or its router is listed in KEYED in app.py.
PUBLIC = {
    "/",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/docs/{name}",
    "/page/{name}",
    "/v1/images/files/{name}",  # the unguessable name is the permission
}


def walk(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of every route and mount."""
    for route in routes:
        if hasattr(route, "original_router"):  # how newer FastAPI keeps an included router
            yield from walk(route.original_router.routes, prefix + route.include_context.prefix)
        elif hasattr(route, "methods"):
            yield from ((method, prefix + route.path) for method in sorted(route.methods))
        else:  # a mount, which takes anything below it; any other kind has no path and fails here
            yield from (("GET", prefix + route.path + end) for end in ("", "/", "/below"))


def send(
    app: FastAPI, method: str, address: str, content: bytes = b"", **headers: str | bytes
) -> httpx.Response:
    """A response of the app, whose worker was never started."""

    async def send_async() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, address, content=content, headers=headers)

    return asyncio.run(send_async())


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings(api_keys=KEYS))


def test_every_path_needs_a_key_unless_it_is_listed_as_public(app):
    found = list(walk(app.routes))
    for method, address in found:
        answer = send(app, method, address.replace("{", "").replace("}", ""))
        public = answer.status_code != 401
        assert public == (address in PUBLIC), f"{method} {address}"
        if not public:
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    described = {
        (method.upper(), path)
        for path, item in send(app, "GET", "/openapi.json").json()["paths"].items()
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
def test_each_key_is_accepted_in_each_header(app, headers):
    assert send(app, "GET", "/jobs/none", **headers).status_code == 404


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
def test_other_credentials_are_refused(app, headers):
    assert send(app, "GET", "/jobs/none", **headers).status_code == 401


SPELLINGS = (
    "//generate",
    "/generate/",
    "/Generate",
    "/./generate",
    "/health/../generate",
    "/health/%2e%2e/generate",
)


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_a_path_avoids_the_check(app, path):
    assert send(app, "POST", path, b"{}").status_code in (401, 404, 405)


def test_a_request_without_a_key_is_refused_before_its_body_is_read(app):
    kind = {"Content-Type": "application/json"}
    assert send(app, "POST", "/generate", b"{no json", **kind).status_code == 401
    assert send(app, "POST", "/generate", bytes(2**26), **kind).status_code == 401
    assert send(app, "POST", "/generate", b"{no json", **kind, **{"X-API-Key": KEYS[0]}).status_code == 400


def test_without_keys_every_request_is_accepted():
    assert send(create_app(Settings()), "GET", "/jobs/none").status_code == 404


def test_keys_are_read_from_a_file_too(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# of the shop\nfile-key-1\n\n  file-key-2  \n")
    app = create_app(Settings(api_keys=KEYS[:1], api_key_file=str(file)))
    for key, status in (("file-key-1", 404), ("file-key-2", 404), (KEYS[0], 404), ("# of the shop", 401)):
        assert send(app, "GET", "/jobs/none", **{"X-API-Key": key}).status_code == status


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "with space in it\n", None])
def test_a_key_file_without_valid_keys_is_an_error(tmp_path: Path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError, match="keys") as error:
        Keys(Settings(api_key_file=str(file)))
    assert "short" not in str(error.value)


@pytest.mark.parametrize(
    ("ordinary", "admin", "key", "statuses"),
    [
        (True, True, KEYS[0], (404, 403)),
        (True, True, "the-admin-key", (404, 503)),
        (True, True, "another-key", (401, 401)),
        (True, False, KEYS[0], (404, 403)),
        (False, True, "", (404, 401)),
        (False, True, "the-admin-key", (404, 503)),
        (False, False, "", (404, 503)),
    ],
)
def test_calls_about_models_need_an_admin_key_where_there_are_keys(tmp_path, ordinary, admin, key, statuses):
    """503: the call is allowed, but no worker was started. Admin keys are valid for all other calls too."""
    file = tmp_path / "admin-keys"
    file.write_text("the-admin-key")
    settings = {"api_keys": KEYS} if ordinary else {}
    app = create_app(Settings(**settings, **({"admin_key_file": str(file)} if admin else {})))
    headers = {"X-API-Key": key} if key else {}
    calls = (("GET", "/jobs/none"), ("POST", "/models/rescan"))
    assert tuple(send(app, *call, **headers).status_code for call in calls) == statuses
