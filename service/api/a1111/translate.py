"""Translation of A1111's requests to submissions."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from models.spec import ModelSpec
from service.api.a1111 import options
from service.api.a1111.answers import encoder, infotext_of, strength_of
from service.api.a1111.checks import SETTINGS, check_unsupported, ignored_warning
from service.api.a1111.controlnet import Guides, Target
from service.api.a1111.controlnet_units import ignored_fields, read_units
from service.api.a1111.masking import read_mask
from service.api.a1111.phases import hires_of, refiner_of
from service.api.a1111.resizing import resize
from service.api.a1111.samplers import SamplerChoice
from service.api.a1111.schemas import ImageToImage, Processing
from service.api.a1111.session import A1111Session
from service.errors import InvalidRequest
from service.requests import images
from service.requests.background import Submission
from service.requests.checks import require
from service.requests.defaults import coalesce
from service.requests.extras import reads_tokens
from service.requests.inpainting import MaskedImage
from service.requests.metadata import Metadata
from service.requests.resolve import TASKS_OF, build_request, find_model, resolve
from service.requests.resolved_request import Previews
from service.requests.response import Answer
from service.requests.schemas import GenerateRequest, ImageRequest, InpaintRequest

PREVIEWS = Previews(every=10, format="png")  # A1111's default
BLUR = 4  # A1111's default for masks
SEED_LIMIT = 2**32  # random seeds are smaller, as in A1111
NETWORK = re.compile(r"<(\w+):([^<>]*)>")
UNSUPPORTED_SYNTAX = {  # of prompts, for models that read a text as a whole; each would change the image
    "BREAK": re.compile(r"\bBREAK\b"),
    "AND": re.compile(r"\bAND\b"),
    "prompt editing, [from:to:when]": re.compile(r"(?<!\\)\[[^\[\]]*:\s*(\d+(\.\d*)?|\.\d+)\s*\]"),
    "alternation, [a|b]": re.compile(r"(?<!\\)\[[^\[\]|]*\|[^\[\]]*\]"),
}
WEIGHT = re.compile(r"(-?(\d+(\.\d+)?|\.\d+))")  # unambiguous: no backtracking on long texts
FILL = ("blur", "original", "noise", "empty")  # of inpainting_fill
BLANK_MASK = "The mask is empty: the whole image was processed."


def text_submission(body: Processing, choice: SamplerChoice, session: A1111Session) -> Submission:
    """The submission of txt2img. Raises InvalidRequest, and NotFound for the model."""
    spec = spec_for(body, GenerateRequest, session)
    warnings = check(body, choice, spec)
    fields = fields_of(body, choice, spec, session) | guides_of(body, spec, session).fields()
    request = build_request(GenerateRequest, fields)
    return Submission(request, previews=PREVIEWS, encode=encoder(body, choice), warnings=warnings)


def image_submission(body: ImageToImage, choice: SamplerChoice, session: A1111Session) -> Submission:
    """The submission of img2img. Slow, because it decodes images. Raises as text_submission()."""
    masked = read_masked(body, session) if body.mask else None
    blank = masked is not None and masked.mask.getbbox() is None
    if masked is not None and not (blank and coalesce(body.inpaint_full_res, True)):
        return inpaint_submission(body, masked, choice, session)
    spec = spec_for(body, GenerateRequest, session)
    warnings = (*check_unsupported(body, choice, spec), *((BLANK_MASK,) if blank else ()))
    fields = fields_of(body, choice, spec, session) | guides_of(body, spec, session).fields()
    start = read_resized(body, session) if body.resize_mode else only_image(body)
    fields |= {
        "init_image": start,
        "strength": strength_of(body),
        "image_guidance_scale": body.image_cfg_scale if spec.edits else None,
    }
    request = build_request(GenerateRequest, fields)
    return Submission(request, previews=PREVIEWS, encode=encoder(body, choice), warnings=warnings)


def inpaint_submission(
    body: ImageToImage, original: MaskedImage, choice: SamplerChoice, session: A1111Session
) -> Submission:
    """The submission of img2img with a mask. Raises as text_submission()."""
    spec = spec_for(body, InpaintRequest, session)
    warnings = check(body, choice, spec)
    width, height = size_of(body, original.image, session)
    image, mask = original.image, original.mask
    masked_area = coalesce(body.inpaint_full_res, True)
    if not masked_area:
        image, mask = (resize(each, width, height, coalesce(body.resize_mode, 0)) for each in (image, mask))
    fields = fields_of(body, choice, spec, session) | {
        "image": image,
        "width": width,
        "height": height,
        "area": "masked" if masked_area else "whole",
        "padding": coalesce(body.inpaint_full_res_padding, 0) if masked_area else None,
        "fill": FILL[coalesce(body.inpainting_fill, 0)],
        "strength": strength_of(body),
    }
    request = build_request(InpaintRequest, fields | guides_of(body, spec, session).fields())
    encode = encoder(body, choice)
    return Submission(request, previews=PREVIEWS, encode=encode, warnings=warnings, soft_mask=mask)


def unchanged_answer(body: ImageToImage, choice: SamplerChoice, session: A1111Session) -> Answer:
    """The answer of img2img at denoising strength 0: the input image, without a job. Raises as resolve()."""
    spec = spec_for(body, InpaintRequest if body.mask else GenerateRequest, session)
    warnings = check(body, choice, spec)
    fields = fields_of(body, choice, spec, session) | {"strength": 1.0}
    request: GenerateRequest | InpaintRequest
    if body.mask:
        image = read_masked(body, session).image
        if not coalesce(body.inpaint_full_res, True):
            image = read_resized(body, session)
        white = Image.new("L", image.size, 255)
        fields |= {"image": image, "mask": white, "width": None, "height": None}
        request = build_request(InpaintRequest, fields)
    else:
        image = read_resized(body, session)
        request = build_request(GenerateRequest, fields | {"init_image": image})
    supervisor = session.jobs.supervisor
    resolved = resolve(request, supervisor.specs, supervisor.settings)
    image = resize(image, resolved.width, resolved.height)
    pixels = np.asarray(image)
    texts = (infotext_of(body, choice, resolved, index) for index in range(resolved.parameters.n))
    # Without provenance: no model changed the image.
    files = [images.encode(pixels, resolved.format, Metadata(text)) for text in texts]
    resolved = resolved.without_inputs()
    return Answer(resolved, tuple(files), warnings + resolved.warnings, {}, int(time.time()))


def check(body: Processing, choice: SamplerChoice, spec: ModelSpec) -> tuple[str, ...]:
    """Warnings about ignored parts of the body and of its ControlNet units. Raises InvalidRequest."""
    ignored = ignored_warning("These fields have no effect here", ignored_fields(body.alwayson_scripts))
    return (*check_unsupported(body, choice, spec), *ignored)


def guides_of(body: Processing, spec: ModelSpec, session: A1111Session) -> Guides:
    """The ControlNet units of a request. Slow, because it decodes images. Raises InvalidRequest."""
    most = session.jobs.supervisor.settings.max_input_pixels
    units = tuple(read_units(body.alwayson_scripts, spec, most))
    size = coalesce(body.width, spec.defaults.width), coalesce(body.height, spec.defaults.height)
    if not units or not isinstance(body, ImageToImage):
        return Guides(units, Target(spec, *size, None, False))
    is_region = body.mask and coalesce(body.inpaint_full_res, True)
    image = read_first(body, session) if is_region else read_resized(body, session)
    return Guides(units, Target(spec, *image.size, image, bool(body.mask)))


def control_maps(body: Processing, answer: Answer, session: A1111Session) -> list[str]:
    """The control images of an answer with images: PNG files in base64."""
    spec = session.jobs.supervisor.specs.get(answer.resolved.parameters.model)
    return guides_of(body, spec, session).maps() if spec and answer.files else []


def read_resized(body: ImageToImage, session: A1111Session) -> Image.Image:
    """The input image, resized by resize_mode. Raises InvalidRequest."""
    image = read_first(body, session)
    return resize(image, *size_of(body, image, session), coalesce(body.resize_mode, 0))


def read_first(body: ImageToImage, session: A1111Session) -> Image.Image:
    """The input image. Raises InvalidRequest."""
    source, most = only_image(body), session.jobs.supervisor.settings.max_input_pixels
    return images.read_image(source, "init_images", most)


def only_image(body: ImageToImage) -> str:
    require([("init_images", len(body.init_images) == 1, "must contain one image")])
    return body.init_images[0]


def size_of(body: ImageToImage, image: Image.Image, session: A1111Session) -> tuple[int, int]:
    """(width, height) to generate at. Raises InvalidRequest."""
    width, height = coalesce(body.width, image.width), coalesce(body.height, image.height)
    most = session.jobs.supervisor.settings.max_pixels
    require([("width", width * height <= most, f"times height must be at most {most}")])
    return width, height


def spec_for(body: Processing, kind: type[ImageRequest], session: A1111Session) -> ModelSpec:
    """The model of a request: the named one, the selected one, or the first that supports the task."""
    name = options.read_text(body.override_settings or {}, options.CHECKPOINT, SETTINGS)
    named = session.find(name, f"{SETTINGS}.{options.CHECKPOINT}") if name else session.checkpoint
    if named and body.override_settings_restore_afterwards is False:
        session.choose(named)
    return find_model(named, session.specs, TASKS_OF[kind])


def fields_of(
    body: Processing, choice: SamplerChoice, spec: ModelSpec, session: A1111Session
) -> dict[str, Any]:
    """The fields of the native request that do not depend on its kind. Raises InvalidRequest."""
    batch, batches = coalesce(body.batch_size, 1), coalesce(body.n_iter, 1)
    n, most = batch * batches, session.jobs.supervisor.settings.max_images
    field = "n_iter" if batches > batch else "batch_size"
    require([(field, n <= most, f"is too large: batch_size * n_iter must be at most {most}")])
    kind = options.read_format(body.override_settings or {}, SETTINGS)
    return sampling_fields(body, choice, spec, n) | {
        "model": spec.name,
        "refiner": refiner_of(body, session),
        "n": n,
        "output_format": kind or options.FORMATS[session.format],
    }


def sampling_fields(body: Processing, choice: SamplerChoice, spec: ModelSpec, n: int) -> dict[str, Any]:
    """The fields of the native request that an infotext contains too. Raises InvalidRequest."""
    prompt, loras, text_weights = split_prompt(body.prompt or "")
    reads, composes = reads_tokens(spec), reads_tokens(spec) and not spec.edits
    if not composes:
        check_syntax("prompt", prompt)
        check_syntax("negative_prompt", body.negative_prompt or "", but=("AND",))  # plain text there
    if body.disable_extra_networks:
        loras, text_weights = {}, {}
    has_clip_skip = options.reads_clip_skip(spec)
    return {
        "prompt": prompt if prompt.strip() else None,
        "negative_prompt": body.negative_prompt,
        "loras": loras or None,
        "lora_text_weights": text_weights or None,
        "seed": secrets.randbelow(max(1, SEED_LIMIT - n)) if body.seed in (None, -1) else body.seed,
        "steps": body.steps,
        "hires": hires_of(body, coalesce(body.steps, spec.defaults.steps)),
        "guidance_scale": body.cfg_scale,
        "sampler": choice.sampler,
        "spacing": choice.spacing,
        "eta": choice.eta,
        "width": body.width,
        "height": body.height,
        "prompt_syntax": "a1111" if composes else None,
        "prompt_weights": True if reads and not composes else None,
        "long_prompts": "chunk" if reads and not composes else None,
        "clip_skip": options.clip_skip_of(body.override_settings or {}, SETTINGS) if has_clip_skip else None,
        "variation": variation_of(body, n),
        "decoder": options.decoder_of(body.override_settings or {}, SETTINGS),
        "tiling": "both" if body.tiling else None,
    }


def variation_of(body: Processing, n: int) -> dict[str, Any] | None:
    """The native field `variation` of subseed and subseed_strength; None without strength."""
    if not body.subseed_strength:
        return None
    drawn = secrets.randbelow(max(1, SEED_LIMIT - n))
    return {"seed": drawn if body.subseed in (None, -1) else body.subseed, "strength": body.subseed_strength}


def check_syntax(param: str, text: str, but: Collection[str] = ()) -> None:
    """Raise InvalidRequest for syntax of A1111's prompts that is not supported, except the kinds in `but`."""
    for kind, pattern in UNSUPPORTED_SYNTAX.items():
        if kind not in but and pattern.search(text):
            raise InvalidRequest(f"{param} uses {kind}, which is not supported", param=param)


def split_prompt(prompt: str) -> tuple[str, dict[str, float], dict[str, float]]:
    """(prompt without <lora:name:weight>, LoRA -> UNet weight, LoRA -> text encoder weight if it differs).

    As in A1111, a single weight is for both; the first of two is for the text encoders, and they may be named
    te= and unet=. Raises InvalidRequest for networks other than LoRAs.
    """
    loras: dict[str, float] = {}
    text_weights: dict[str, float] = {}
    for kind, rest in NETWORK.findall(prompt):
        name, *options = rest.split(":")
        text, unet = read_weights(options) if kind == "lora" and len(options) <= 2 else (None, None)
        if text is None or unet is None:
            raise InvalidRequest(
                "prompt must name extra networks as <lora:name:weight> or "
                "<lora:name:text encoder weight:unet weight>",
                param="prompt",
            )
        text_weights[name] = text_weights.get(name, 0.0) + text
        loras[name] = loras.get(name, 0.0) + unet
    different = {name: weight for name, weight in text_weights.items() if weight != loras[name]}
    return NETWORK.sub("", prompt), loras, different


def read_weights(options: list[str]) -> tuple[float | None, float | None]:
    """(text encoder weight, UNet weight) from the parts after a LoRA's name; None for an invalid number."""
    named = dict(option.split("=", 1) for option in options if "=" in option)
    positional = [option for option in options if "=" not in option]
    if named.keys() - {"te", "unet"}:
        return None, None
    first, *second = positional or [""]
    text = number_in(named.get("te", first))
    unet = named.get("unet", second[0] if second else None)
    return text, text if unet is None else number_in(unet)


def number_in(text: str) -> float | None:
    """The weight in a text: 1 if it is empty, None if it is invalid."""
    if not text:
        return 1.0
    return float(text) if WEIGHT.fullmatch(text) else None


def read_masked(body: ImageToImage, session: A1111Session) -> MaskedImage:
    """The input image and its blurred mask, resized to the image's size. Raises InvalidRequest."""
    image, most = read_first(body, session), session.jobs.supervisor.settings.max_input_pixels
    file = images.open_source(body.mask or "", "mask", most)
    mask = read_mask(
        file if file.size == image.size else file.resize(image.size, Image.Resampling.LANCZOS),
        body.inpainting_mask_invert == 1,
        (
            coalesce(body.mask_blur, coalesce(body.mask_blur_x, BLUR)),
            coalesce(body.mask_blur, coalesce(body.mask_blur_y, BLUR)),
        ),
        coalesce(body.mask_round, True),
    )
    return MaskedImage(image, mask)
