"""The native API over HTTP: what a request gives, what is refused, and how requests share UNet calls.

Nothing waits for seconds to pass, only for conditions to hold, so that a slow machine makes these tests slow
and not wrong.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from PIL import Image

from tests.helpers.clients import (
    EIGHT,
    LONG,
    SLOW,
    alone,
    error_of,
    image_of,
    open_image,
    post,
    together,
    wait_for_jobs,
    wait_for_running,
    worst_psnr,
)
from tests.helpers.images import psnr
from tests.helpers.servers import QUEUE_SIZE, wait_until

MIXED = [
    {"prompt": f"image {i}", "steps": steps, "guidance_scale": 1.0 + i, "seed": 100 + i}
    for i, steps in enumerate((10, 14, 18, 22, 27, 31, 36, 40))
]


@pytest.mark.everywhere
def test_a_response_describes_its_images(server):
    answer = post(server, {"prompt": "red apple", "seed": 0, "n": 2}).json()
    assert set(answer) == {"id", "model", "created", "images", "timings", "warnings"}
    assert set(answer["timings"]) == {"queue", "denoise", "decode", "total"}
    assert answer["model"] == "tiny"
    assert abs(answer["created"] - time.time()) < 600
    assert answer["timings"]["total"] >= answer["timings"]["denoise"] > 0
    assert answer["warnings"] == []
    for index, image in enumerate(answer["images"]):
        assert set(image) == {"data", "media_type", "seed", "width", "height"}
        assert (image["media_type"], image["seed"]) == ("image/png", index)
        made = Image.open(io.BytesIO(base64.b64decode(image["data"])))
        assert (made.format, made.size) == ("PNG", (64, 64)) == ("PNG", (image["width"], image["height"]))


def test_the_same_seed_gives_the_same_image_and_another_seed_another(server):
    first, again, other = (post(server, {"prompt": "red apple", "seed": seed}) for seed in (8, 8, 9))
    assert first.json()["images"][0]["data"] == again.json()["images"][0]["data"]
    assert psnr(image_of(first), image_of(other)) < 40


def test_a_missing_seed_is_drawn_and_returned(server):
    first = post(server, {"prompt": "red apple"})
    seed = first.json()["images"][0]["seed"]
    assert (image_of(first) == image_of(post(server, {"prompt": "red apple", "seed": seed}))).all()


def test_image_i_of_n_has_the_seed_plus_i(server):
    both = post(server, {"prompt": "red apple", "seed": 5, "n": 2, "eta": 1.0})
    second = post(server, {"prompt": "red apple", "seed": 6, "eta": 1.0})
    assert psnr(image_of(both, 1), image_of(second)) >= 40
    assert psnr(image_of(both, 0), image_of(second)) < 40


def test_width_and_height_are_those_of_the_image(server):
    assert image_of(post(server, {"prompt": "red apple", "width": 96, "height": 64})).shape == (64, 96, 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.everywhere
def test_accept_gives_the_image_as_a_file(server, kind):
    answer = post(server, {"prompt": "red apple", "seed": 3, "steps": 2}, accept=f"image/{kind}")
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-seed"] == "3"
    assert answer.headers["x-request-id"]
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


@pytest.mark.everywhere
def test_an_unsupported_accept_is_refused(server):
    assert error_of(post(server, {"prompt": "p"}, accept="text/html"), 406)["param"] == "Accept"
    assert error_of(post(server, {"prompt": "p", "n": 2}, accept="image/png"), 406)["param"] == "n"


def test_a_png_carries_its_parameters(server):
    body = {"prompt": "red äpple 🍎", "seed": 3, "steps": 2}
    answer = post(server, body, accept="image/png")
    parameters = json.loads(Image.open(io.BytesIO(answer.content)).text["parameters"])
    assert parameters["prompt"] == body["prompt"]
    assert (parameters["seed"], parameters["steps"]) == (3, 2)


def test_a_prompt_that_is_cut_gives_a_warning(server):
    assert "prompt is longer" in post(server, {"prompt": "word " * 100, "steps": 1}).json()["warnings"][0]


@pytest.mark.everywhere
def test_eight_requests_at_once_share_calls_and_change_no_image(server):
    expected = alone(server, MIXED)
    before = server.calls(over=4)
    with ThreadPoolExecutor(len(MIXED)) as pool:
        assert worst_psnr(expected, together(server, pool, MIXED)) >= 40
    assert server.calls(over=4) > before


def test_eight_samplers_at_once_share_calls_and_change_no_image(server):
    bodies = [
        {"prompt": f"image {i}", "steps": 40, "seed": i, "sampler": sampler}
        for i, sampler in enumerate(EIGHT)
    ]
    expected = alone(server, bodies)
    before = server.calls(over=8)
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert worst_psnr(expected, together(server, pool, bodies)) >= 40
    assert server.calls(over=8) > before


def test_a_spacing_changes_the_image_and_is_among_its_parameters(server):
    spacings = ("leading", "trailing", "linspace", "karras")
    answers = [post(server, {"prompt": "p", "seed": 1, "spacing": spacing}) for spacing in spacings]
    default = image_of(post(server, {"prompt": "p", "seed": 1}))
    assert [bool((image_of(answer) == default).all()) for answer in answers] == [True, False, False, False]
    texts = [open_image(answer).text["parameters"] for answer in answers]
    assert tuple(json.loads(text)["spacing"] for text in texts) == spacings


def test_a_step_of_heun_counts_as_two_unet_calls(server):
    request = {"prompt": "p", "sampler": "heun", "steps": 4}
    job = server.client.post("/jobs", json={"task": "generate", "request": request}).json()["id"]
    wait_until(lambda: server.client.get(f"/jobs/{job}").json()["status"] not in ("queued", "running"))
    assert server.client.get(f"/jobs/{job}").json()["steps"] == 7  # the last step takes one call


BAD = [
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": "  "}, 422, "prompt"),
    ({"prompt": "\ud800"}, 422, "prompt"),
    ({}, 422, "prompt"),
    ({"width": 65}, 422, "width"),
    ({"width": 8192, "height": 8192}, 422, "width"),
    ({"width": 10**400}, 422, "width"),
    ({"height": -64}, 422, "height"),
    ({"steps": 0}, 422, "steps"),
    ({"steps": 5000}, 422, "steps"),
    ({"steps": True}, 422, "steps"),
    ({"n": 10_000}, 422, "n"),
    ({"n": 17}, 422, "n"),
    ({"seed": -2}, 422, "seed"),
    ({"seed": 2**64}, 422, "seed"),
    ({"seed": 2**64 - 1, "n": 2}, 422, "seed"),
    ({"guidance_scale": 1e9}, 422, "guidance_scale"),
    ({"guidance_scale": float("nan")}, 422, "guidance_scale"),
    ({"eta": 2}, 422, "eta"),
    ({"eta": 0.5, "sampler": "euler"}, 422, "eta"),
    ({"steps": 51, "sampler": "lcm"}, 422, "steps"),
    ({"spacing": "even"}, 422, "spacing"),
    ({"spacing": "karras", "sampler": "plms"}, 422, "spacing"),
    ({"sampler": "magic"}, 422, "sampler"),
    ({"output_format": "bmp"}, 422, "output_format"),
    ({"steps": 1000, "n": 16, "width": 1024, "height": 1024}, 422, "width"),
    ({"steps": 1000, "n": 2, "width": 1024, "height": 512}, 422, "steps"),
    ({"no_such_field": "x"}, 422, "no_such_field"),
    ({"model": "other"}, 404, "model"),
    ({"model": "../../etc/passwd"}, 404, "model"),
]


def complete(body: dict) -> dict:
    """The body with a prompt, unless it is about the prompt."""
    return body if "prompt" in body or not body else {"prompt": "p"} | body


@pytest.mark.parametrize(("body", "status", "param"), BAD, ids=[str(body)[:40] for body, _, _ in BAD])
@pytest.mark.everywhere
def test_a_bad_value_is_refused_by_its_field(server, body, status, param):
    error = error_of(post(server, complete(body)), status)
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert len(error["message"]) > len(param) + 5  # it says what is accepted
    assert "passwd" not in error["message"]


def test_bad_values_are_refused_at_once_while_other_jobs_run(server):
    body = {"prompt": "undisturbed", "steps": 400, "seed": 4}
    (expected,) = alone(server, [body])
    with ThreadPoolExecutor(1) as pool:
        answers = together(server, pool, [body])
        wait_for_running(server, 1)
        seconds = []
        for bad, status, _ in BAD[::2]:
            begin = time.monotonic()
            error_of(post(server, complete(bad)), status)
            seconds.append(time.monotonic() - begin)
        assert not answers[0].done()
        assert worst_psnr([expected], answers) >= 40
    assert statistics.median(seconds) < 0.25  # milliseconds on an idle machine


UNREADABLE = [
    (b"{", "application/json", 400),
    (b"", "application/json", 400),
    (b'"\xff"', "application/json", 400),
    (b"[]", "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
    (b'{"prompt": "p", "\\ud800": 1}', "application/json", 400),  # a name that UTF-8 cannot encode
    (b'{"prompt": "p"}', "text/plain", 415),
]


@pytest.mark.parametrize(("content", "kind", "status"), UNREADABLE, ids=range(len(UNREADABLE)))
@pytest.mark.everywhere
def test_a_body_must_be_a_json_object(server, content, kind, status):
    answer = server.client.post("/generate", content=content, headers={"Content-Type": kind})
    assert error_of(answer, status)["type"] == "invalid_request_error"


@pytest.mark.everywhere
def test_a_body_over_the_limit_is_refused_with_and_without_content_length(server):
    def chunks():
        for _ in range(40):
            yield b" " * 50_000

    for content in (b" " * 2_000_000, chunks()):
        answer = server.client.post(
            "/generate", content=content, headers={"Content-Type": "application/json"}
        )
        assert error_of(answer, 413)["code"] == "too_large"


@pytest.mark.everywhere
def test_unknown_addresses_and_methods_have_the_error_format(server):
    assert error_of(server.client.get("/nowhere"), 404)["code"] == "not_found"
    answer = server.client.get("/generate")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "OPTIONS, POST"


@pytest.mark.everywhere
def test_the_openapi_document_describes_every_error(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    names = {operation["operationId"] for operation in operations}
    assert names >= {"generate", "inpaint", "list_models", "health", "health_live", "health_ready", "metrics"}
    assert names >= {"create_job", "read_job", "job_events", "cancel_job"}
    assert all(len(operation["tags"]) == 1 for operation in operations)
    for operation in operations:
        for status, answer in operation["responses"].items():
            if not status.startswith("2"):
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    made = [paths[path]["post"]["responses"]["200"] for path in ("/generate", "/inpaint")]
    assert made[0] == made[1]
    assert "image/png" in made[0]["content"]


@pytest.mark.everywhere
def test_models_lists_tasks_defaults_limits_and_samplers(server):
    (model,) = server.client.get("/models").json()["models"]
    assert (model["name"], model["tasks"]) == ("tiny", ["text-to-image", "image-to-image", "inpainting"])
    assert (model["defaults"]["width"], model["defaults"]["steps"]) == (64, 5)
    assert (model["limits"]["size_multiple"], model["limits"]["max_steps"]) == (8, 1000)
    assert model["defaults"]["sampler"] in model["samplers"]
    assert model["spacings"][:3] == ["leading", "trailing", "linspace"]
    assert model["defaults"]["spacing"] == "leading"


COUNTED = (
    "jobs_running", "jobs_waiting", "queue_size", "ready", "requests_total", "rejected_total",
    "cancelled_total", "images_total", "unet_rows", "unet_padded_rows_total", "step_seconds",
    "decode_seconds", "request_seconds", "out_of_memory_total", "non_finite_total",
    "worker_restarts_total", "device_memory_bytes", "start_seconds",
)  # fmt: skip


@pytest.mark.everywhere
def test_health_and_metrics_of_an_idle_service(server):
    for path in ("/health", "/health/live", "/health/ready"):
        answer = server.client.get(path)
        assert answer.status_code == 200
        replica = {"replica": 0, "device": "cpu", "status": "ok", "jobs": 0}
        expected = {"status": "ok", "models": ["tiny"], "jobs": 0, "capacity": QUEUE_SIZE}
        assert answer.json() == expected | {"replicas": [replica]}
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert samples
    assert all(line.startswith("ldm_") for line in samples)
    kinds = {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")}
    assert kinds >= {f"ldm_{name}" for name in COUNTED}
    assert server.metric("ldm_ready") == 1
    assert server.metric("ldm_queue_size") == QUEUE_SIZE
    wait_until(lambda: server.metric("ldm_device_memory_bytes", kind="used") > 2**20)
    total = server.metric("ldm_device_memory_bytes", kind="total")
    assert server.metric("ldm_device_memory_bytes", kind="used") < total
    parts = ("imports", "weights of UNet", "weights of Autoencoder", "to the device")
    seconds = [server.metric("ldm_start_seconds", part=part) for part in (*parts, "total")]
    assert 0 < sum(seconds[:-1]) <= seconds[-1]


@pytest.mark.everywhere
def test_a_deadline_that_passes_cancels_the_job(server):
    assert error_of(post(server, LONG | {"timeout": 0.3}), 504)["code"] == "deadline_exceeded"
    wait_for_jobs(server, 0)
    wait_for_running(server, 0)


def test_a_client_that_disconnects_frees_its_rows_within_one_step(server):
    with server.open_request(SLOW), server.open_request(SLOW) as leaver:
        wait_for_running(server, 2)
        before = server.calls(over=2)
        wait_until(lambda: server.calls(over=2) > before)
        leaver.close()
        shared, calls = server.calls(over=2), server.calls()
        wait_until(lambda: server.calls() >= calls + 5)
        # The call that was running when it left, and one more if that call ended before the news came.
        assert server.calls(over=2) <= shared + 2
        assert server.health()["jobs"] == 1
    wait_for_jobs(server, 0)


@pytest.mark.everywhere
def test_a_full_queue_answers_429_at_once_and_empties_again(server):
    with ExitStack() as clients:
        for _ in range(QUEUE_SIZE):
            clients.enter_context(server.open_request(LONG))
        wait_for_jobs(server, QUEUE_SIZE)
        for _ in range(5):
            answer = post(server, {"prompt": "p"})
            assert error_of(answer, 429)["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) > 0
        assert server.client.get("/health/ready").status_code == 200
    wait_for_jobs(server, 0)
    assert post(server, {"prompt": "p"}).status_code == 200
