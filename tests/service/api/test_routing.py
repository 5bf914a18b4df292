"""How JSON bodies are read, over HTTP."""

from __future__ import annotations

import gzip
import json

import httpx
import psutil
import pytest

from tests.helpers.clients import error_of, image_of, post
from tests.helpers.servers import Server

BODY = {"prompt": "red apple", "seed": 1, "steps": 1}
CPU_SECONDS = 1.0  # of the API process for a body that takes a tenth of it at most, also on a busy machine


def send(server: Server, content: bytes, **headers: str) -> httpx.Response:
    """A body with these headers alone."""
    request = httpx.Request(
        "POST", server.client.base_url.join("/generate"), content=content, headers=headers
    )
    return server.client.send(request)


def test_json_without_a_content_type_is_read(server):
    answer = send(server, json.dumps(BODY).encode())
    assert (image_of(answer) == image_of(post(server, BODY))).all()


@pytest.mark.parametrize(
    "kind",
    [
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/problem+json",
        "text/json",
        "Text/X-JSON; a=b",
    ],
)
def test_json_of_any_spelling_is_read(server, kind):
    assert send(server, json.dumps(BODY).encode(), **{"content-type": kind}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "?"])
def test_another_content_type_is_refused_with_the_right_one(server, kind):
    error = error_of(send(server, json.dumps(BODY).encode(), **{"content-type": kind}), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_compressed_json_is_refused_as_that(server, coding):
    headers = {"content-type": "application/json", "content-encoding": coding}
    assert "Content-Encoding" in error_of(send(server, gzip.compress(b"{}"), **headers), 415)["message"]


def test_a_web_page_of_another_origin_must_say_that_it_sends_json(server):
    error_of(send(server, json.dumps(BODY).encode(), origin="https://example.com"), 415)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"\xff"', b"\xff\xfe"])
def test_a_body_that_is_no_json_object_is_refused(server, content):
    assert "JSON object" in error_of(send(server, content), 400)["message"]


HOSTILE = {
    "brackets": b"[" * 1_000_000,
    "closed brackets": b"[" * 500_000 + b"]" * 500_000,
    "brackets in a field": b'{"prompt":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "nested objects": b'{"a":' * 90_000 + b"1" + b"}" * 90_000,
    "a million values": b'{"boxes":[' + b"0," * 500_000 + b"0]}",
    "a million fields": b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
    "unknown fields": b"{" + b",".join(b'"%d":1' % i for i in range(24_000)) + b"}",
    "loras": b'{"prompt":"p","loras":{' + b",".join(b'"%d":"x"' % i for i in range(19_000)) + b"}}",
    "a long integer": b'{"prompt":"p","seed":' + b"9" * 1_000_000 + b"}",
    "a long number": b'{"prompt":"p","eta":0.' + b"3" * 1_000_000 + b"}",
    "a large exponent": b'{"prompt":"p","eta":1e' + b"9" * 1_000_000 + b"}",
    "escapes": b'{"prompt":"' + rb"\u0041" * 160_000 + b'"}',
    "a long name": b'{"' + b"a" * 1_000_000 + b'":1}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_takes_little_time(server, content):
    process = psutil.Process(server.process.pid)
    begin = process.cpu_times()
    answer = send(server, content)
    end = process.cpu_times()
    assert end.user + end.system - begin.user - begin.system < CPU_SECONDS
    assert answer.status_code in ((200,) if content == HOSTILE["a long number"] else (400, 422))
