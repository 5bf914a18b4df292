"""Translation of OpenAI's request bodies to native requests, and of answers to OpenAI's responses."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageOps

from models.sampling.samplers import unet_calls
from models.spec import ModelSpec
from service.api.openai.model_names import GPT_IMAGE_NAME, find_served_name
from service.api.openai.schemas import (
    Image,
    ImageEdit,
    ImageGeneration,
    ImagesResponse,
    ImageVariation,
    OpenAIRequest,
    PromptedRequest,
)
from service.errors import InvalidRequest
from service.requests import images
from service.requests.background import Submission
from service.requests.checks import check_format, require
from service.requests.defaults import coalesce
from service.requests.resolve import DEFAULT_STRENGTH, TASKS_OF, build_request, find_model
from service.requests.resolved_request import NO_PREVIEWS, Previews
from service.requests.response import Answer, Result, metadata_of
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Encoder:
    """Makes the file of an image. size: to enlarge the image to, or None; quality: of JPEG and WebP."""

    size: Size | None = None
    quality: int | None = None

    def __call__(self, result: Result, index: int) -> bytes:
        pixels = result.pixels(index)
        if self.size:
            image = ImageOps.fit(PIL.Image.fromarray(pixels), self.size, PIL.Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
        return images.encode(pixels, result.resolved.format, metadata_of(result, index), self.quality)


@dataclass(frozen=True)
class Translator:
    """Translates request bodies, given the served models."""

    specs: Mapping[str, ModelSpec]
    aliases: Mapping[str, str]
    settings: Settings

    def generation(self, body: ImageGeneration) -> Submission:
        """Text to image."""
        return self._submission(body, GenerateRequest, "text-to-image", {})

    def edit(self, body: ImageEdit) -> Submission:
        """Inpainting with a mask or a partly transparent image; otherwise image to image. Decodes images."""
        uploads = [*body.image, *body.images]
        require(
            (
                ("image", bool(uploads), "is required"),
                ("image", len(uploads) == 1, "must be one file: this service edits one image at a time"),
            )
        )
        image = images.decode(uploads[0].file.read(), "image", self.settings.max_input_pixels)
        if body.mask is None:
            hole = transparent_pixels(image)
            mask = hole if hole is not None and hole.getbbox() else None
        else:
            mask = self._mask(body.mask.file.read())
        fields: dict[str, Any] = {"strength": body.strength}
        if mask is None:
            return self._submission(body, GenerateRequest, "image-to-image", fields | {"init_image": image})
        return self._submission(body, InpaintRequest, "inpainting", fields | {"image": image, "mask": mask})

    def variation(self, body: ImageVariation) -> Submission:
        """Image to image without a prompt."""
        fields = {"strength": body.strength, "init_image": body.image.file.read()}
        return self._submission(body, GenerateRequest, "image-to-image", fields)

    def _mask(self, file: bytes) -> PIL.Image.Image:
        """A mask that is white where the file is fully transparent. Raises InvalidRequest."""
        mask = transparent_pixels(images.decode(file, "mask", self.settings.max_input_pixels))
        if mask is None or not mask.getbbox():
            has = "has no transparency" if mask is None else "has only opaque or partly transparent pixels"
            expected = f"must have fully transparent pixels, which mark the pixels to repaint; it {has}"
            raise InvalidRequest(f"mask {expected}", param="mask")
        return mask

    def _submission(
        self,
        body: OpenAIRequest,
        kind: type[GenerateRequest] | type[InpaintRequest],
        task: str,
        fields: Mapping[str, Any],
    ) -> Submission:
        check_combinations(body)
        model = find_served_name(body.model, task, self.specs, self.aliases)
        spec = find_model(model, self.specs, TASKS_OF[kind])
        size, enlarged = requested_size(body), None
        if size and kind is GenerateRequest and body.model not in (None, "", model):
            canvas = canvas_of(size, spec)
            if canvas != size:
                check_enlarged(size, body, self.settings)
                size, enlarged = canvas, size
        request = build_request(
            kind,
            {
                **fields,
                "model": model,
                "prompt": body.prompt if isinstance(body, PromptedRequest) else None,
                "negative_prompt": body.negative_prompt,
                "width": size and size[0],
                "height": size and size[1],
                "n": body.n,
                "seed": None if body.seed == -1 else body.seed,
                "steps": coalesce(body.steps, body.num_inference_steps),
                "guidance_scale": body.guidance_scale,
                "sampler": body.sampler,
                "output_format": body.output_format if isinstance(body, PromptedRequest) else None,
            },
        )
        if not isinstance(body, PromptedRequest):
            return Submission(request, encode=Encoder(enlarged))
        quality = None if body.output_compression is None else max(1, body.output_compression)
        previews = previews_of(request, spec, body.partial_images) if body.partial_images else NO_PREVIEWS
        return Submission(request, previews=previews, encode=Encoder(enlarged, quality))


def transparent_pixels(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """White where the image is fully transparent, black elsewhere; None for an image without transparency."""
    if not image.has_transparency_data:
        return None
    return image.convert("RGBA").getchannel("A").point([255] + [0] * 255)


def check_combinations(body: OpenAIRequest) -> None:
    """Raise InvalidRequest for fields that contradict each other."""
    steps_agree = body.steps is None or body.num_inference_steps in (None, body.steps)
    require([("num_inference_steps", steps_agree, "must agree with steps")])
    if not isinstance(body, PromptedRequest):
        return
    lossy = body.output_format in ("jpeg", "webp") or body.output_compression in (None, 100)
    require(
        (
            ("n", not body.stream or body.n in (None, 1), "must be 1 with stream"),
            ("partial_images", bool(body.stream) or not body.partial_images, "requires stream"),
            ("output_compression", lossy, "must be 100 unless output_format is jpeg or webp"),
        )
    )


def requested_size(body: OpenAIRequest) -> Size | None:
    """(width, height) of `size`; None for the model's default."""
    if body.size is None or body.size == "auto":
        return None
    width, height = body.size.split("x")
    return int(width), int(height)


def canvas_of(size: Size, spec: ModelSpec) -> Size:
    """The size to generate at for clients whose sizes are those of OpenAI's models.

    It is `size` where that has no more pixels than the model's default size; otherwise about as many pixels
    as the default, in nearly the same proportions.
    """
    scale = math.sqrt(spec.defaults.width * spec.defaults.height / (size[0] * size[1]))
    if scale >= 1:
        return size
    width, height = (max(1, round(side * scale / spec.size_multiple)) * spec.size_multiple for side in size)
    return width, height


def check_enlarged(size: Size, body: OpenAIRequest, settings: Settings) -> None:
    """Raise InvalidRequest for a size that an image cannot be enlarged to."""
    limit = settings.max_input_pixels
    require([("size", size[0] * size[1] <= limit, f"must have at most {limit} pixels")])
    kind = body.output_format if isinstance(body, PromptedRequest) else None
    check_format(*size, kind or "png", "output_format")


def previews_of(request: GenerateRequest | InpaintRequest, spec: ModelSpec, partial_images: int) -> Previews:
    """Previews of decoded images, spread evenly over the UNet calls."""
    from_image = isinstance(request, GenerateRequest) and request.init_image is not None
    share = coalesce(request.strength, DEFAULT_STRENGTH if from_image else 1.0)
    sampler = coalesce(request.sampler, spec.defaults.sampler)
    calls = unet_calls(sampler, coalesce(request.steps, spec.defaults.steps)) * share
    every = max(1, int(calls / (partial_images + 1)))
    return Previews(every, decoded=True, format=request.output_format or "png")


def to_response(body: OpenAIRequest, answer: Answer, url_of: Callable[[bytes], str]) -> ImagesResponse:
    """The response of all three calls. url_of: keeps a file and returns its address."""
    base64_alone = bool(body.model and GPT_IMAGE_NAME.fullmatch(body.model))
    default = "b64_json" if base64_alone else None
    choice = body.response_format or default
    return ImagesResponse(
        created=answer.created,
        data=[
            Image(
                b64_json=None if choice == "url" else base64.b64encode(file).decode(),
                url=None if choice == "b64_json" else url_of(file),
            )
            for file in answer.files
        ],
        output_format=answer.resolved.format,
        size="{}x{}".format(*size_of(answer.files[0])),
        warnings=warnings_of(body, answer),
    )


def size_of(file: bytes) -> Size:
    """(width, height) of an image file, from its header."""
    with PIL.Image.open(io.BytesIO(file)) as image:
        return image.size


def warnings_of(body: OpenAIRequest, answer: Answer) -> list[str]:
    """The job's warnings, and one for each field that a latent diffusion model cannot follow."""
    usual = {"quality": ("auto", "standard"), "style": (), "input_fidelity": ()}
    ignored = [
        f"{field} has no effect"
        for field, values in usual.items()
        if getattr(body, field, None) not in (None, *values)
    ]
    size, generated = size_of(answer.files[0]), (answer.resolved.width, answer.resolved.height)
    if size != generated:
        text = "the image was generated at {}x{}, which suits the model, and enlarged to {}x{}"
        ignored.append(text.format(*generated, *size))
    return [*answer.warnings, *ignored]
