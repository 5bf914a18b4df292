"""HTTP behaviour of all routes: HEAD, OPTIONS, 405, CORS, and the documentation page."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from service.api.app import create_app
from service.settings import SettingError, Settings, read_settings
from tests.helpers.clients import LONG

KEY = "a-key-of-the-tests"
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A client of an application whose worker does not run."""
    return TestClient(create_app(Settings()), follow_redirects=False)


@pytest.fixture(scope="module")
def cors_client() -> TestClient:
    return TestClient(create_app(Settings(cors_origins=(ORIGIN,), api_keys=(KEY,))))


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/health", "/metrics", "/v1/models", "/no"],
)
def test_head_is_get_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert head.content == b""
    assert head.status_code == got.status_code
    variable = {"x-request-id", "content-length" if path == "/metrics" else ""}
    assert {k: v for k, v in head.headers.items() if k not in variable} == {
        k: v for k, v in got.headers.items() if k not in variable
    }


def test_head_needs_a_key_where_get_does():
    client = TestClient(create_app(Settings(api_keys=(KEY,))))
    assert client.head("/v1/models").status_code == 401
    assert client.head("/jobs/none", headers={"X-API-Key": KEY}).status_code == 404
    assert client.head("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/generate", "OPTIONS, POST"),
        ("HEAD", "/generate", "OPTIONS, POST"),
        ("POST", "/jobs/some-id", "DELETE, GET, HEAD, OPTIONS"),
        ("DELETE", "/sdapi/v1/options", "GET, HEAD, OPTIONS, POST"),
        ("POST", "/docs", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_405_names_every_method_of_the_path(client, method, path, allowed):
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_options_names_the_methods_and_needs_no_key(cors_client):
    answer = cors_client.options("/jobs/some-id")
    assert (answer.status_code, answer.headers["allow"]) == (204, "DELETE, GET, HEAD, OPTIONS")
    assert answer.content == b""
    assert cors_client.options("/no/such/path", headers={"X-API-Key": KEY}).status_code == 404


def test_without_the_setting_there_are_no_cors_headers(client):
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for answer in (client.options("/generate", headers=headers), client.get("/health", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_request_of_a_listed_origin_is_allowed(cors_client):
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = cors_client.options("/generate", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    refused = cors_client.options("/generate", headers=headers | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_errors_carry_cors_headers_too(cors_client):
    for path, status in (("/jobs/none", 401), ("/no/such/path", 404), ("/health", 200)):
        answer = cors_client.get(path, headers={"Origin": ORIGIN})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ORIGIN)
    large = cors_client.post("/generate", content=bytes(2**26), headers={"Origin": ORIGIN, "X-API-Key": KEY})
    assert (large.status_code, large.headers["access-control-allow-origin"]) == (413, ORIGIN)


@pytest.mark.parametrize(
    ("headers", "location"), [({}, "docs"), ({"X-Forwarded-Prefix": "/images/"}, "/images/docs")]
)
def test_without_the_page_the_root_leads_to_the_documentation(headers, location):
    client = TestClient(create_app(Settings(no_page=True)), follow_redirects=False)
    answer = client.get("/", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (307, location)


def test_the_documentation_page_loads_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert (
        "script-src" in page.headers["content-security-policy"]
        or "default-src 'self'" in (page.headers["content-security-policy"])
    )
    assert "://" not in page.text
    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "initializer.js"):
        assert f"docs/{name}" in page.text
        assert client.get(f"/docs/{name}").status_code == 200
    assert client.get("/docs/index.html").status_code == 404


@pytest.mark.everywhere
def test_head_of_an_event_stream_ends_at_once(server):
    job = server.client.post("/jobs", json={"task": "generate", "request": LONG}).json()["id"]
    head = server.client.head(f"/jobs/{job}/events", timeout=5)
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert server.client.delete(f"/jobs/{job}").json()["status"] == "cancelled"


def test_a_page_of_a_listed_origin_may_call_a_running_server(bundled):
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    preflight = bundled.client.options("/v1/images/generations", headers=headers)
    refused = bundled.client.post("/v1/images/generations", json={}, headers={"Origin": ORIGIN})
    assert (preflight.status_code, refused.status_code) == (200, 400)
    for answer in (preflight, refused):
        assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_a_path_prefix_may_be_removed_by_the_proxy_or_not():
    client = TestClient(create_app(Settings(root_path="/studio", no_page=True)), follow_redirects=False)
    for path in ("/studio/docs", "/docs"):
        assert client.get(path).status_code == 200
        assert client.options(path).headers["allow"] == "GET, HEAD, OPTIONS"
    assert client.get("/studio/").headers["location"] == "/studio/docs"
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/studio"}]
    assert client.get("/studios/docs").status_code == 404


@pytest.mark.parametrize("path", ["studio", "/a b", "//", "/?", "/../a"])
def test_a_path_prefix_must_be_a_path(path):
    with pytest.raises(SettingError, match="LDM_ROOT_PATH"):
        read_settings({"LDM_ROOT_PATH": path})
