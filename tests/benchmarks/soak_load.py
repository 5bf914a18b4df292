"""The load of a soak test: one function for each thing that a client does, drawn at random.

Each takes an HTTP client and a source of chance, and returns the status of its response or what happened.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
from PIL import Image, ImageDraw

from tests.benchmarks.kills import NAMES
from tests.helpers.images import base64_of, hole, noise

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "unipc", "lcm", "heun")
SECOND_MODEL = "emoji-copy"  # loaded and unloaded all the time
SIZES = (96, 128, 160)
PHOTO = noise(128, 128)
OUTLINE = Image.new("RGB", (128, 128))
ImageDraw.Draw(OUTLINE).ellipse((30, 30, 98, 98), outline="white", width=3)
BAD_BODIES = (
    b"",
    b"{",
    b'"text"',
    b'{"prompt": 1}',
    b'{"prompt": "a", "steps": 1e400}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": "a", "width": 100000}',
    b'{"prompt": "a", "init_image": "' + b"A" * 100_000 + b'"}',
    b"[" * 50_000,
    b"\xff\xfe",
)

Activity = Callable[[httpx.Client, random.Random], str]


def scene(draw: random.Random) -> dict:
    """The common fields of a random request."""
    return {
        "prompt": f"{draw.choice(NAMES)} on a {draw.choice(('blue', 'red', 'green'))} background",
        "steps": draw.randint(2, 12),
        "sampler": draw.choice(SAMPLERS),
        "guidance_scale": draw.choice((1.0, 3.0, 5.0)),
        "seed": draw.randrange(2**32),
        "output_format": draw.choice(("png", "jpeg", "webp")),
    }


def post(client: httpx.Client, path: str, body: dict) -> str:
    return str(client.post(path, json=body).status_code)


def text_to_image(client: httpx.Client, draw: random.Random) -> str:
    sizes = {"width": draw.choice(SIZES), "height": draw.choice(SIZES), "n": draw.choice((1, 1, 1, 3))}
    return post(client, "/generate", scene(draw) | sizes)


def image_to_image(client: httpx.Client, draw: random.Random) -> str:
    return post(client, "/generate", scene(draw) | {"init_image": base64_of(PHOTO), "strength": 0.6})


def boxes(client: httpx.Client, draw: random.Random) -> str:
    box = {"name": draw.choice(NAMES), "x": 0.1, "y": 0.1, "w": draw.uniform(0.3, 0.9), "h": 0.8}
    return post(client, "/generate", {"boxes": [box], "steps": 4})


def inpaint(client: httpx.Client, draw: random.Random) -> str:
    images = {"image": base64_of(PHOTO), "mask": base64_of(hole((128, 128)))}
    return post(client, "/inpaint", scene(draw) | images | {"area": draw.choice(("whole", "masked"))})


def upscale(client: httpx.Client, draw: random.Random) -> str:
    return post(client, "/upscale", {"image": base64_of(noise(24, 16)), "steps": draw.randint(1, 3)})


def adapters(client: httpx.Client, draw: random.Random) -> str:
    control = {"model": "outline", "image": base64_of(OUTLINE), "scale": draw.choice((0.5, 1.0))}
    lora = {"few-steps": draw.choice((0.3, 0.7, 1.0))}
    return post(client, "/generate", scene(draw) | {"controls": [control], "loras": lora})


def two_passes(client: httpx.Client, draw: random.Random) -> str:
    return post(client, "/generate", scene(draw) | {"hires": {"scale": 1.5, "strength": 0.5}})


def feature_cache(client: httpx.Client, draw: random.Random) -> str:
    return post(client, "/generate", scene(draw) | {"feature_cache": {"interval": 3}})


def openai(client: httpx.Client, draw: random.Random) -> str:
    body = {"prompt": draw.choice(NAMES), "size": "128x128", "steps": 3, "stream": draw.random() < 0.5}
    return post(client, "/v1/images/generations", body)


def a1111(client: httpx.Client, draw: random.Random) -> str:
    body = {
        "prompt": f"({draw.choice(NAMES)}:1.2) <lora:few-steps:0.5>",
        "steps": 3,
        "sampler_name": "Euler a",
    }
    return post(client, "/sdapi/v1/txt2img", body)


def other_model(client: httpx.Client, draw: random.Random) -> str:
    return post(client, "/generate", scene(draw) | {"model": SECOND_MODEL})


def unload(client: httpx.Client, draw: random.Random) -> str:
    return post(client, f"/models/{SECOND_MODEL}/unload", {})


def job(client: httpx.Client, draw: random.Random) -> str:
    """Submit a job and follow its events to the end, or cancel it, or leave."""
    how = draw.choice(("follow", "cancel", "leave"))
    body = {"task": "generate", "request": scene(draw), "preview_every": draw.choice((0, 2))}
    answer = client.post("/jobs", json=body)
    if answer.status_code != 202:
        return str(answer.status_code)
    path = answer.headers["location"]
    if how == "cancel":
        return f"cancelled: {client.delete(path).status_code}"
    with client.stream("GET", f"{path}/events") as events:
        for line in events.iter_lines():
            if how == "leave" and line.startswith("event"):
                break
    return how


def disconnect(client: httpx.Client, draw: random.Random) -> str:
    """Send a request, whole or in part, and close the connection before the response."""
    content = json.dumps(scene(draw) | {"steps": 50}).encode()
    head = "POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(sent[: draw.choice((10, len(sent) // 2, len(sent), len(sent)))])
        time.sleep(draw.uniform(0, 0.5))
    return "left"


def bad_body(client: httpx.Client, draw: random.Random) -> str:
    path = draw.choice(("/generate", "/inpaint", "/upscale", "/jobs", "/sdapi/v1/img2img"))
    kind = {"Content-Type": "application/json"}
    status = client.post(path, content=draw.choice(BAD_BODIES), headers=kind).status_code
    return "refused" if 400 <= status < 500 else f"{status} for a bad body"


def read(client: httpx.Client, draw: random.Random) -> str:
    path = draw.choice(("/health", "/models", "/metrics", "/activity", "/", "/sdapi/v1/progress", "/nothing"))
    return f"GET {client.get(path).status_code}"


ACTIVITIES: dict[Activity, int] = {
    text_to_image: 6,
    image_to_image: 2,
    boxes: 1,
    inpaint: 2,
    upscale: 1,
    adapters: 2,
    two_passes: 1,
    feature_cache: 1,
    openai: 1,
    a1111: 1,
    other_model: 1,
    unload: 1,
    job: 3,
    disconnect: 2,
    bad_body: 3,
    read: 3,
}


def client_loop(url: str, seed: int, end: float, record: Callable[[str, str], None]) -> None:
    """Do one thing after the other until the time `end` of the monotonic clock."""
    draw = random.Random(seed)
    kinds, weights = list(ACTIVITIES), list(ACTIVITIES.values())
    with httpx.Client(base_url=url, timeout=300.0) as client:
        while time.monotonic() < end:
            (activity,) = draw.choices(kinds, weights)
            outcome = "no answer"
            with suppress(httpx.TransportError, OSError):
                outcome = activity(client, draw)
            record(activity.__name__, outcome)
