"""Logs: one JSON line for each request, without text from clients."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest

from service import logs
from service.settings import Settings

SECRET = "zanzibar"  # in prompts and paths of requests


def lines_of(file: Path) -> list[dict]:
    """All lines of a log, each parsed as JSON."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def record() -> logging.LogRecord:
    try:
        raise ValueError("why")
    except ValueError as error:
        made = logging.makeLogRecord(
            {"name": "a", "levelno": 40, "levelname": "ERROR", "msg": "job %s", "args": (1,), "status": 500}
        )
        made.exc_info = (ValueError, error, error.__traceback__)
    return made


def test_a_record_is_one_line_of_json(record):
    token = logs.request_id.set("id-1")
    logs.identify(record)
    logs.request_id.reset(token)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "a", "job 1")
    assert (line["request_id"], line["status"]) == ("id-1", 500)
    assert line["time"].endswith("Z")
    assert "ValueError: why" in line["traceback"]


def test_text_has_the_request_id_at_the_end_of_the_first_line(record):
    record.request_id = "id-1"
    first, *rest = logs.TextFormatter(logs.TEXT).format(record).splitlines()
    assert first.endswith("ERROR a: job 1 [id-1]")
    assert rest[-1] == "ValueError: why"


def test_auto_is_text_on_a_terminal_and_json_elsewhere(monkeypatch):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    try:
        for terminal, kind in ((False, logs.JsonFormatter), (True, logs.TextFormatter)):
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
            logs.set_up(Settings())
            assert type(root.handlers[0].formatter) is kind
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)


def test_a_request_is_one_line_and_prompts_are_logged_at_debug_only(start_server, tmp_path):
    file = tmp_path / "log"
    with (
        file.open("w") as stderr,
        start_server(LDM_LOG_LEVEL="debug", stderr=stderr, LDM_FAULTS="step:error:break") as server,
    ):
        client = server.client
        made = client.post(
            "/generate", json={"prompt": SECRET, "steps": 1}, headers={"X-Request-Id": "own-id"}
        )
        assert made.headers["x-request-id"] == "own-id"
        assert client.post("/generate", json={"prompt": f"{SECRET} break", "steps": 1}).status_code == 500
        assert client.post("/generate", json={"prompt": SECRET, "steps": 0, SECRET: 1}).status_code == 422
        assert client.get(f"/{SECRET}?{SECRET}={SECRET}").status_code == 404
        assert client.get(f"/jobs/{SECRET}").status_code == 404
        assert client.request(SECRET.upper(), "/health").status_code in (400, 405)  # of httptools, of h11
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
        server.process.terminate()
        assert server.process.wait(60) == 0
    lines = lines_of(file)
    requests = [line for line in lines if "route" in line]
    logged = {(line["method"], line["route"], line["status"]) for line in requests}
    assert {("POST", "/generate", status) for status in (200, 422, 500)} <= logged
    assert logged >= {("GET", None, 404), ("GET", "/jobs/{job_id}", 404)}
    (ours,) = [line for line in requests if line.get("request_id") == "own-id"]
    assert 0 < ours["seconds"] < 60
    assert all(line["request_id"] for line in requests)
    assert {line["code"] for line in requests if line["status"] == 500} == {"job_failed"}
    watched = [line for line in requests if str(line["route"]).startswith(("/health", "/metrics"))]
    assert {line["level"] for line in watched} == {"debug"}
    assert {line["status"] for line in watched} >= {200, 503}  # the start's too
    assert all(line["level"] == "info" for line in requests if line not in watched)
    with_prompt = [line for line in lines if SECRET in json.dumps(line).lower()]
    assert {line["level"] for line in with_prompt} == {"debug"}
    starts = [line["message"] for line in lines if line["logger"] == "service.device.loading"]
    assert [re.match(r"threads: \d+, ", message) is not None for message in starts] == [True]
