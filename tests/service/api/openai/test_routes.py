"""The OpenAI Images API with OpenAI's own Python client and the bundled models."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.helpers.clients import LONG
from tests.helpers.images import base64_of, psnr
from tests.helpers.servers import QUEUE_SIZE, Server, wait_until

PROMPT = "red apple on a blue background"
FEW_STEPS = {"seed": 1, "steps": 4}


@pytest.fixture(scope="module")
def client(bundled: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{bundled.client.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def apple(client: openai.OpenAI) -> Image.Image:
    made = client.images.generate(prompt=PROMPT, extra_body=FEW_STEPS)
    return open_base64(made.data[0].b64_json)


def open_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels_of(text: str) -> np.ndarray:
    return np.asarray(open_base64(text))


def upload_of(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "png")
    file.name = "image.png"
    file.seek(0)
    return file


def left_half_transparent(image: Image.Image, alpha: int = 0) -> Image.Image:
    """The image with this alpha in its left half."""
    mask = image.convert("RGBA")
    half = Image.new("RGBA", (image.width // 2, image.height), (255, 255, 255, alpha))
    mask.paste(half, (0, 0))
    return mask


# Generations.


@pytest.mark.everywhere
def test_generates_the_images_of_the_native_api(bundled, client):
    made = client.images.generate(
        model="emoji", prompt=PROMPT, n=2, size="128x128", quality="auto", background="auto", user="me",
        response_format="b64_json", moderation="low", output_format="png",
        extra_body=FEW_STEPS | {"guidance_scale": 2.0, "negative_prompt": "pear"},
    )  # fmt: skip
    body = FEW_STEPS | {"prompt": PROMPT, "n": 2, "guidance_scale": 2.0, "negative_prompt": "pear"}
    native = bundled.client.post("/generate", json=body).json()
    assert [image.b64_json for image in made.data] == [image["data"] for image in native["images"]]
    assert (made.size, made.output_format, made.background) == ("128x128", "png", "opaque")
    assert abs(made.created - native["created"]) < 60
    assert made.warnings == []


def test_size_and_format_are_those_of_the_file(client):
    made = client.images.generate(
        prompt=PROMPT, size="64x96", output_format="webp", extra_body={"num_inference_steps": 2, "seed": -1}
    )
    image = open_base64(made.data[0].b64_json)
    assert (image.size, image.format, made.size) == ((64, 96), "WEBP", "64x96")


def test_output_compression_is_the_quality_of_the_file(client):
    def size_at(percent: int) -> int:
        made = client.images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=percent, extra_body=FEW_STEPS
        )
        return len(made.data[0].b64_json)

    assert size_at(0) < size_at(50) < size_at(100)


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": "hd", "style": "vivid"},
        {"quality": "high", "output_compression": 100},
        {"quality": "low", "style": "natural"},
    ],
)
def test_fields_without_effect_are_named_in_warnings(client, fields):
    made = client.images.generate(prompt=PROMPT, extra_body=FEW_STEPS, **fields)
    ignored = [field for field in fields if field != "output_compression"]
    assert made.warnings == [f"{field} has no effect" for field in ignored]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "file"}, "response_format"),
        ({"quality": "best"}, "quality"),
        ({"style": "cubist"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"output_format": "gif"}, "output_format"),
        ({"size": "100x128"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "8192x8192"}, "size"),
        ({"size": "8192x8192", "model": "dall-e-3"}, "size"),
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
@pytest.mark.everywhere
def test_an_unsupported_value_is_a_400_that_names_the_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT} | fields)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert param in caught.value.message
    assert set(caught.value.body) >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("size", ["large", "0x0", "128X128", "128"])
def test_a_size_that_is_none_is_refused_with_an_example(client, size):
    with pytest.raises(openai.BadRequestError, match="size must be auto or WIDTHxHEIGHT, such as 512x512"):
        client.images.generate(prompt=PROMPT, size=size)


# Model names, and the sizes that come with them.


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2.5-flare", "my-images"])
def test_aliases_and_names_of_openai_mean_the_served_model(client, apple, model):
    made = client.images.generate(model=model, prompt=PROMPT, extra_body=FEW_STEPS)
    assert (pixels_of(made.data[0].b64_json) == np.asarray(apple)).all()
    assert client.models.retrieve(model).id == model


def test_an_edit_accepts_the_names_too(client, apple):
    made = client.images.edit(
        model="gpt-image-1", image=upload_of(apple), prompt="tomato", input_fidelity="high",
        quality="medium", extra_body=FEW_STEPS,
    )  # fmt: skip
    assert made.warnings == ["quality has no effect", "input_fidelity has no effect"]


def test_a_size_of_openai_is_generated_near_the_model_s_own_size_and_enlarged(client):
    made = client.images.generate(model="dall-e-3", prompt=PROMPT, size="1792x1024", extra_body=FEW_STEPS)
    assert made.size == "1792x1024"
    assert open_base64(made.data[0].b64_json).size == (1792, 1024)
    assert made.warnings == [
        "the image was generated at 168x96, which suits the model, and enlarged to 1792x1024"
    ]


@pytest.mark.everywhere
def test_models_are_those_that_generate_images(client):
    assert [model.id for model in client.models.list()] == ["emoji", "my-images"]
    assert client.models.retrieve("emoji").object == "model"
    for name in ("sdxl", "emoji-upscale", "dall-e-3/emoji"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model="sdxl", prompt=PROMPT)
    assert caught.value.param == "model"


# URLs.


@pytest.mark.parametrize(
    ("fields", "has_url", "has_base64"),
    [
        ({"response_format": "url"}, True, False),
        ({"response_format": "b64_json", "model": "dall-e-3"}, False, True),
        ({"model": "gpt-image-1"}, False, True),
        ({"model": "dall-e-3"}, True, True),
        ({}, True, True),
    ],
)
def test_a_response_has_what_its_client_reads(client, fields, has_url, has_base64):
    image = client.images.generate(prompt=PROMPT, extra_body=FEW_STEPS, **fields).data[0]
    assert (image.url is not None, image.b64_json is not None) == (has_url, has_base64)


@pytest.mark.everywhere
def test_a_url_serves_the_file(bundled, client, apple):
    made = client.images.generate(prompt=PROMPT, n=2, response_format="url", extra_body=FEW_STEPS)
    assert made.data[0].url.startswith(f"{bundled.client.base_url}/v1/images/files/img-")
    assert made.data[0].url != made.data[1].url
    answer = httpx.get(made.data[0].url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    # In company, rounding may differ without --invariant.
    assert psnr(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(apple)) > 50
    head = httpx.head(made.data[0].url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))
    assert httpx.get(made.data[0].url[:-5] + "0.png").status_code == 404


def test_a_url_has_the_address_that_the_client_used(bundled):
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "images.example", "X-Forwarded-Prefix": "/a"}
    body = FEW_STEPS | {"prompt": PROMPT, "response_format": "url"}
    made = bundled.client.post("/v1/images/generations", json=body, headers=headers).json()
    assert made["data"][0]["url"].startswith("https://images.example/a/v1/images/files/img-")
    assert "b64_json" not in made["data"][0]


# Edits and variations.


def test_an_edit_repaints_the_transparent_pixels_of_the_mask_alone(client, apple):
    mask = left_half_transparent(apple)
    made = client.images.edit(
        image=upload_of(apple), mask=upload_of(mask), prompt="ghost", extra_body=FEW_STEPS
    )
    before, after = np.asarray(apple), pixels_of(made.data[0].b64_json)
    assert (after[:, 64:] == before[:, 64:]).all()
    assert (after[:, :64] != before[:, :64]).any()


def test_without_a_mask_the_transparent_pixels_of_the_image_are_the_mask(client, apple):
    holed = left_half_transparent(apple)
    made = client.images.edit(image=upload_of(holed), prompt="ghost", extra_body=FEW_STEPS)
    after = pixels_of(made.data[0].b64_json)
    assert (after[:, 64:] == np.asarray(apple)[:, 64:]).all()
    assert (after[:, :64] != 255).any()


@pytest.mark.parametrize("alpha", [128, 1, 255])
def test_a_mask_without_fully_transparent_pixels_is_refused(client, apple, alpha):
    mask = left_half_transparent(apple, alpha)
    with pytest.raises(openai.BadRequestError, match="mask must have fully transparent pixels") as caught:
        client.images.edit(image=upload_of(apple), mask=upload_of(mask), prompt="ghost")
    assert caught.value.param == "mask"


def test_an_edit_without_a_mask_starts_from_the_image(client, apple):
    def edited(strength: float) -> np.ndarray:
        made = client.images.edit(
            image=[upload_of(apple)], prompt="tomato", n=1, size="auto",
            extra_body=FEW_STEPS | {"strength": strength},
        )  # fmt: skip
        return pixels_of(made.data[0].b64_json).astype(float)

    near, far = (np.abs(edited(strength) - np.asarray(apple)).mean() for strength in (0.25, 1.0))
    assert 0 < near < far


def test_several_images_are_refused(client, apple):
    with pytest.raises(openai.BadRequestError, match="image must be one file") as caught:
        client.images.edit(image=[upload_of(apple), upload_of(apple)], prompt="tomato")
    assert caught.value.param == "image"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of the client's method
def test_a_variation_starts_from_the_image(client, apple):
    made = client.images.create_variation(
        image=upload_of(apple), n=2, response_format="b64_json", extra_body=FEW_STEPS | {"strength": 0.5}
    )
    first, second = (pixels_of(image.b64_json).astype(float) for image in made.data)
    assert (first != second).any()
    assert first.shape == np.asarray(apple).shape


def test_form_fields_are_checked_like_json(client, apple):
    def refused(**fields) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"image": upload_of(apple), "prompt": "ghost"} | fields)
        return caught.value

    assert refused(image=io.BytesIO(b"no image")).param == "image"
    assert refused(size="64x64", mask=upload_of(left_half_transparent(apple))).param == "size"
    assert refused(input_fidelity="medium").param == "input_fidelity"
    assert refused(extra_body={"steps": "many"}).param == "steps"
    assert refused(extra_body={"cfg": "2"}).param == "cfg"
    small = left_half_transparent(apple.resize((64, 64)))
    assert refused(mask=upload_of(small)).param == "mask"


@pytest.mark.parametrize("field", ["image", "image[]", "mask"])
def test_text_where_a_file_belongs_is_named(bundled, apple, field):
    files = {"image": upload_of(apple), field: (None, "text"), "prompt": (None, "ghost")}
    answer = bundled.client.post("/v1/images/edits", files=files)
    name, error = field.removesuffix("[]"), answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (400, name, f"{name} must be a file")


def test_a_body_that_is_not_a_form_is_a_415(bundled, apple):
    body = {"prompt": "ghost", "image": base64_of(apple)}
    for path in ("/v1/images/edits", "/v1/images/variations"):
        answer = bundled.client.post(path, json=body)
        assert answer.status_code == 415
        assert "multipart/form-data" in answer.json()["error"]["message"]


def test_broken_and_incomplete_forms_are_refused(bundled):
    none = bundled.client.post("/v1/images/edits", files={"prompt": (None, "ghost")})
    assert (none.status_code, none.json()["error"]["message"]) == (400, "image is required")
    headers = {"content-type": "multipart/form-data"}
    broken = bundled.client.post("/v1/images/edits", content=b"no", headers=headers)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "unreadable_body")
    assert "form" in broken.json()["error"]["message"]
    large = bundled.client.post("/v1/images/edits", files={"image": bytes(2**20 + 1)}, data={"prompt": "p"})
    assert large.status_code == 413


# Streams.


@pytest.mark.everywhere
def test_a_stream_sends_partial_images(client):
    request = {"prompt": PROMPT, "extra_body": {"seed": 1, "steps": 8}}
    sent = list(client.images.generate(stream=True, partial_images=2, **request))
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [event.type for event in sent] == [partial, partial, completed]
    assert [event.partial_image_index for event in sent[:2]] == [0, 1]
    assert {(event.size, event.output_format) for event in sent} == {("128x128", "png")}
    assert {open_base64(event.b64_json).size for event in sent} == {(128, 128)}
    assert sent[-1].usage.total_tokens == 0
    assert sent[-1].b64_json == client.images.generate(**request).data[0].b64_json
    final = pixels_of(sent[-1].b64_json).astype(float)
    errors = [np.abs(pixels_of(event.b64_json) - final).mean() for event in sent]
    assert errors[0] > errors[1] > errors[2] == 0


def test_a_stream_of_an_edit_has_its_own_event_names(client, apple):
    sent = list(
        client.images.edit(
            image=upload_of(apple), mask=upload_of(left_half_transparent(apple)), prompt="ghost", stream=True,
            partial_images=1, output_format="jpeg", extra_body=FEW_STEPS,
        )
    )  # fmt: skip
    assert [event.type for event in sent] == ["image_edit.partial_image", "image_edit.completed"]
    assert {open_base64(event.b64_json).format for event in sent} == {"JPEG"}


@pytest.mark.everywhere
def test_leaving_a_stream_frees_its_place(bundled, client):
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"steps": 1000, "seed": 1}
    )
    wait_until(lambda: bundled.health()["jobs"] == 1)
    stream.close()
    wait_until(lambda: bundled.health()["jobs"] == 0)


# A full queue.


def test_the_client_retries_when_the_queue_is_full(server):
    """Without retries the client raises; with retries it waits as long as the service says."""
    url = f"{server.client.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as impatient:
        ids = [submit(server) for _ in range(QUEUE_SIZE)]
        with pytest.raises(openai.RateLimitError) as caught:
            impatient.images.generate(prompt="p")
        assert caught.value.response.headers["retry-after"] == "5"
        assert caught.value.code == "queue_full"
    retries = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1) as patient:
        patient._sleep_for_retry = lambda **retry: retries.append(retry) or cancel(server, ids)
        assert patient.images.generate(prompt="p", extra_body={"steps": 2}).data
    assert len(retries) == 1


def submit(server: Server) -> str:
    return server.client.post("/jobs", json={"task": "generate", "request": LONG}).json()["id"]


def cancel(server: Server, ids: list[str]) -> None:
    answers: list[httpx.Response] = [server.client.delete(f"/jobs/{job}") for job in ids]
    assert all(answer.status_code == 200 for answer in answers)
