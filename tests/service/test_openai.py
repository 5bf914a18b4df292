"""The OpenAI Images API, asked by OpenAI's own client, of the models in the bundled."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Iterator

import httpx
import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from service.api.openai.translate import events
from service.requests.schemas import ErrorDetail, JobStatus
from tests.helpers.clients import LONG
from tests.helpers.servers import QUEUE_SIZE, Server, wait_until

PROMPT = "red apple on a blue background"
FEW = {"seed": 1, "steps": 4}


@pytest.fixture(scope="module")
def client(bundled: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{bundled.client.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(text: str) -> np.ndarray:
    return np.asarray(opened(text))


def file_of(picture: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, "png")
    file.name = "picture.png"
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def apple(client: openai.OpenAI) -> Image.Image:
    made = client.images.generate(prompt=PROMPT, extra_body=FEW)
    return opened(made.data[0].b64_json)


def hole(size: tuple[int, int], alpha: int = 0) -> Image.Image:
    """A mask that is transparent in its left half."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((255, 255, 255, alpha), (0, 0, size[0] // 2, size[1]))
    return mask


def test_generate_makes_what_the_native_api_makes(bundled, client):
    made = client.images.generate(
        model="emoji", prompt=PROMPT, n=2, size="128x128", quality="auto", background="auto", user="me",
        response_format="b64_json", moderation="low", output_format="png",
        extra_body=FEW | {"guidance_scale": 2.0, "negative_prompt": "pear"},
    )  # fmt: skip
    native = bundled.client.post(
        "/generate", json=FEW | {"prompt": PROMPT, "n": 2, "guidance_scale": 2.0, "negative_prompt": "pear"}
    ).json()
    assert [image.b64_json for image in made.data] == [image["data"] for image in native["images"]]
    assert (made.size, made.output_format, made.background) == ("128x128", "png", "opaque")
    assert abs(made.created - native["created"]) < 60


def test_size_and_format_are_the_pictures(client):
    made = client.images.generate(
        prompt=PROMPT, size="64x96", output_format="webp", extra_body={"num_inference_steps": 2}
    )
    picture = opened(made.data[0].b64_json)
    assert (picture.size, picture.format, made.size) == ((64, 96), "WEBP", "64x96")


def test_an_edit_repaints_what_is_transparent_in_the_mask_and_nothing_else(client, apple):
    made = client.images.edit(
        image=file_of(apple), mask=file_of(hole(apple.size)), prompt="ghost", extra_body=FEW
    )
    before, after = np.asarray(apple), pixels(made.data[0].b64_json)
    assert (after[:, 64:] == before[:, 64:]).all()
    assert (after[:, :64] != before[:, :64]).any()
    with pytest.raises(openai.BadRequestError, match="is empty"):  # half transparent is not transparent
        client.images.edit(image=file_of(apple), mask=file_of(hole(apple.size, 128)), prompt="ghost")
    with pytest.raises(openai.BadRequestError, match="no alpha"):
        client.images.edit(image=file_of(apple), mask=file_of(apple), prompt="ghost")


def test_an_edit_without_a_mask_starts_from_the_picture(client, apple):
    def edited(strength: float) -> np.ndarray:
        made = client.images.edit(
            image=[file_of(apple)], prompt="tomato", n=1, size="auto", extra_body=FEW | {"strength": strength}
        )
        return pixels(made.data[0].b64_json).astype(float)

    near, far = (np.abs(edited(strength) - np.asarray(apple)).mean() for strength in (0.25, 1.0))
    assert 0 < near < far


def test_several_pictures_are_refused(client, apple):
    with pytest.raises(openai.BadRequestError, match="one picture") as caught:
        client.images.edit(image=[file_of(apple), file_of(apple)], prompt="tomato")
    assert caught.value.param == "image"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client says so of variations
def test_a_variation_is_a_run_from_the_picture(client, apple):
    made = client.images.create_variation(
        image=file_of(apple), n=2, response_format="b64_json", extra_body=FEW | {"strength": 0.5}
    )
    first, second = (pixels(image.b64_json).astype(float) for image in made.data)
    assert (first != second).any()
    assert first.shape == np.asarray(apple).shape


def test_a_stream_shows_pictures_on_the_way(client):
    asked = {"prompt": PROMPT, "extra_body": {"seed": 1, "steps": 8}}
    told = list(client.images.generate(stream=True, partial_images=2, **asked))
    assert [event.type for event in told] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in told[:2]] == [0, 1]
    assert {(event.size, event.output_format) for event in told} == {("128x128", "png")}
    assert {opened(event.b64_json).size for event in told} == {(128, 128)}
    assert told[-1].usage.total_tokens == 0
    assert told[-1].b64_json == client.images.generate(**asked).data[0].b64_json
    errors = [np.abs(pixels(e.b64_json) - pixels(told[-1].b64_json).astype(float)).mean() for e in told]
    assert errors[0] > errors[1] > errors[2] == 0


def test_a_stream_of_an_edit_has_events_of_its_own(client, apple):
    told = list(
        client.images.edit(
            image=file_of(apple), mask=file_of(hole(apple.size)), prompt="ghost", stream=True,
            partial_images=1, output_format="jpeg", extra_body=FEW,
        )
    )  # fmt: skip
    assert [event.type for event in told] == ["image_edit.partial_image", "image_edit.completed"]
    assert {opened(event.b64_json).format for event in told} == {"JPEG"}


def test_leaving_a_stream_frees_its_place(bundled, client):
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"steps": 1000, "seed": 1}
    )
    wait_until(lambda: bundled.health()["jobs"] == 1)
    stream.close()
    wait_until(lambda: bundled.health()["jobs"] == 0)


class Failed:
    """A job that has failed, for whoever watches it."""

    error = ErrorDetail(
        type="server_error", message="it broke", param=None, code="job_failed", request_id="r"
    )

    async def events(self) -> AsyncIterator[tuple[str, JobStatus]]:
        told = {"id": "i", "task": "generate", "created": 0, "step": 0, "steps": 0}
        none = dict.fromkeys(("position", "estimate", "result"))
        yield "failed", JobStatus(status="failed", error=self.error, **told, **none)


def test_what_goes_wrong_in_a_stream_is_raised():
    async def told() -> str:
        return "".join([event async for event in events(Failed(), "image_generation", 0)])

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, text=asyncio.run(told()), headers={"content-type": "text/event-stream"})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=transport)
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.images.generate(prompt=PROMPT, stream=True))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"size": "100x128"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "8192x8192"}, "size"),
        ({"n": 1000}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"prompt": " "}, "prompt"),
        ({"model": "emoji-upscale"}, "model"),
        ({"extra_body": {"steps": 2, "num_inference_steps": 3}}, "num_inference_steps"),
        ({"extra_body": {"steps": "many"}}, "steps"),
        ({"extra_body": {"cfg": 2}}, "cfg"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(client, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT} | asked)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert param in caught.value.message
    assert set(caught.value.body) >= {"message", "type", "param", "code"}


def test_forms_are_checked_like_json(bundled, client, apple):
    def refused(**asked) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"image": file_of(apple), "prompt": "ghost"} | asked)
        return caught.value

    assert refused(image=io.BytesIO(b"no picture")).param == "image"
    assert refused(size="64x64", mask=file_of(hole(apple.size))).param == "size"
    assert refused(input_fidelity="high").param == "input_fidelity"
    assert refused(extra_body={"steps": "many"}).param == "steps"
    assert refused(extra_body={"cfg": "2"}).param == "cfg"
    assert refused(mask=file_of(hole((64, 64)))).param == "mask"
    none = bundled.client.post("/v1/images/edits", data={"prompt": "ghost"})
    assert (none.status_code, none.json()["error"]["param"]) == (400, "image")
    broken = bundled.client.post(
        "/v1/images/edits", content=b"no", headers={"content-type": "multipart/form-data"}
    )
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "unreadable_body")
    assert "form" in broken.json()["error"]["message"]
    text = bundled.client.post("/v1/images/edits", files={"image": (None, "text"), "prompt": (None, "p")})
    assert (text.status_code, text.json()["error"]["param"].split(".")[0]) == (400, "image")
    large = bundled.client.post(
        "/v1/images/edits", files={"image": bytes(2**20 + 1)}, data={"prompt": "ghost"}
    )
    assert large.status_code == 413


def test_models_are_those_that_make_pictures(client):
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").object == "model"
    for ask in (lambda: client.models.retrieve("dall-e-3"), lambda: generate_with(client, "dall-e-3")):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.param == "model"


def generate_with(client: openai.OpenAI, model: str) -> None:
    client.images.generate(model=model, prompt=PROMPT)


def test_a_full_queue_is_tried_again_by_the_client(server):
    """Without retries the client raises; with them it waits as told, and gets its picture."""
    url = f"{server.client.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as hasty:
        ids = [submit(server) for _ in range(QUEUE_SIZE)]
        with pytest.raises(openai.RateLimitError) as caught:
            hasty.images.generate(prompt="p")
        assert caught.value.response.headers["retry-after"] == "5"
        assert caught.value.code == "queue_full"
    seen = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1) as patient:
        patient._sleep_for_retry = lambda **told: seen.append(told) or cancel(server, ids)
        assert patient.images.generate(prompt="p", extra_body={"steps": 2}).data
    assert len(seen) == 1


def submit(server: Server) -> str:
    return server.client.post("/jobs", json={"task": "generate", "request": LONG}).json()["id"]


def cancel(server: Server, ids: list[str]) -> None:
    answers: list[httpx.Response] = [server.client.delete(f"/jobs/{job}") for job in ids]
    assert all(answer.status_code == 200 for answer in answers)
