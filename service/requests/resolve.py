"""From a wire body and the model's spec to an order, or to an error that names the field."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import ValidationError

from models.conditioning import prompts
from models.sampling.samplers import SAMPLERS, SPACED, WITH_ETA, most_steps
from models.spec import ALL_TASKS, ModelSpec
from models.tiles import Tiles, cut
from service.engine.job import MAX_SEED, Job
from service.errors import InvalidRequest, NotFound, UnreadableBody, UnsupportedMedia
from service.requests import images, labels
from service.requests.images import Format
from service.requests.schemas import (
    Box,
    GenerateRequest,
    InpaintRequest,
    PictureRequest,
    SceneRequest,
    UpscaleRequest,
)
from service.settings import Settings

Wanted = TypeVar("Wanted", bound=PictureRequest)

STRENGTH = 0.75  # of a run from a picture that names none
RESIZED = "init_image is {}x{} and was resized to {}x{}, the nearest that the model takes"

CONDITIONS = {  # field -> the task that takes it
    "class_label": "class-to-image",
    "boxes": "layout-to-image",
    "segmentation": "layout-to-image",
}
TOO_MUCH = "asks for too much: n * steps * width * height is {}, and must be at most {}"
NO_PROMPT = "is for models that read one; this one does not"
SHOWN = 64  # characters of a client's own words that an error repeats

TASKS = ("generate", "inpaint", "upscale")
DOES = {  # one of which a model must do for a request to be its
    GenerateRequest: tuple(task for task in ALL_TASKS if task not in ("inpainting", "upscaling")),
    InpaintRequest: ("inpainting",),
    UpscaleRequest: ("upscaling",),
}
NO_TASK = ("union_tag_invalid", "union_tag_not_found")
WORDING = {
    **dict.fromkeys(NO_TASK, f"must be one of {', '.join(TASKS)}"),
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_unicode": "must be text that UTF-8 can hold",
    "int_parsing_size": "is too large",
    "none_required": "is not supported here",
}


PHRASES = {"Value error, ": "", "Input should be ": "must be ", "String should have ": "must have "}


@dataclass(frozen=True)
class Order:
    """A job, and what its pictures are for the client: width x height of the canvas that the job paints.

    An enlarged canvas comes in tiles, and is `scale` times as large as what it was made of once it is done.
    """

    job: Job
    width: int
    height: int
    format: Format
    warnings: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()  # as they were asked for
    tiles: Tiles | None = None
    scale: int = 1
    preview_format: Format = "jpeg"

    def without_pictures(self) -> Order:
        """What is left to keep once the job has them."""
        return replace(self, job=replace(self.job, image=b"", mask=b"", regions=b""))


def to_order(body: PictureRequest, specs: Mapping[str, ModelSpec], settings: Settings) -> Order:
    """What a body asks for; decodes its pictures, which takes a while.

    Raises NotFound for the model, InvalidRequest for the rest.
    """
    tasks = DOES[type(body)]
    spec = find_model(body.model, specs, tasks)
    check_task(spec, tasks)
    if isinstance(body, SceneRequest):
        check_conditions(body, spec)
    order = draft(body, spec, settings)
    if isinstance(body, SceneRequest):
        order = replace(order, job=placed(body, spec, order, settings), boxes=tuple(body.boxes or ()))
    check_task(spec, (order.job.task,))
    if body.guidance_scale is None and not is_guided(order.job, spec):  # the same picture, in half the rows
        order = replace(order, job=replace(order.job, guidance_scale=1.0))
    return with_format(order, order.format)


def is_guided(job: Job, spec: ModelSpec) -> bool:
    """Whether anything makes the two predictions that guidance compares differ."""
    placed = job.regions or job.boxes or job.class_label is not None
    zeros = spec.zero_null and not job.negative_prompt
    return bool(placed or zeros or job.prompt != job.negative_prompt)


def with_format(order: Order, kind: Format, param: str = "output_format") -> Order:
    """The order in another format. Raises InvalidRequest, naming `param`, where it is too large."""
    largest, most = max(order.width, order.height), images.MOST_SIDE.get(kind)
    fits = most is None or largest <= most
    refuse([(param, fits, f"must be one for sides of {largest} pixels; {kind} ends at {most}")])
    return replace(order, format=kind)


def check_task(spec: ModelSpec, tasks: Collection[str]) -> None:
    """Raise InvalidRequest for a model that does none of them."""
    does = ", ".join(spec.tasks)
    able = not {*tasks}.isdisjoint(spec.tasks)
    refuse([("model", able, f"must be one for {next(iter(tasks))}; this one is for {does}")])


def check_conditions(body: SceneRequest, spec: ModelSpec) -> None:
    """Raise InvalidRequest for conditions that the model does not take, or that exclude each other."""
    told = [name for name in CONDITIONS if getattr(body, name) is not None]
    for name in told:
        task, does, inputs = CONDITIONS[name], ", ".join(spec.tasks), " or ".join(spec.inputs)
        refuse([(name, task in spec.tasks, f"is for {task}; this model is for {does}")])
        refuse([(name, name in spec.inputs, f"tells this model nothing; it takes {inputs}")])
    worded = "class_label" in told and bool(body.prompt)
    generate = isinstance(body, GenerateRequest)
    unworded = generate and body.prompt is None and body.init_image is None and spec.reads_prompts
    untold = not told and bool(spec.inputs) and (unworded or not spec.reads_prompts)
    needed = spec.inputs[0] if spec.inputs else "prompt"
    refuse(
        (
            ("prompt", spec.reads_prompts or not body.prompt, NO_PROMPT),
            ("class_label", not worded, "must not come with a prompt, which says the same"),
            ("segmentation", len({"boxes", "segmentation"} & {*told}) < 2, "must not come with boxes"),
            (needed, not untold or "unconditional" in spec.tasks, "is required"),
        )
    )


def label_of(body: PictureRequest, spec: ModelSpec) -> int | None:
    """The number of the class, if one is asked for. Raises InvalidRequest for one that there is not."""
    label = body.class_label if isinstance(body, SceneRequest) else None
    return None if label is None else labels.number_of(label, spec, "class_label")


def placed(body: SceneRequest, spec: ModelSpec, order: Order, settings: Settings) -> Job:
    """The job, told what goes where: also in words, where it has none. Raises InvalidRequest.

    Boxes and colours are of the client's picture; the rest of a larger canvas has no label.
    """
    if body.boxes is not None and not spec.layout_channels:
        return replace(order.job, boxes=labels.as_objects(body.boxes, spec))
    cell = spec.label_cell
    shown, whole = (
        (-(-height // cell), -(-width // cell))
        for height, width in ((order.height, order.width), (order.job.height, order.job.width))
    )
    if body.boxes is not None:
        regions = labels.from_boxes(body.boxes, spec, *shown)
    elif body.segmentation is not None:
        picture = images.read_picture(body.segmentation, "segmentation", settings.max_input_pixels)
        fits = not spec.labels_pixels or picture.size == (order.width, order.height)
        expected = f"must have the size of the picture to make, {order.width}x{order.height}"
        refuse([("segmentation", fits, expected)])
        regions = labels.from_colours(picture, spec, *shown, "segmentation")
    else:
        return order.job
    margins = [(0, all_of - part) for all_of, part in zip(whole, shown, strict=True)]
    prompt = order.job.prompt or (labels.words(regions, spec) if spec.reads_prompts else "")
    return replace(order.job, prompt=prompt, regions=np.pad(regions, margins).tobytes())


def draft(body: PictureRequest, spec: ModelSpec, settings: Settings) -> Order:
    """By where the run starts."""
    if isinstance(body, UpscaleRequest):
        return from_small(body, spec, settings)
    if isinstance(body, InpaintRequest):
        return from_masked(body, spec, settings)
    if body.init_image is not None:
        return from_picture(body, spec, settings)
    return from_noise(body, spec, settings)


def from_noise(body: GenerateRequest, spec: ModelSpec, settings: Settings) -> Order:
    """A run from noise alone."""
    if body.strength is not None:
        raise InvalidRequest("strength is for runs from a picture; expected init_image too", param="strength")
    width, height = given(body.width, spec.defaults.width), given(body.height, spec.defaults.height)
    job = to_job(body, spec, width, height)
    check(job, spec, settings)
    return Order(job, width, height, format_of(body))


def from_picture(body: GenerateRequest, spec: ModelSpec, settings: Settings) -> Order:
    """A run from init_image, resized to the size asked for or else to the nearest that the model takes."""
    picture = images.read_picture(body.init_image, "init_image", settings.max_input_pixels)
    width, height = fitting(picture.size, body, spec.size_multiple)
    job = to_job(body, spec, width, height, given(body.strength, STRENGTH))
    check(job, spec, settings, "init_image" if body.width is None and body.height is None else "width")
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    asked = (given(body.width, picture.width), given(body.height, picture.height))
    warnings = () if asked == (width, height) else (RESIZED.format(*picture.size, width, height),)
    return Order(replace(job, image=resized.tobytes()), width, height, format_of(body), warnings)


def fitting(size: tuple[int, int], body: GenerateRequest, multiple: int) -> tuple[int, int]:
    """(width, height) of a run from a picture of `size`; one that is not asked for keeps the proportions."""

    def nearest(side: float) -> int:
        return max(1, round(side / multiple)) * multiple

    width, height = size
    return (
        given(body.width, nearest(width * given(body.height, height) / height)),
        given(body.height, nearest(height * given(body.width, width) / width)),
    )


def from_masked(body: InpaintRequest, spec: ModelSpec, settings: Settings) -> Order:
    """A run that paints the white of a mask anew, on a canvas grown to the next size that the model takes."""
    picture = images.read_picture(body.image, "image", settings.max_input_pixels)
    mask = images.read_mask(body.mask, "mask", settings.max_input_pixels)
    check_mask(body, picture, mask)
    width, height = (-(-side // spec.size_multiple) * spec.size_multiple for side in picture.size)
    job = to_job(body, spec, width, height, given(body.strength, 1.0))
    check(job, spec, settings, "image")
    canvas = {"image": images.grow(picture, width, height), "mask": images.grow(mask, width, height)}
    return Order(replace(job, **canvas), *picture.size, format_of(body))


def from_small(body: UpscaleRequest, spec: ModelSpec, settings: Settings) -> Order:
    """A run that enlarges a picture, on a canvas grown to the next size that the UNet takes, by tiles."""
    picture = images.read_picture(body.image, "image", settings.max_input_pixels)
    scale, multiple = spec.autoencoder.factor, spec.unet.factor
    w, h = (-(-side // multiple) * multiple for side in picture.size)
    job = to_job(body, spec, scale * w, scale * h)
    job = replace(job, scale=scale, noise_level=given(body.noise_level, spec.defaults.noise_level))
    asked, most = given(body.scale, scale), spec.upscaling.max_noise_level
    check(job, spec, settings, "image")
    rules = (
        ("scale", asked <= scale, f"must be at most {scale} for this model"),
        ("noise_level", job.noise_level <= most, f"must be at most {most} for this model"),
    )
    refuse(rules)
    size = asked * picture.width, asked * picture.height
    job = replace(job, image=images.grow(picture, w, h))
    return Order(job, *size, format_of(body), tiles=cut(h, w, spec.tile), scale=asked)


def check_mask(body: InpaintRequest, picture: Image.Image, mask: Image.Image) -> None:
    """Raise InvalidRequest for a mask that does not fit, or for a size that is not the picture's."""
    width, height = picture.size
    rules = (
        ("mask", mask.size == picture.size, f"must have the size of image, {width}x{height}"),
        ("mask", mask.getbbox() is not None, "must be white where to paint anew; it is nowhere"),
        ("width", body.width in (None, width), f"must be the width of image, {width}"),
        ("height", body.height in (None, height), f"must be the height of image, {height}"),
    )
    refuse(rules)


def format_of(body: PictureRequest) -> Format:
    return body.output_format or "png"


def to_job(body: PictureRequest, spec: ModelSpec, width: int, height: int, strength: float = 1.0) -> Job:
    """The job of a body, without its pictures and what goes where."""
    defaults, label = spec.defaults, label_of(body, spec)
    sampler = given(body.sampler, defaults.sampler)
    name = spec.labels[label] if label is not None and spec.reads_prompts else None
    name = prompts.escape(name) if name and body.prompt_weights else name
    return Job(
        id=uuid.uuid4().hex,
        model=spec.name,
        prompt=name or body.prompt or "",
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        steps=given(body.steps, defaults.steps),
        guidance_scale=given(body.guidance_scale, defaults.guidance_scale),
        seed=given(body.seed, secrets.randbelow(MAX_SEED - body.n)),
        n=body.n,
        sampler=sampler,
        eta=given(body.eta, defaults.eta),
        priority=body.priority,
        strength=strength,
        class_label=label,
        long_prompts=body.long_prompts,
        prompt_weights=body.prompt_weights,
        spacing=given(body.spacing, None if sampler in SPACED else spec.schedule.spacing),
        loras=loras_of(body, spec),
    )


def loras_of(body: PictureRequest, spec: ModelSpec) -> tuple[tuple[str, float], ...]:
    """Names and weights, sorted, without those that change nothing. Raises InvalidRequest."""
    for name in body.loras:
        shown = name.encode("utf-8", "replace").decode()[:SHOWN]
        known = ", ".join(spec.loras) or "there are none"
        refuse([("loras", name in spec.loras, f"names {shown!r}; expected some of this model's: {known}")])
    return tuple(sorted((name, weight) for name, weight in body.loras.items() if weight))


def given(value: Any, default: Any) -> Any:
    """The value, unless it is None: 0 is a value."""
    return default if value is None else value


def find_model(name: str | None, specs: Mapping[str, ModelSpec], tasks: Collection[str]) -> ModelSpec:
    """Looked up, and nothing else: a name never becomes a path. No name: the first that does a task."""
    able = [key for key, spec in specs.items() if not {*tasks}.isdisjoint(spec.tasks)]
    name = given(name, next(iter(able), next(iter(specs))))
    if name not in specs:
        raise NotFound(f"model: there is no such model; expected one of {', '.join(specs)}", param="model")
    return specs[name]


def check(job: Job, spec: ModelSpec, settings: Settings, sized_by: str = "width") -> None:
    """Raise InvalidRequest for the first thing that this model or this service cannot do.

    sized_by: the field that is to blame for the size.
    """
    multiple, samplers = spec.size_multiple, ", ".join(SAMPLERS)
    timesteps = most_steps(job.sampler, spec.schedule.timesteps)
    pixels, most = job.width * job.height, settings.max_work
    work = job.n * job.steps * pixels
    largest = settings.max_input_pixels if job.scale else settings.max_pixels
    rules = (
        ("width", job.width % multiple == 0, f"must be a multiple of {multiple}"),
        ("height", job.height % multiple == 0, f"must be a multiple of {multiple}"),
        (sized_by, pixels <= largest, too_large(job, sized_by, largest)),
        ("steps", job.steps <= timesteps, f"must be at most {timesteps}"),
        ("n", job.n <= settings.max_images, f"must be at most {settings.max_images}"),
        (dearest(job, spec, sized_by), work <= most, TOO_MUCH.format(work, most)),
        ("sampler", job.sampler in SAMPLERS, f"must be one of {samplers}"),
        ("eta", not job.eta or job.sampler in WITH_ETA, f"is for the sampler {', '.join(WITH_ETA)}"),
        ("spacing", not job.spacing or job.sampler not in SPACED, f"is not for {' and '.join(SPACED)}"),
        ("prompt", spec.reads_prompts or not job.prompt, NO_PROMPT),
        ("negative_prompt", spec.reads_prompts or not job.negative_prompt, "is for models that read prompts"),
        ("guidance_scale", spec.guided or job.guidance_scale == 1.0, "must be 1: nothing guides this model"),
        ("seed", job.seed + job.n - 1 <= MAX_SEED, f"plus n must be at most {MAX_SEED + 1}"),
    )
    refuse(rules)
    check_reading(job, spec)


def check_reading(job: Job, spec: ModelSpec) -> None:
    """Raise InvalidRequest for weights and chunks where there can be none."""
    by_token = spec.reads_prompts and spec.context_shape[0] > 1
    expected = "is for models that are told every word of a prompt"
    rules = [
        ("prompt_weights", by_token or not job.prompt_weights, expected),
        ("long_prompts", by_token or job.long_prompts == "cut", expected),
    ]
    if job.prompt_weights:
        most = prompts.MOST_WEIGHT
        for name, text in (("prompt", job.prompt), ("negative_prompt", job.negative_prompt)):
            light = all(abs(piece.weight) <= most for piece in prompts.parse(text))
            rules.append((name, light, f"must have weights from {-most:g} to {most:g}"))
    refuse(rules)


def dearest(job: Job, spec: ModelSpec, sized_by: str) -> str:
    """The field that makes a job cost most, measured by what the model does unasked."""
    usual = spec.defaults
    times = {
        "n": job.n,
        "steps": job.steps / usual.steps,
        sized_by: job.width * job.height / (usual.width * usual.height),
    }
    return max(times, key=times.get)


def too_large(job: Job, sized_by: str, most: int) -> str:
    if sized_by == "width":
        return f"times height must be at most {most}"
    return f"would be made at {job.width}x{job.height}; width times height must be at most {most}"


def refuse(rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise InvalidRequest for the first rule (field, whether it holds, what is expected) that is broken."""
    for param, holds, expected in rules:
        if not holds:
            raise InvalidRequest(f"{param} {expected}", param=param)


def request_of(kind: type[Wanted], asked: Mapping[str, Any]) -> Wanted:
    """The request of those values that are not None. Raises InvalidRequest as the native API does."""
    try:
        return kind.model_validate({name: value for name, value in asked.items() if value is not None})
    except ValidationError as error:
        raise explain(error.errors()) from None


def explain(errors: Sequence[Mapping[str, Any]], content_type: str = "application/json") -> InvalidRequest:
    """The first of pydantic's errors as ours; never repeats values, which may be anything."""
    error = errors[0]
    path = path_of(error)
    if error["type"] == "json_invalid":
        return UnreadableBody()
    if not path:
        return UnreadableBody() if "json" in content_type or not content_type else UnsupportedMedia()
    param = ".".join(map(str, path)).encode("utf-8", "replace").decode()[:SHOWN]
    return InvalidRequest(f"{param} {wording(error)}", param=param)


def path_of(error: Mapping[str, Any]) -> list[str | int]:
    """The names of fields that lead to an error, and nothing that is in no request."""
    path = list(error["loc"])
    if path[:1] in (["body"], ["header"]):
        del path[0]
    if error["type"] in NO_TASK:
        return ["task"]
    if len(path) > 1 and path[0] in TASKS:  # which of the kinds of jobs it was read as
        del path[0]
    return path


def wording(error: Mapping[str, Any]) -> str:
    """What was expected, to follow the field's name."""
    text = WORDING.get(error["type"], error["msg"])
    for theirs, ours in PHRASES.items():
        text = text.replace(theirs, ours)
    return text
