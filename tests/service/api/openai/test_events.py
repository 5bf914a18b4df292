"""Event streams of the OpenAI Images API that end in an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest

from service.api.openai.events import events
from service.requests.job_record import JobEvent
from service.requests.job_schemas import JobStatus
from service.requests.response_schemas import ErrorDetail


class FailedRecord:
    """A job that has failed."""

    error = ErrorDetail(
        type="server_error", message="it broke", param=None, code="job_failed", request_id="r"
    )

    async def events(self) -> AsyncIterator[JobEvent]:
        known = {"id": "i", "task": "generate", "created": 0, "step": 0, "steps": 0}
        unknown = dict.fromkeys(("position", "estimate", "result"))
        yield JobEvent(1, "failed", JobStatus(status="failed", error=self.error, **known, **unknown))


def test_the_client_raises_an_error_of_a_stream():
    async def text() -> str:
        return "".join([event async for event in events(FailedRecord(), "image_generation", 0)])

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, text=asyncio.run(text()), headers={"content-type": "text/event-stream"})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=transport)
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.images.generate(prompt="p", stream=True))
