"""POST /generate requests to a test server, and the images and errors in their responses."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
from PIL import Image

from tests.helpers.images import psnr
from tests.helpers.servers import Server, wait_until

EIGHT = ("ddim", "ddpm", "plms", "euler", "euler_ancestral", "dpmpp_2m_karras", "unipc", "lcm")
LONG = {"prompt": "long", "steps": 1000, "width": 128, "height": 128}  # does not end within a test
SLOW = {"prompt": "slow", "steps": 1000, "width": 256, "height": 256}  # about 0.1 s per step


def image_of(answer: httpx.Response, index: int = 0) -> np.ndarray:
    """The pixels of one image of a response: (H, W, 3) uint8."""
    return np.asarray(open_image(answer, index))


def open_image(answer: httpx.Response, index: int = 0) -> Image.Image:
    """One image of a response."""
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][index]["data"])))


def post(server: Server, body: dict, **headers: str) -> httpx.Response:
    """POST /generate with any body, also with NaN or lone surrogates in it."""
    headers = {"Content-Type": "application/json"} | headers
    return server.client.post("/generate", content=json.dumps(body), headers=headers)


def alone(server: Server, bodies: list[dict]) -> list[np.ndarray]:
    """The image of each request, generated one after the other."""
    return [image_of(post(server, body)) for body in bodies]


def together(server: Server, pool: ThreadPoolExecutor, bodies: list[dict]) -> list[Future[httpx.Response]]:
    """Futures of the responses to requests that run at the same time."""
    return [pool.submit(post, server, body) for body in bodies]


def worst_psnr(images: list[np.ndarray], answers: list[Future[httpx.Response]]) -> float:
    """The lowest PSNR of the responses' images against these images, once all have arrived."""
    return min(psnr(a, image_of(b.result())) for a, b in zip(images, answers, strict=True))


def error_of(answer: httpx.Response, status: int) -> dict:
    """The error in a response. Asserts the status and the error format."""
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"type", "message", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


def wait_for_jobs(server: Server, count: int) -> None:
    wait_until(lambda: server.health()["jobs"] == count)


def wait_for_running(server: Server, count: int) -> None:
    wait_until(lambda: server.metric("ldm_jobs_running") == count)
